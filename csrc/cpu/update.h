// One chunk of params and states, updated in place by the rules of ../rules.h.
//
// Included by kernels.cpp alone, which is compiled once per instruction set; hence the anonymous
// namespace: nothing in here may be shared between the copies.
#pragma once

#include "../rules.h"
#include "convert.h"
#include "kernels.h"

namespace fusedopt {
namespace {

// One contiguous run of a tensor as the rule sees it: fp32, in memory or in an L1 buffer.
struct Run {
  int64_t n;
  const float* grad;
  float* param;
  float* state[kMaxStates];
};

template <class R>
using RunFn = void (*)(const typename R::Hyper&, const Run&, float grad_mult, float max_grad_value);

template <Decay kDecay, bool kAmsgrad>
void run_adamw(const AdamW::Hyper& hyper, const Run& run, float grad_mult, float max_grad_value) {
  const AdamW::Hyper h = hyper;
  const float* __restrict grad = run.grad;
  float* __restrict param = run.param;
  float* __restrict exp_avg = run.state[0];
  float* __restrict exp_avg_sq = run.state[1];
  float* __restrict max_exp_avg_sq = run.state[2];
  for (int64_t first = 0; first < run.n; first += kSlice) {
    if (run.n > kSlice) {
      prefetch<Fetch::kNear>(grad + first, kSlice);
      prefetch<Fetch::kNear>(param + first, kSlice);
      prefetch<Fetch::kNear>(exp_avg + first, kSlice);
      prefetch<Fetch::kNear>(exp_avg_sq + first, kSlice);
      if (kAmsgrad) prefetch<Fetch::kNear>(max_exp_avg_sq + first, kSlice);
    }
    const int64_t last = min(first + kSlice, run.n);
#pragma omp simd
    for (int64_t i = first; i < last; ++i) {
      const float g = clipped(grad[i], grad_mult, max_grad_value);
      float p = param[i], m = exp_avg[i], v = exp_avg_sq[i];
      float v_max = kAmsgrad ? max_exp_avg_sq[i] : 0.0f;
      AdamW::update<kAmsgrad>(h, kDecay, g, p, m, v, v_max);
      param[i] = p;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      if (kAmsgrad) max_exp_avg_sq[i] = v_max;
    }
  }
}

template <Decay kDecay, bool kMomentum, bool kNesterov>
void run_sgd(const SGD::Hyper& hyper, const Run& run, float grad_mult, float max_grad_value) {
  const SGD::Hyper h = hyper;
  const float* __restrict grad = run.grad;
  float* __restrict param = run.param;
  float* __restrict momentum_buffer = run.state[0];
  for (int64_t first = 0; first < run.n; first += kSlice) {
    if (run.n > kSlice) {
      prefetch<Fetch::kNear>(grad + first, kSlice);
      prefetch<Fetch::kNear>(param + first, kSlice);
      if (kMomentum) prefetch<Fetch::kNear>(momentum_buffer + first, kSlice);
    }
    const int64_t last = min(first + kSlice, run.n);
#pragma omp simd
    for (int64_t i = first; i < last; ++i) {
      const float g = clipped(grad[i], grad_mult, max_grad_value);
      float p = param[i];
      float buffer = kMomentum ? momentum_buffer[i] : 0.0f;
      SGD::update(h, kDecay, kMomentum, kNesterov, g, p, buffer);
      param[i] = p;
      if (kMomentum) momentum_buffer[i] = buffer;
    }
  }
}

template <Decay kDecay>
RunFn<AdamW> choose(const AdamW::Options& o) {
  return o.amsgrad ? run_adamw<kDecay, true> : run_adamw<kDecay, false>;
}

template <Decay kDecay>
RunFn<SGD> choose(const SGD::Options& o) {
  if (o.momentum == 0.0) return run_sgd<kDecay, false, false>;
  return o.nesterov ? run_sgd<kDecay, true, true> : run_sgd<kDecay, true, false>;
}

template <class Options>
auto choose_run(const Options& o, Decay decay) {
  switch (decay) {
    case Decay::kCoupled:
      return choose<Decay::kCoupled>(o);
    case Decay::kDecoupled:
      return choose<Decay::kDecoupled>(o);
    default:
      return choose<Decay::kNone>(o);
  }
}

// The param is the truth wherever it is not the rounding of its master: someone wrote to it since
// the last step. The lines are fetched for the write anyway, so on a CPU looking costs no
// bandwidth.
void follow_external_writes(const uint16_t* param, DType dtype, int64_t n, float* master) {
  if (n <= 0) __builtin_unreachable();
  alignas(64) uint16_t expected[kBlock];
  alignas(64) float written[kBlock];
  narrow(master, dtype, n, expected);
  if (__builtin_memcmp(expected, param, static_cast<size_t>(n) * sizeof *param) == 0) return;
  as_float<Fetch::kNear>(param, dtype, 0, n, written);
  for (int64_t i = 0; i < n; ++i) {
    if (expected[i] != param[i]) master[i] = written[i];
  }
}

template <class R>
void update_half(const Row& row, int64_t begin, Run run, RunFn<R> fn,
                 const typename R::Hyper& hyper, const UpdateArgs& args, float mult) {
  alignas(64) float buffer[kBlock];
  uint16_t* param = static_cast<uint16_t*>(row.param) + begin;
  if (row.master) {
    run.param = row.master + begin;
    follow_external_writes(param, row.dtype, run.n, run.param);
  } else {
    as_float<Fetch::kNear>(param, row.dtype, 0, run.n, buffer);
    run.param = buffer;
  }
  fn(hyper, run, mult, args.max_grad_value);
  narrow(run.param, row.dtype, run.n, param);
}

template <class R>
void update_chunk_by(const PlanView& plan, const Chunk& chunk, const UpdateArgs& args) {
  const Row& row = plan.rows[chunk.row];
  const Grad& grad = plan.grads[chunk.row];
  if (!grad.present) return;
  const auto& options = static_cast<const typename R::Options*>(args.options)[row.group];
  const auto hyper =
      R::hyper(options, static_cast<const typename R::RowScalars*>(plan.row_scalars)[chunk.row]);
  const RunFn<R> fn = choose_run(options, R::decay(options));
  const float mult = options.maximize ? -args.grad_mult : args.grad_mult;

  alignas(64) float buffer[kBlock];
  const bool direct = row.dtype == DType::kFloat32 && grad.dtype == DType::kFloat32;
  const int64_t first = chunk.index * kChunk;
  const int64_t last = first + min(kChunk, row.numel - first);
  const int64_t stride = direct ? kChunk : kBlock;
  for (int64_t begin = first; begin < last; begin += stride) {
    Run run;
    run.n = min(stride, last - begin);
    run.grad = as_float<Fetch::kNear>(grad.data, grad.dtype, begin, run.n, buffer);
    for (int s = 0; s < R::kStates; ++s) {
      run.state[s] = row.state[s] ? row.state[s] + begin : nullptr;
    }
    if (row.dtype == DType::kFloat32) {
      run.param = static_cast<float*>(row.param) + begin;
      fn(hyper, run, mult, args.max_grad_value);
    } else {
      update_half<R>(row, begin, run, fn, hyper, args, mult);
    }
  }
}

void update_chunk(const PlanView& plan, const Chunk& chunk, const UpdateArgs& args) {
  switch (args.rule) {
    case Rule::kAdamW:
      return update_chunk_by<AdamW>(plan, chunk, args);
    case Rule::kSGD:
      return update_chunk_by<SGD>(plan, chunk, args);
  }
}

}  // namespace
}  // namespace fusedopt
