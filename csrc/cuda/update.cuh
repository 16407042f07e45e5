// A block updates one chunk of a param and its states in place, by the rules of ../rules.h. For one
// element:
//
//   if (scalars->skip) return                                  nothing moves
//   for each chunk, by one block:                              update_chunks()
//     pointers and numbers into shared memory                  prepare(), by one thread
//     for 256 elements, by one warp, eight in each thread:     update_warp()
//       g = grad[i], p = master[i], s[k] = state[k][i]         all loads first, 16 bytes each
//       if (param[i] != narrowed(p)) p = param[i]              no master, or someone wrote to param
//       g = clip(g * grad_mult, max_grad_value)                unscale, clip, maximize: one factor
//       R::update(hyper, kind, g, p, s...)                     the rule, in registers
//       master[i] = p, param[i] = narrowed(p), state[k][i] = s[k]
//     the elements that are left over, one in each thread:     update_element()
//
// States and masters are fp32. coded_update.cuh has the loop for fewer bits.
#pragma once

#include <utility>

#include "../rules.h"
#include "access.cuh"
#include "launch.h"

namespace fusedopt {

// The tensors that a kernel is compiled for: those of rule R with n states or fewer.
template <class R_, int n>
struct Compiled {
  using R = R_;
  static constexpr int kStates = n;
};

// A chunk's streams and numbers, uniform over the block. They stay in shared memory and are read
// again for every use: the 64 registers of a thread have room for the data alone.
template <class K>
struct Work {
  int64_t chunk;  // negative: the block is done
  Stream grad;
  Stream primary;  // the values to update: param or master; null: `half` has them
  Stream half;     // the fp16 or bf16 param
  Stream state[K::kStates];
  typename K::R::Hyper hyper;
  Kind kind;
  float grad_mult, max_grad_value;
  int n;
  int whole;  // elements that warps take 256 at a time
  bool grad_aligned;

