// A warp turns a chunk of gradients into its partial, and the partial into integers.
//
// A lane of the numeric contract has the elements of one index modulo 256. A thread holds eight
// lanes. They are added in the contract's order: inside the thread, then by shuffles between
// neighbours. Thread t keeps word t of the norm.
#pragma once

#include "../scalars.h"
#include "access.cuh"
#include "launch.h"

namespace fusedopt {

static_assert(kWarpElements == kLanes, "a warp's accumulators are the lanes of the contract");
static_assert(kWords <= kWarp, "one thread a word");

struct ChunkOfGrads {
  Stream grad;
  int n;
};

FUSEDOPT_DEVICE ChunkOfGrads chunk_of_grads(const PlanView& plan, const Chunk& chunk) {
  const Grad& grad = plan.grads[chunk.row];
  if (!grad.present) return {{nullptr, Codec::kFloat32}, 0};
  const int64_t begin = chunk.index * kChunk;
  const int64_t left = plan.rows[chunk.row].numel - begin;
  return {stream_at(grad.data, grad.codec, begin), static_cast<int>(left < kChunk ? left : kChunk)};
}

// The contract's lane of accumulator j of thread t.
FUSEDOPT_DEVICE int lane_of(Codec codec, int t, int j) {
  if (codec != Codec::kFloat32) return 8 * t + j;
  return 4 * t + (j < 4 ? j : kWarpElements / 2 + j - 4);
}

// Loads a row one element at a time, all eight before the first use.
template <class T>
FUSEDOPT_DEVICE void load_some(const ChunkOfGrads& c, int row, int t, T (&x)[8]) {
  const T* data = static_cast<const T*>(c.grad.data);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int i = row + lane_of(c.grad.codec, t, j);
    x[j] = i < c.n ? __ldcg(data + i) : T();
  }
}

// Each of these calls visit(j, value) for this thread's elements of the whole rows at the chunk's
// start, and returns where they end. The elements of each lane come in ascending order.

template <class Visit>
FUSEDOPT_DEVICE int visit_floats(const ChunkOfGrads& c, int t, const Visit& visit) {
  int row = 0;
  const float4* data = static_cast<const float4*>(c.grad.data) + t;
  for (; row + 4 * kWarpElements <= c.n; row += 4 * kWarpElements, data += kWarpElements) {
    float4 x[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = __ldcg(data + k * kWarp);
    __syncwarp();  // ptxas for sm_100 and sm_120 would otherwise start the last loads late
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int j = 4 * (k % 2);
      visit(j, x[k].x), visit(j + 1, x[k].y), visit(j + 2, x[k].z), visit(j + 3, x[k].w);
    }
  }
#pragma unroll 1
  for (; row + kWarpElements <= c.n; row += kWarpElements, data += kWarpElements / 4) {
    const float4 low = __ldcg(data), high = __ldcg(data + kWarp);
    visit(0, low.x), visit(1, low.y), visit(2, low.z), visit(3, low.w);
    visit(4, high.x), visit(5, high.y), visit(6, high.z), visit(7, high.w);
  }
  return row;
}

template <class Visit>
FUSEDOPT_DEVICE int visit_halves(const ChunkOfGrads& c, int t, const Visit& visit) {
  int row = 0;
  const Codec codec = c.grad.codec;
  const auto* data = static_cast<const uint4*>(c.grad.data);
#pragma unroll 4
  for (; row + kWarpElements <= c.n; row += kWarpElements) {
    const uint4 pairs = __ldcg(data + row / 8 + t);
    visit(0, widened_low(pairs.x, codec)), visit(1, widened_high(pairs.x, codec));
    visit(2, widened_low(pairs.y, codec)), visit(3, widened_high(pairs.y, codec));
    visit(4, widened_low(pairs.z, codec)), visit(5, widened_high(pairs.z, codec));
    visit(6, widened_low(pairs.w, codec)), visit(7, widened_high(pairs.w, codec));
  }
  return row;
}

