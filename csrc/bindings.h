// Shared by the pybind11 bindings of both native modules: access to tables that Python fills, and
// the descriptions that Python compares with its own declarations at import.
#pragma once

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>
#include <type_traits>
#include <utility>

#include "check.h"
#include "records.h"
#include "rules.h"
#include "scalars.h"

namespace fusedopt {

namespace py = pybind11;

template <class T>
T* required(const py::dict& tables, const char* name) {
  const auto address = tables[name].cast<uintptr_t>();
  FUSEDOPT_CHECK(address != 0 && address % 16 == 0, name, " must be an address on 16 bytes, not ",
                 address);
  return reinterpret_cast<T*>(address);
}

inline int count_of(const py::dict& tables, const char* name) {
  const auto count = tables[name].cast<int64_t>();
  FUSEDOPT_CHECK(count >= 0 && count < INT32_MAX, name, " is ", count);
  return static_cast<int>(count);
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

// Name, offset and size of each field, and its format in Python's struct module: d for double, f
// for float, q for anything else.
template <class Record>
py::list described() {
  const Record record = {};
  py::list list;
  record.with_fields([&](const char* text, const auto&... fields) {
    std::istringstream names(text);
    const auto describe_field = [&](const auto& field) {
      using T = std::decay_t<decltype(field)>;
      const char* kind = std::is_same_v<T, double> ? "d" : std::is_same_v<T, float> ? "f" : "q";
      const auto at = reinterpret_cast<uintptr_t>(&field) - reinterpret_cast<uintptr_t>(&record);
      std::string name;
      std::getline(names >> std::ws, name, ',');
      list.append(py::make_tuple(name, at, sizeof field, kind));
    };
    (describe_field(fields), ...);
  });
  return list;
}

inline py::dict described_records() {
  py::dict records;
  records["Row"] = described<Row>();
  records["Grad"] = described<Grad>();
  records["Chunk"] = described<Chunk>();
  records["DeviceNumber"] = described<DeviceNumber>();
  records["StepRecord"] = described<StepRecord>();
  records["StepScalars"] = described<StepScalars>();
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
      described_rule["options"] = described<typename R::Options>();
      described_rule["hyper"] = described<typename R::Hyper>();
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
  m.attr("SCALE_BLOCK") = kScaleBlock;
  for (auto [name, codec] : {std::pair("FLOAT32", Codec::kFloat32),
                             {"FLOAT16", Codec::kFloat16},
                             {"BFLOAT16", Codec::kBFloat16},
                             {"DITHERED", Codec::kDithered},
                             {"LOG8", Codec::kLog8},
                             {"LOG8_POSITIVE", Codec::kLog8Positive},
                             {"REMAINDER16", Codec::kRemainder16},
                             {"REMAINDER8", Codec::kRemainder8}}) {
    m.attr(name) = static_cast<int>(codec);
  }
  m.attr("NORM_IS_TWO") = static_cast<uint64_t>(StepRecord::kNormIsTwo);
  m.attr("MEASURED") = static_cast<uint64_t>(StepRecord::kMeasured);
  m.attr("SKIP_NONFINITE") = static_cast<uint64_t>(StepRecord::kSkipNonfinite);
  m.attr("UNCOUNTED") = static_cast<uint64_t>(StepRecord::kUncounted);
  m.attr("EXACT") = static_cast<uint64_t>(StepRecord::kExact);
  m.attr("FOUND_INF") = vote(Vote::kFoundInf);
  m.attr("BAD_SCALE") = vote(Vote::kBadScale);
  m.attr("ABORT") = vote(Vote::kAbort);
  m.attr("BY_ABORT") = static_cast<int>(Refusal::kAbort);
  m.attr("BY_OPTIONS") = static_cast<int>(Refusal::kOptions);
}

}  // namespace fusedopt