  // A state that not every tensor has may be absent.
  FUSEDOPT_DEVICE bool has_state(int k) const { return k < K::R::kAlways || state[k].data; }
};

// What is the same for all elements, whatever the codecs.
template <class R, class AnyWork>
FUSEDOPT_DEVICE void prepare_numbers(const DeviceStep& step, const Chunk& chunk, const Row& row,
                                     AnyWork& w) {
  const auto& options = static_cast<const typename R::Options*>(step.plan.options)[row.group];
  const float grad_mult = step.record.scalars->grad_mult;
  w.hyper = static_cast<const RowStep<R>*>(step.plan.row_steps)[chunk.row].hyper;
  w.kind = kind_of<R>(options);
  w.grad_mult = options.maximize ? -grad_mult : grad_mult;
  w.max_grad_value = static_cast<float>(step.record.max_grad_value);
}

template <class K>
FUSEDOPT_DEVICE void prepare(const DeviceStep& step, const Chunk& chunk, Work<K>& w) {
  using R = typename K::R;
  const Grad& grad = step.plan.grads[chunk.row];
  const Row& row = step.plan.rows[chunk.row];
  const int64_t begin = chunk.index * kChunk;
  const int64_t left = grad.present ? row.numel - begin : 0;
  const auto stream = [&](int s) { return stream_at(row.data[s], row.codec(s), begin); };
  const bool is_float = row.codec(kParam) == Codec::kFloat32;
  w.n = static_cast<int>(left < kChunk ? left : kChunk);
  w.grad = stream_at(grad.data, grad.codec, begin);
  w.grad_aligned = aligned16(w.grad);
  w.primary = stream(is_float ? kParam : kMaster);
  w.half = is_float ? Stream{} : stream(kParam);
  bool aligned = aligned16(w.primary) && aligned16(w.half);
  for (int k = 0; k < K::kStates; ++k) {
    w.state[k] = stream(kStates + k);
    aligned = aligned && aligned16(w.state[k]);
  }
  w.whole = aligned ? w.n / kWarpElements * kWarpElements : 0;
  prepare_numbers<R>(step, chunk, row, w);
}

// The param before this step, in fp32. Where it is not the rounding of its master, someone wrote to
// the param, and its own value counts.
template <bool kHalfParam, class K>
FUSEDOPT_DEVICE float current_param(const Work<K>& w, float master, uint16_t half) {
  if (!kHalfParam) return master;
  const float written = widened(half, w.half.codec);
  if (!w.primary.data) return written;
  return narrowed(master, w.half.codec) == half ? master : written;
}

template <class K, class AnyWork, size_t... k>
FUSEDOPT_DEVICE void apply(const AnyWork& w, float grad, float& param, float* state,
                           std::index_sequence<k...>) {
  grad = clipped(grad, w.grad_mult, w.max_grad_value);
  K::R::template update<K::kStates>(w.hyper, w.kind, grad, param, state[k]...);
}

// `state` has room for every state of the rule.
template <class K, class AnyWork>
FUSEDOPT_DEVICE void apply(const AnyWork& w, float grad, float& param, float* state) {
  apply<K>(w, grad, param, state, std::make_index_sequence<K::R::kStates>());
}

constexpr int kHalfWarp = kWarpElements / 2;            // elements
constexpr int kBlockElements = kWarps * kWarpElements;  // with loads in flight at a time

enum class GradAccess { kFloat, kHalf, kNarrow };

// A group of every stream in a thread's registers.
template <class K>
struct Group {
  float grad[4], param[4], state[K::kStates][4];
  uint32_t grad_pair[2], half[2];
};

template <class K, bool kHalfParam>
FUSEDOPT_DEVICE void load(const Work<K>& w, int at, int t, Group<K>& x) {
  if (!kHalfParam || w.primary.data) load_group(w.primary, at, t, x.param);
#pragma unroll
  for (int k = 0; k < K::kStates; ++k) {
    if (w.has_state(k)) {
      load_group(w.state[k], at, t, x.state[k]);
    } else {
      for (float& value : x.state[k]) value = K::R::absent(k);
    }
  }
}

template <class K, GradAccess kGrad, bool kHalfParam>
FUSEDOPT_DEVICE void update_group(const Work<K>& w, Group<K>& x) {
  // An empty loop, for nvcc 13.0 alone: without it AdamW's kernel for sm_100 and sm_120 has 14,144
  // instructions in place of 8,936, with the rule's branches taken for each element.
#pragma unroll
  for (int k = 0; k < K::kStates; ++k) {
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int shift = 16 * (j % 2);
    if (kGrad == GradAccess::kHalf) {
      x.grad[j] = widened(static_cast<uint16_t>(x.grad_pair[j / 2] >> shift), w.grad.codec);
    }
    const auto half = static_cast<uint16_t>(x.half[j / 2] >> shift);
    float p = current_param<kHalfParam>(w, x.param[j], half);
    float state[K::R::kStates] = {};
#pragma unroll
    for (int k = 0; k < K::kStates; ++k) state[k] = x.state[k][j];
    apply<K>(w, x.grad[j], p, state);
    x.param[j] = p;
#pragma unroll
    for (int k = 0; k < K::kStates; ++k) x.state[k][j] = state[k];
  }
}

template <class K, bool kHalfParam>
FUSEDOPT_DEVICE void store(const Work<K>& w, int at, int t, const Group<K>& x) {
  if (!kHalfParam || w.primary.data) store_group(w.primary, at, t, x.param);
#pragma unroll
  for (int k = 0; k < K::kStates; ++k) {
    if (w.has_state(k)) store_group(w.state[k], at, t, x.state[k]);
  }
}

// Loads, updates and stores the thread's groups, from half `first` of the warp's elements on. The
// caller has loaded aligned 16-bit gradients and params, as grad_bits and half_bits, and stores the
// new 16-bit params, which it finds in `half`.
template <class K, GradAccess kGrad, bool kHalfParam, int kGroups>
FUSEDOPT_DEVICE void update_groups(const Work<K>& w, int at, int t, int first,
                                   const uint4& grad_bits, const uint4& half_bits, uint32_t* half) {
  Group<K> group[kGroups] = {};
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int start = at + (first + g) * kHalfWarp;
    if (kGrad == GradAccess::kFloat) load_group(w.grad, start, t, group[g].grad);
    load<K, kHalfParam>(w, start, t, group[g]);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int start = at + (first + g) * kHalfWarp + 4 * t;
#pragma unroll
    for (int j = 0; kGrad == GradAccess::kNarrow && j < 4; ++j) {
      group[g].grad[j] = load_element<true>(w.grad, start + j);
    }
    if (kGrad == GradAccess::kHalf) spread(grad_bits, t, first + g, group[g].grad_pair);
    if (kHalfParam) spread(half_bits, t, first + g, group[g].half);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) update_group<K, kGrad, kHalfParam>(w, group[g]);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    store<K, kHalfParam>(w, at + (first + g) * kHalfWarp, t, group[g]);
    if (kHalfParam) narrow_group(group[g].param, w.half.codec, half + 2 * (first + g));
  }
}

