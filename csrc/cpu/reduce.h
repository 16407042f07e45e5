// Adds a chunk of gradients, as its partial or largest magnitude, to the words of this thread.
//
// Included by kernels.cpp alone, which is compiled once per instruction set; hence the anonymous
// namespace: nothing in here may be shared between the copies.
#pragma once

#include "../scalars.h"
#include "convert.h"

namespace fusedopt {
namespace {

// Sums adjacent pairs, level by level: ((a0+a1)+(a2+a3))+... The width is a power of two.
float tree_sum(float* lanes, int width) {
  float level[kLanes / 2];
  float* in = lanes;
  float* out = level;
  for (int w = width / 2; w >= 1; w /= 2) {
#pragma omp simd
    for (int l = 0; l < w; ++l) out[l] = in[2 * l] + in[2 * l + 1];
    float* spent = in;
    in = out;
    out = spent;
  }
  return in[0];
}

template <Fetch kFetch, class T>
void add_squares(const T* grad, int64_t n, float mult1, float mult2, float* lanes) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch<kFetch>(grad + i, kLanes);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const float x = widened(grad[i + l]) * mult1 * mult2;
      lanes[l] = fma(x, x, lanes[l]);
    }
  }
#pragma omp simd
  for (int64_t l = 0; l < n - i; ++l) {
    const float x = widened(grad[i + l]) * mult1 * mult2;
    lanes[l] = fma(x, x, lanes[l]);
  }
}

template <Fetch kFetch>
void add_squares_of(const Grad& grad, int64_t begin, int64_t n, float mult1, float mult2,
                    float* lanes) {
  if (grad.codec == Codec::kFloat32) {
    const auto* data = static_cast<const float*>(grad.data) + begin;
    return add_squares<kFetch>(data, n, mult1, mult2, lanes);
  }
  HalfCodecs::with(grad.codec, [&](auto half) {
    using C = decltype(half);
    if (C::kInPlace) {
      const auto* data = static_cast<const C*>(grad.data) + begin;
      return add_squares<kFetch>(data, n, mult1, mult2, lanes);
    }
    alignas(64) float buffer[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t m = min(kBlock, n - i);
      const float* in = as_float<kFetch>(grad.data, C::kCodec, begin + i, m, buffer);
      add_squares<Fetch::kNone>(in, m, mult1, mult2, lanes);
    }
  });
}

// Sum over the chunk of (grad * mult1 * mult2)^2. Lanes past the last element hold zero, and adding
// zero is exact. So a short chunk needs a lane for each element, rounded up to a power of two.
float sum_squares(const Grad& grad, int64_t begin, int64_t n, float mult1, float mult2) {
  alignas(64) float lanes[kLanes];
  int width = 8;
  while (width < kLanes && width < n) width *= 2;
  for (int l = 0; l < width; ++l) lanes[l] = 0.0f;
  if (n == kChunk) {  // most of the prefetched lines belong to this chunk
    add_squares_of<Fetch::kFar>(grad, begin, n, mult1, mult2, lanes);
  } else {
    add_squares_of<Fetch::kNear>(grad, begin, n, mult1, mult2, lanes);
  }
  return tree_sum(lanes, width);
}

// max |grad * mult|. Read as integers, magnitudes of floats keep their order, with NaN above inf.
float max_magnitude(const Grad& grad, int64_t begin, int64_t n, float mult) {
  alignas(64) float buffer[kBlock];
  int32_t largest = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = min(kBlock, n - i);
    const float* g = as_float<Fetch::kNear>(grad.data, grad.codec, begin + i, m, buffer);
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < m; ++j) {
      const int32_t magnitude = static_cast<int32_t>(bits_of(g[j] * mult) & 0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return float_of(static_cast<uint32_t>(largest));
}

struct GradChunk {
  const Grad& grad;
  int64_t begin, n;

  GradChunk(const PlanView& plan, const Chunk& chunk)
      : grad(plan.grads[chunk.row]),
        begin(chunk.index * kChunk),
        n(min(kChunk, plan.rows[chunk.row].numel - begin)) {}
};

// The partial of a chunk whose sum is out of range.
__attribute__((noinline)) Partial rescued(const GradChunk& c, float inv_scale) {
  if (!c.grad.present) return {0.0f, 0};
  const float largest = max_magnitude(c.grad, c.begin, c.n, inv_scale);
  if (largest == 0.0f || largest - largest != 0.0f) return {largest, 0};
  const Rescale rescale = rescale_for(largest);
  return {sum_squares(c.grad, c.begin, c.n, inv_scale, rescale.scale), rescale.exponent};
}

void add(const Addend& addend, uint64_t* words) {
  words[addend.at] += addend.low;
  words[addend.at + 1] += addend.high;
}

void add_partial(const PlanView& plan, const StepRecord& step, int64_t c, float sum,
                 float inv_scale, uint64_t* words) {
  const bool counted = step.counts(plan.rows[plan.chunks[c].row]);
  add(in_range(sum) && counted
          ? addend_of_normal({sum, 0})
          : addend_of(rescued(GradChunk(plan, plan.chunks[c]), inv_scale), counted),
      words);
}

// Each partial is added one chunk later. The sum decides to which words it is added, and the loads
// of the next chunk would wait for those stores.
void reduce_squares(const PlanView& plan, const StepRecord& step, int64_t first, int64_t last,
                    float inv_scale, uint64_t* words) {
  float before = 0.0f;
  for (int64_t c = first; c < last; ++c) {
    const GradChunk chunk(plan, plan.chunks[c]);
    float sum = 0.0f;
    if (chunk.grad.present) sum = sum_squares(chunk.grad, chunk.begin, chunk.n, inv_scale, 1.0f);
    if (c > first) add_partial(plan, step, c - 1, before, inv_scale, words);
    before = sum;
  }
  if (last > first) add_partial(plan, step, last - 1, before, inv_scale, words);
}

void reduce_largest(const PlanView& plan, const StepRecord&, int64_t first, int64_t last,
                    float inv_scale, uint64_t* words) {
  for (int64_t c = first; c < last; ++c) {
    const GradChunk chunk(plan, plan.chunks[c]);
    if (!chunk.grad.present) continue;
    const uint64_t largest = bits_of(max_magnitude(chunk.grad, chunk.begin, chunk.n, inv_scale));
    words[kLargest] = combined(kLargest, words[kLargest], largest);
  }
}

}  // namespace
}  // namespace fusedopt
