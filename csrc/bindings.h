// What the pybind11 doors of both native modules share: tables that Python has filled, and what
// Python compares with its own declarations when it imports a module.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "check.h"
#include "records.h"
#include "rules.h"
#include "words.h"

namespace fusedopt {

namespace py = pybind11;

template <class T>
T* required(const py::dict& tables, const char* name) {
  const auto address = tables[name].cast<uintptr_t>();
  FUSEDOPT_CHECK(address != 0 && address % 16 == 0, name, " must be an address on 16 bytes, not ",
                 address);
  return reinterpret_cast<T*>(address);
}

inline int64_t count_of(const py::dict& tables, const char* name) {
  const auto count = tables[name].cast<int64_t>();
  FUSEDOPT_CHECK(count >= 0 && count < INT32_MAX, name, " is ", count);
  return count;
}

inline PlanView plan_view(const py::dict& tables) {
  return {required<const Row>(tables, "rows"),
          required<const Grad>(tables, "grads"),
          required<const void>(tables, "options"),
          required<void>(tables, "row_steps"),
          count_of(tables, "n_rows"),
          required<const Chunk>(tables, "chunks"),
          count_of(tables, "n_chunks")};
}

inline int rule_named(const std::string& name) {
  int found = -1;
  for (int rule = 0; rule < Rules::kCount; ++rule) {
    Rules::with(rule, [&](auto tag) {
      if (name == decltype(tag)::Rule::kName) found = rule;
    });
  }
  FUSEDOPT_CHECK(found >= 0, "unknown rule ", name);
  return found;
}

// Name, offset and size of each field, and what it is in the words of Python's struct.
template <size_t n>
py::list described(const Field (&fields)[n]) {
  py::list list;
  for (const Field& f : fields) {
    list.append(py::make_tuple(f.name, f.offset, f.bytes, std::string(1, f.kind)));
  }
  return list;
}

inline py::dict described_records() {
  const Field row[] = {FUSEDOPT_FIELD(Row, data),    FUSEDOPT_FIELD(Row, step),
                       FUSEDOPT_FIELD(Row, numel),   FUSEDOPT_FIELD(Row, group),
                       FUSEDOPT_FIELD(Row, codecs),  FUSEDOPT_FIELD(Row, scales),
                       FUSEDOPT_FIELD(Row, reserved)};
  const Field grad[] = {FUSEDOPT_FIELD(Grad, data), FUSEDOPT_FIELD(Grad, codec),
                        FUSEDOPT_FIELD(Grad, present)};
  const Field chunk[] = {FUSEDOPT_FIELD(Chunk, row), FUSEDOPT_FIELD(Chunk, index),
                         FUSEDOPT_FIELD(Chunk, position)};
  const Field number[] = {FUSEDOPT_FIELD(DeviceNumber, data), FUSEDOPT_FIELD(DeviceNumber, field),
                          FUSEDOPT_FIELD(DeviceNumber, is_double)};
  const Field step[] = {
      FUSEDOPT_FIELD(StepRecord, max_grad_norm),    FUSEDOPT_FIELD(StepRecord, max_grad_value),
      FUSEDOPT_FIELD(StepRecord, grad_scale),       FUSEDOPT_FIELD(StepRecord, found_inf),
      FUSEDOPT_FIELD(StepRecord, inf_flag),         FUSEDOPT_FIELD(StepRecord, scalars),
      FUSEDOPT_FIELD(StepRecord, n_device_numbers), FUSEDOPT_FIELD(StepRecord, flags)};
  const Field scalars[] = {
      FUSEDOPT_FIELD(StepScalars, grad_norm),     FUSEDOPT_FIELD(StepScalars, clip_coef),
      FUSEDOPT_FIELD(StepScalars, grad_mult),     FUSEDOPT_FIELD(StepScalars, inv_scale),
      FUSEDOPT_FIELD(StepScalars, found_inf),     FUSEDOPT_FIELD(StepScalars, skip),
      FUSEDOPT_FIELD(StepScalars, skipped_steps), FUSEDOPT_FIELD(StepScalars, reserved)};
  py::dict records;
  records["Row"] = described(row);
  records["Grad"] = described(grad);
  records["Chunk"] = described(chunk);
  records["DeviceNumber"] = described(number);
  records["StepRecord"] = described(step);
  records["StepScalars"] = described(scalars);
  return records;
}

inline py::dict described_rules() {
  py::dict rules;
  for (int rule = 0; rule < Rules::kCount; ++rule) {
    Rules::with(rule, [&](auto tag) {
      using R = typename decltype(tag)::Rule;
      static_assert(sizeof(typename R::Options) == kOptionsBytes);
      static_assert(R::kStates <= kMaxStates);
      py::dict described_rule;
      described_rule["options"] = described(R::kOptions);
      described_rule["hyper"] = described(R::kHyper);
      described_rule["n_states"] = R::kStates;
      described_rule["n_always"] = R::kAlways;
      described_rule["row_step_bytes"] = sizeof(RowStep<R>);
      py::list absent;
      for (int k = R::kAlways; k < R::kStates; ++k) absent.append(R::absent(k));
      described_rule["absent"] = absent;
      rules[R::kName] = described_rule;
    });
  }
  return rules;
}

inline void describe(py::module_& m) {
  m.attr("RECORDS") = described_records();
  m.attr("RULES") = described_rules();
  m.attr("CHUNK_ELEMENTS") = kChunk;
  m.attr("WORDS") = kWords;
  m.attr("DIGITS") = kDigits;
  m.attr("LOWEST") = kLowest;
  m.attr("STREAMS") = kStreams;
  m.attr("CODEC_BITS") = kCodecBits;
  m.attr("OPTIONS_BYTES") = kOptionsBytes;
  m.attr("FLOAT32") = static_cast<int>(Codec::kFloat32);
  HalfCodecs::for_each([&](auto half) { m.attr(half.kName) = static_cast<int>(half.kCodec); });
  m.attr("NORM_IS_TWO") = static_cast<uint64_t>(StepRecord::kNormIsTwo);
  m.attr("MEASURED") = static_cast<uint64_t>(StepRecord::kMeasured);
  m.attr("SKIP_NONFINITE") = static_cast<uint64_t>(StepRecord::kSkipNonfinite);
}

}  // namespace fusedopt