template <class Visit>
FUSEDOPT_DEVICE void for_each_element(const ChunkOfGrads& c, int t, const Visit& visit) {
  int row = 0;
  const bool is_float = c.grad.codec == Codec::kFloat32;
  if (aligned16(c.grad)) row = is_float ? visit_floats(c, t, visit) : visit_halves(c, t, visit);
  for (; row < c.n; row += kWarpElements) {
    float x[8];
    if (is_float) {
      load_some(c, row, t, x);
    } else {
      unsigned short bits[8];
      load_some(c, row, t, bits);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = widened(bits[j], c.grad.codec);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (row + lane_of(c.grad.codec, t, j) < c.n) visit(j, x[j]);
    }
  }
}

FUSEDOPT_DEVICE float sum_over_warp(float x) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    x = x + __shfl_xor_sync(kAllThreads, x, distance);
  }
  return x;
}

// The same in every thread of the warp.
struct Scan {
  float sum;      // of (grad * mult1 * mult2)^2
  float largest;  // |grad * mult1|; NaN if there is one
};

FUSEDOPT_DEVICE Scan scan(const ChunkOfGrads& c, int t, float mult1, float mult2) {
  float lane[8] = {};
  uint32_t largest = 0;  // as integers, magnitudes keep their order, with NaN above inf
  for_each_element(c, t, [&](int j, float grad) {
    const float x = grad * mult1;
    const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
    lane[j] = fma(x * mult2, x * mult2, lane[j]);
  });
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllThreads, largest, distance);
    largest = other > largest ? other : largest;
  }
  const float low = (lane[0] + lane[1]) + (lane[2] + lane[3]);
  const float high = (lane[4] + lane[5]) + (lane[6] + lane[7]);
  const bool contiguous = c.grad.codec != Codec::kFloat32;  // low and high are adjacent lanes
  const float first = sum_over_warp(contiguous ? low + high : low);
  const float second = sum_over_warp(high);
  return {contiguous ? first : first + second, float_of(largest)};
}

// As on the CPU (csrc/cpu/reduce.h): a finite chunk has a finite partial.
FUSEDOPT_DEVICE Partial partial_of(const ChunkOfGrads& c, int t, const Scan& s, float inv_scale) {
  if (in_range(s.sum)) return {s.sum, 0};
  if (s.largest == 0.0f || s.largest - s.largest != 0.0f) return {s.largest, 0};
  const Rescale rescale = rescale_for(s.largest);
  return {scan(c, t, inv_scale, rescale.scale).sum, rescale.exponent};
}

// The number that a chunk adds to word t.
FUSEDOPT_DEVICE uint64_t word_of_chunk(const ChunkOfGrads& c, int t, bool norm_is_two, bool counted,
                                       float inv_scale) {
  const Scan s = scan(c, t, inv_scale, 1.0f);
  if (!norm_is_two) return t == kLargest ? bits_of(s.largest) : 0;
  const Addend addend = addend_of(partial_of(c, t, s, inv_scale), counted);
  return t == addend.at ? addend.low : t == addend.at + 1 ? addend.high : 0;
}

// Word t of all chunks of this warp.
FUSEDOPT_DEVICE uint64_t word_of_warp(const DeviceStep& step, int t, float inv_scale) {
  const PlanView& plan = step.plan;
  const bool norm_is_two = step.record.has(StepRecord::kNormIsTwo);
  uint64_t word = 0;
  int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (; c < plan.n_chunks; c += static_cast<int64_t>(gridDim.x) * kWarps) {
    const ChunkOfGrads grads = chunk_of_grads(plan, plan.chunks[c]);
    const bool counted = step.record.counts(plan.rows[plan.chunks[c].row]);
    word = combined(t, word, word_of_chunk(grads, t, norm_is_two, counted, inv_scale));
  }
  return word;
}

// words[t] = combined(t, words[t], word), atomically.
FUSEDOPT_DEVICE void add_word(Word* words, int t, Word word) {
  if (word == 0) return;
  if (t == kLargest) {
    atomicMax(words + t, word);
  } else {
    atomicAdd(words + t, word);
  }
}

// Whether all other blocks are done; their writes are then visible. Each block draws a ticket, and
// the counter is zero again after the last.
FUSEDOPT_DEVICE bool is_last_block(uint32_t* ticket) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for the whole block, whose writes the barrier has ordered before this
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace fusedopt