// A warp updates 256 elements. All of them exist, and every stream but a kNarrow gradient is on a
// 16-byte boundary. Loads come first: eight of 16 bytes are in flight with two fp32 states. More
// streams do not fit in 64 registers, so the warp takes one half of its elements after the other.
template <class K, GradAccess kGrad, bool kHalfParam>
FUSEDOPT_DEVICE void update_warp(const Work<K>& w, int at, int t) {
  constexpr bool kOneByOne = K::kStates > 2 || (kHalfParam && kGrad != GradAccess::kHalf);
  constexpr int kGroups = kOneByOne ? 1 : 2;
  uint4 grad_bits = {}, half_bits = {};
  if (kGrad == GradAccess::kHalf) grad_bits = load_eight(w.grad, at, t);
  if (kHalfParam) half_bits = load_eight(w.half, at, t);
  uint32_t half[4] = {};
#pragma unroll
  for (int first = 0; first < 2; first += kGroups) {
    update_groups<K, kGrad, kHalfParam, kGroups>(w, at, t, first, grad_bits, half_bits, half);
  }
  if (kHalfParam) store_eight(w.half, at, t, gather(half, t));
}

// For elements that do not fill a warp's share, and for tensors that are not on 16-byte boundaries.
template <class K>
FUSEDOPT_DEVICE void update_element(const Work<K>& w, int i) {
  float p = w.primary.data ? load_element<false>(w.primary, i) : 0.0f;
  if (w.half.data) p = current_param<true>(w, p, w.half.half()[i]);
  float state[K::R::kStates] = {};
#pragma unroll
  for (int k = 0; k < K::kStates; ++k) {
    const bool there = w.has_state(k);
    state[k] = there ? load_element<false>(w.state[k], i) : K::R::absent(k);
  }
  apply<K>(w, load_element<true>(w.grad, i), p, state);
  if (w.primary.data) static_cast<float*>(w.primary.data)[i] = p;
  if (w.half.data) w.half.half()[i] = narrowed(p, w.half.codec);
#pragma unroll
  for (int k = 0; k < K::kStates; ++k) {
    if (w.has_state(k)) static_cast<float*>(w.state[k].data)[i] = state[k];
  }
}

template <class K, GradAccess kGrad>
FUSEDOPT_DEVICE void update_whole(const Work<K>& w) {
  const int t = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kWarpElements;
  if (w.half.data) {
    for (int at = first; at < w.whole; at += kBlockElements) update_warp<K, kGrad, true>(w, at, t);
  } else {
    for (int at = first; at < w.whole; at += kBlockElements) update_warp<K, kGrad, false>(w, at, t);
  }
}

template <class K>
FUSEDOPT_DEVICE void update_chunk(const Work<K>& w, int t) {
  if (!w.grad_aligned) {
    update_whole<K, GradAccess::kNarrow>(w);
  } else if (w.grad.codec == Codec::kFloat32) {
    update_whole<K, GradAccess::kFloat>(w);
  } else {
    update_whole<K, GradAccess::kHalf>(w);
  }
  for (int i = w.whole + t; i < w.n; i += kThreads) update_element<K>(w, i);
}

// Called by a whole block. Chunks go from the last to the first: the end of the gradients is
// likeliest to be in the L2 cache still.
template <class AnyWork>
FUSEDOPT_DEVICE void update_chunks(const DeviceStep& step) {
  __shared__ AnyWork work;
  const int t = threadIdx.x;
  if (t == 0) work.chunk = step.plan.n_chunks - 1 - blockIdx.x + gridDim.x;
  for (;;) {
    if (t == 0) {
      work.chunk -= gridDim.x;
      if (work.chunk >= 0) prepare(step, step.plan.chunks[work.chunk], work);
    }
    __syncthreads();
    if (work.chunk < 0) return;
    update_chunk(work, t);
    __syncthreads();  // before the next chunk's work takes its place
  }
}

}  // namespace fusedopt
