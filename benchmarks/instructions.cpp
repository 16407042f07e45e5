// One verb of the CPU backend on one tensor, or on many small ones, for callgrind to watch:
//
//   instructions                      prints the instruction sets it can run
//   instructions LEVEL KERNEL CHUNKS
//
// LEVEL is one of those instruction sets, KERNEL a name in kCases below. All the work is inside of
// measured_call(), on one thread.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"

using namespace fusedopt;

namespace {

constexpr float kGradScale = 65536.0f;

struct Case {
  const char* name;
  bool updates;
  const char* rule;
  Codec codec;      // of params and gradients; a half param has a master
  int64_t in_each;  // elements of a tensor, which is then one chunk; 0: all chunks are one tensor
};

constexpr Case kCases[] = {
    {"reduce:float32", false, AdamW::kName, Codec::kFloat32, 0},
    {"reduce:bfloat16", false, AdamW::kName, Codec::kBFloat16, 0},
    {"update:adamw:float32", true, AdamW::kName, Codec::kFloat32, 0},
    {"update:adamw:bfloat16", true, AdamW::kName, Codec::kBFloat16, 0},
    {"update:sgd-momentum:float32", true, SGD::kName, Codec::kFloat32, 0},
    {"reduce:float32:tensors-of-8", false, AdamW::kName, Codec::kFloat32, 8},
    {"update:adamw:float32:tensors-of-8", true, AdamW::kName, Codec::kFloat32, 8},
};

// The same value at every element: no branch of a kernel depends on it.
struct Values {
  std::vector<float> wide;
  std::vector<uint16_t> half;

  Values(int64_t n, float value) : wide(n, value), half(n, BFloat16::narrowed(value)) {}

  void* in(Codec codec, int64_t at) {
    return codec == Codec::kFloat32 ? static_cast<void*>(&wide[at]) : &half[at];
  }
};

struct Problem {
  Case what;
  Values param, grad;
  std::vector<float> exp_avg, exp_avg_sq;
  std::vector<Chunk> chunks;
  AdamW::Options adamw = {1e-3, 0.1, true, false, 0.9, 0.999, 1e-8, false};
  SGD::Options sgd = {0.1, 0.01, false, false, 0.9, 0.0, false, 0};
  std::vector<RowStep<AdamW>> adamw_steps;
  std::vector<RowStep<SGD>> sgd_steps;
  std::vector<Grad> grads;
  std::vector<Row> rows;
  PlanView plan;
  float grad_scale = kGradScale;
  StepScalars scalars = {};
  StepRecord step = {};
  mutable uint64_t words[kWords] = {};

  Problem(const Case& chosen, int64_t n_chunks)
      : what(chosen),
        param(n_chunks * in_a_chunk(), 0.125f),
        grad(n_chunks * in_a_chunk(), 0.25f * kGradScale),
        exp_avg(n_chunks * in_a_chunk(), 0.0f),
        exp_avg_sq(exp_avg) {
    const int64_t n = n_chunks * in_a_chunk();
    const int64_t in_each = what.in_each ? what.in_each : n;
    for (int64_t at = 0; at < n; at += in_each) add_tensor(at, in_each);
    adamw_steps.assign(rows.size(), row_step<AdamW>(adamw, 10.0f));
    sgd_steps.assign(rows.size(), row_step<SGD>(sgd, 10.0f));
    const bool is_adamw = what.rule == AdamW::kName;
    plan = {rows.data(),
            grads.data(),
            is_adamw ? static_cast<const void*>(&adamw) : &sgd,
            is_adamw ? static_cast<void*>(adamw_steps.data()) : sgd_steps.data(),
            static_cast<int64_t>(rows.size()),
            chunks.data(),
            n_chunks};
    scalars.grad_mult = 1.0f / kGradScale;
    step = {-1.0,        std::numeric_limits<double>::infinity(),
            &grad_scale, nullptr,
            nullptr,     &scalars,
            0,           StepRecord::kNormIsTwo | StepRecord::kMeasured};
  }

  int64_t in_a_chunk() const { return what.in_each ? what.in_each : kChunk; }

  void add_tensor(int64_t at, int64_t numel) {
    Row row = {};
    row.data[kParam] = param.in(what.codec, at);
    row.data[kMaster] = what.codec == Codec::kFloat32 ? nullptr : &param.wide[at];
    row.data[kStates] = &exp_avg[at];
    row.data[kStates + 1] = what.rule == AdamW::kName ? &exp_avg_sq[at] : nullptr;
    row.numel = numel;
    row.codecs = static_cast<uint32_t>(what.codec);
    for (int64_t first = 0; first < numel; first += kChunk) {
      chunks.push_back(
          {static_cast<int32_t>(rows.size()), static_cast<int32_t>(first / kChunk), at + first});
    }
    grads.push_back({grad.in(what.codec, at), what.codec, 1});
    rows.push_back(row);
  }

  int rule() const {
    int found = -1;
    for (int rule = 0; rule < Rules::kCount; ++rule) {
      Rules::with(rule, [&](auto tag) {
        if (decltype(tag)::Rule::kName == what.rule) found = rule;
      });
    }
    return found;
  }
};

}  // namespace

// Named in callgrind's --toggle-collect.
extern "C" __attribute__((noinline)) void measured_call(const Kernels& kernels,
                                                        const Problem& problem) {
  if (problem.what.updates) {
    kernels.update(problem.plan, problem.rule(), problem.step, 1);
  } else {
    kernels.reduce(problem.plan, problem.step, problem.words, 1);
  }
}

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const Kernels* const* k = available_kernels(); *k; ++k) std::puts((*k)->name);
    return 0;
  }
  if (argc != 4 || !select_kernels(argv[1])) return 2;
  const Case* found = std::find_if(std::begin(kCases), std::end(kCases), [&](const Case& c) {
    return std::strcmp(c.name, argv[2]) == 0;
  });
  if (found == std::end(kCases)) return 2;
  Problem problem(*found, std::atol(argv[3]));
  measured_call(current_kernels(), problem);
}
