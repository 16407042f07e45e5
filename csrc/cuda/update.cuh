// A block updates one chunk of a param and its states in place, by the rules of ../rules.h.
#pragma once

#include "access.cuh"
#include "step.h"

namespace fusedopt {

// One tensor's streams from the chunk's first element on. fp32 values live in `primary` (the param
// or its master) or, for a half param without a master, in `half` alone.
struct Streams {
  const void* grad;
  float* primary;
  uint16_t* half;  // the fp16 or bf16 param
  float* state[kMaxStates];
  int n;
  bool grad_is_float, grad_is_float16, half_is_float16;
};

__device__ __forceinline__ DType grad_dtype(const Streams& s) {
  if (s.grad_is_float) return DType::kFloat32;
  return s.grad_is_float16 ? DType::kFloat16 : DType::kBFloat16;
}

// Uniform over the tensor.
template <class R>
struct Settings {
  typename R::Hyper hyper;
  Decay decay;
  float grad_mult, max_grad_value;
  bool momentum, nesterov;
};

__device__ __forceinline__ void set_rule(const AdamW::Options&, Settings<AdamW>& s) {
  s.momentum = s.nesterov = false;
}

__device__ __forceinline__ void set_rule(const SGD::Options& o, Settings<SGD>& s) {
  s.momentum = o.momentum != 0.0;
  s.nesterov = o.nesterov != 0;
}

template <bool kAmsgrad>
__device__ __forceinline__ void apply(const Settings<AdamW>& s, float grad, float& param,
                                      float (&state)[kMaxStates]) {
  AdamW::update<kAmsgrad>(s.hyper, s.decay, grad, param, state[0], state[1], state[2]);
}

template <bool>
__device__ __forceinline__ void apply(const Settings<SGD>& s, float grad, float& param,
                                      float (&state)[kMaxStates]) {
  SGD::update(s.hyper, s.decay, s.momentum, s.nesterov, grad, param, state[0]);
}

// States that a kernel touches: AdamW's third only with amsgrad, SGD's only with momentum.
template <class R, bool kAmsgrad>
__device__ __forceinline__ constexpr int n_states() {
  return R::kStates == 3 && !kAmsgrad ? 2 : R::kStates;
}

// What the param was before this step, in fp32. Where it is not the rounding of its master someone
// wrote to it, and it is the truth.
template <bool kHalfParam>
__device__ __forceinline__ float current_param(const Streams& s, float master, uint32_t half) {
  if (!kHalfParam) return master;
  const float written = widened(half, s.half_is_float16);
  if (!s.primary) return written;
  return narrowed(master, s.half_is_float16) == half ? master : written;
}

// Whether the tensor has state k: none under SGD without momentum, no third without amsgrad.
template <class R>
__device__ __forceinline__ bool is_there(const Streams& s, const Settings<R>& settings, int k) {
  if (R::kStates == 1) return settings.momentum;
  return k < kMaxStates - 1 || s.state[k];
}

// The third state of a group without amsgrad: any second moment is larger.
__device__ __forceinline__ float absent_state(int k) {
  return k == kMaxStates - 1 ? float_of(0xff800000u) : 0.0f;
}

enum class GradAccess { kFloat, kHalf, kNarrow };

// 256 elements by a warp, all of them there and every stream on a 16-byte boundary, the gradient
// excepted under kNarrow. Loads first: eight of 16 bytes are in flight for fp32 AdamW. amsgrad's
// fourth stream does not fit in 64 registers that way, so it takes one half of the warp's elements
// after the other.
template <class R, bool kAmsgrad, GradAccess kGrad, bool kHalfParam>
__device__ __forceinline__ void update_warp(const Streams& s, const Settings<R>& settings, int at,
                                            int t) {
  constexpr int kStatesHere = n_states<R, kAmsgrad>();
  constexpr bool kTwoHalves = kAmsgrad || (kHalfParam && kGrad != GradAccess::kHalf);
  constexpr int kGroups = kTwoHalves ? 1 : 2;
  const bool has_primary = !kHalfParam || s.primary;
  uint4 grad_bits = {}, half_bits = {};
  if (kGrad == GradAccess::kHalf) {
    grad_bits = load_half(static_cast<const uint16_t*>(s.grad) + at, t);
  }
  if (kHalfParam) half_bits = load_half(s.half + at, t);
  uint32_t half[4] = {};
#pragma unroll
  for (int first = 0; first < 2; first += kGroups) {
    float grad[4 * kGroups], param[4 * kGroups] = {}, state[kStatesHere][4 * kGroups];
    uint32_t grad_pair[2 * kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int group = at + (first + g) * (kWarpElements / 2);
      if (kGrad == GradAccess::kFloat) {
        load_group(static_cast<const float*>(s.grad) + group, t, grad + 4 * g);
      }
      if (has_primary) load_group(s.primary + group, t, param + 4 * g);
#pragma unroll
      for (int k = 0; k < kStatesHere; ++k) {
        if (is_there<R>(s, settings, k)) {
          load_group(s.state[k] + group, t, state[k] + 4 * g);
        } else {
          fill_group(absent_state(k), state[k] + 4 * g);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int group = at + (first + g) * (kWarpElements / 2);
      if (kGrad == GradAccess::kNarrow) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          grad[4 * g + j] = element(s.grad, grad_dtype(s), group + 4 * t + j);
        }
      } else if (kGrad == GradAccess::kHalf) {
        spread(grad_bits, t, first + g, grad_pair + 2 * g);
      }
      if (kHalfParam) spread(half_bits, t, first + g, half + 2 * (first + g));
    }
#pragma unroll
    for (int j = 0; j < 4 * kGroups; ++j) {
      const int shift = 16 * (j % 2);
      if (kGrad == GradAccess::kHalf) {
        grad[j] = widened(grad_pair[j / 2] >> shift & 0xffffu, s.grad_is_float16);
      }
      float p = current_param<kHalfParam>(s, param[j], half[2 * first + j / 2] >> shift & 0xffffu);
      float values[kMaxStates] = {};
#pragma unroll
      for (int k = 0; k < kStatesHere; ++k) values[k] = state[k][j];
      apply<kAmsgrad>(settings, clipped(grad[j], settings.grad_mult, settings.max_grad_value), p,
                      values);
      param[j] = p;
#pragma unroll
      for (int k = 0; k < kStatesHere; ++k) state[k][j] = values[k];
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int group = at + (first + g) * (kWarpElements / 2);
      if (has_primary) store_group(s.primary + group, t, param + 4 * g);
#pragma unroll
      for (int k = 0; k < kStatesHere; ++k) {
        if (is_there<R>(s, settings, k)) store_group(s.state[k] + group, t, state[k] + 4 * g);
      }
      if (kHalfParam) narrow(param + 4 * g, s.half_is_float16, half + 2 * (first + g));
    }
  }
  if (kHalfParam) __stcs(reinterpret_cast<uint4*>(s.half + at) + t, gather(half, t));
}

// The elements that make up no whole warp's share, and tensors that lie on odd addresses.
template <class R, bool kAmsgrad>
__device__ __forceinline__ void update_element(const Streams& s, const Settings<R>& settings,
                                               int i) {
  constexpr int kStatesHere = n_states<R, kAmsgrad>();
  const float grad = element(s.grad, grad_dtype(s), i);
  float p = s.primary ? s.primary[i] : 0.0f;
  if (s.half) p = current_param<true>(s, p, s.half[i]);
  float values[kMaxStates] = {};
#pragma unroll
  for (int k = 0; k < kStatesHere; ++k) {
    values[k] = is_there<R>(s, settings, k) ? s.state[k][i] : absent_state(k);
  }
  apply<kAmsgrad>(settings, clipped(grad, settings.grad_mult, settings.max_grad_value), p, values);
  if (s.primary) s.primary[i] = p;
  if (s.half) s.half[i] = static_cast<uint16_t>(narrowed(p, s.half_is_float16));
#pragma unroll
  for (int k = 0; k < kStatesHere; ++k) {
    if (is_there<R>(s, settings, k)) s.state[k][i] = values[k];
  }
}

// A chunk's streams and settings. In shared memory and read again wherever they are used: registers
// are for the data, of which 64 a thread leave no room for this.
template <class R>
struct Work {
  Streams streams;
  Settings<R> settings;
  int whole;  // elements that warps take 256 at a time
  bool grad_aligned;
};

template <class R, bool kAmsgrad>
__device__ __forceinline__ bool states_aligned(const Streams& s) {
  bool aligned = aligned16(s.primary) && aligned16(s.half);
  for (int k = 0; k < n_states<R, kAmsgrad>(); ++k) aligned = aligned && aligned16(s.state[k]);
  return aligned;
}

template <class R, bool kAmsgrad>
__device__ __forceinline__ void prepare(const DeviceStep& step, const Chunk& chunk, Work<R>& work) {
  const Grad& grad = step.plan.grads[chunk.row];
  const Row& row = step.plan.rows[chunk.row];
  const int64_t begin = chunk.index * kChunk;
  const int64_t left = grad.present ? row.numel - begin : 0;
  const bool is_float = row.dtype == DType::kFloat32;
  float* primary = is_float ? static_cast<float*>(row.param) : row.master;
  Streams& s = work.streams;
  s.n = static_cast<int>(left < kChunk ? left : kChunk);
  s.grad_is_float = grad.dtype == DType::kFloat32;
  s.grad_is_float16 = grad.dtype == DType::kFloat16;
  s.half_is_float16 = row.dtype == DType::kFloat16;
  s.grad = static_cast<const char*>(grad.data) + begin * (s.grad_is_float ? 4 : 2);
  s.primary = primary ? primary + begin : nullptr;
  s.half = is_float ? nullptr : static_cast<uint16_t*>(row.param) + begin;
  for (int k = 0; k < kMaxStates; ++k) {
    s.state[k] = k < n_states<R, kAmsgrad>() && row.state[k] ? row.state[k] + begin : nullptr;
  }
  work.grad_aligned = aligned16(s.grad);
  work.whole = states_aligned<R, kAmsgrad>(s) ? s.n / kWarpElements * kWarpElements : 0;

  const auto& options = static_cast<const typename R::Options*>(step.group_options)[row.group];
  Settings<R>& settings = work.settings;
  settings.hyper = static_cast<const RowStep<R>*>(step.plan.row_scalars)[chunk.row].hyper;
  settings.decay = R::decay(options);
  settings.grad_mult = options.maximize ? -step.scalars->grad_mult : step.scalars->grad_mult;
  settings.max_grad_value = step.max_grad_value;
  set_rule(options, settings);
}

template <class R, bool kAmsgrad, GradAccess kGrad, bool kHalfParam>
__device__ __forceinline__ void update_whole(const Work<R>& work) {
  const int t = threadIdx.x % kWarp;
  int at = threadIdx.x / kWarp * kWarpElements;
  for (; at < work.whole; at += kWarps * kWarpElements) {
    update_warp<R, kAmsgrad, kGrad, kHalfParam>(work.streams, work.settings, at, t);
  }
}

template <class R, bool kAmsgrad, GradAccess kGrad>
__device__ __forceinline__ void update_whole(const Work<R>& work) {
  if (work.streams.half) {
    update_whole<R, kAmsgrad, kGrad, true>(work);
  } else {
    update_whole<R, kAmsgrad, kGrad, false>(work);
  }
}

// Called by a whole block. kAmsgrad: there are groups with amsgrad, and there may be others.
template <class R, bool kAmsgrad>
__device__ __forceinline__ void update_chunk(const DeviceStep& step, const Chunk& chunk) {
  __shared__ Work<R> work;
  if (threadIdx.x == 0) prepare<R, kAmsgrad>(step, chunk, work);
  __syncthreads();
  if (!work.grad_aligned) {
    update_whole<R, kAmsgrad, GradAccess::kNarrow>(work);
  } else if (work.streams.grad_is_float) {
    update_whole<R, kAmsgrad, GradAccess::kFloat>(work);
  } else {
    update_whole<R, kAmsgrad, GradAccess::kHalf>(work);
  }
  for (int i = work.whole + threadIdx.x; i < work.streams.n; i += kThreads) {
    update_element<R, kAmsgrad>(work.streams, work.settings, i);
  }
  __syncthreads();  // before the next chunk's work takes its place
}

}  // namespace fusedopt
