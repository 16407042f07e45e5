// norm_bits="exact": a warp adds up the squares of a chunk's elements as integers.
//
// An fp32 number is an integer of 24 bits times a power of two. In a window of 32 exponents,
// squares are integers of 48 bits, shifted by 0, 2, ... 62: the sum over a chunk has 123 bits at
// most. Most chunks have all their elements in one window, at the exponents where the chunk before
// had its own. The elements below the window are left to another look at the chunk.
#pragma once

#include "reduce.cuh"

namespace fusedopt {

constexpr int kWindow = 32;         // exponents
constexpr int kHighestField = 254;  // of the exponents of finite numbers
constexpr int kMargin = 4;          // exponents that a chunk may lie above the one before
constexpr uint32_t kInf = 0x7f800000u;

struct Wide {
  uint64_t low, high;
};

FUSEDOPT_DEVICE void add(Wide& sum, const Wide& x) {
  sum.low += x.low;
  sum.high += x.high + (sum.low < x.low ? 1 : 0);
}

// Bits offset, offset + 1, ... offset + 31 of x.
FUSEDOPT_DEVICE uint32_t digit_of(const Wide& x, int offset) {
  if (offset <= -32 || offset >= 128) return 0;
  if (offset < 0) return static_cast<uint32_t>(x.low << -offset);
  if (offset >= 64) return static_cast<uint32_t>(x.high >> (offset - 64));
  return static_cast<uint32_t>(x.low >> offset | (x.high << 1) << (63 - offset));
}

// The exponent field of a magnitude; denormals have that of the smallest normals.
FUSEDOPT_DEVICE int field_of(uint32_t magnitude) {
  return magnitude < 0x800000u ? 1 : static_cast<int>(magnitude >> 23);
}

// The number of the lowest bit of a window's sum, counted from 2^kLowest; below zero there are
// none.
FUSEDOPT_DEVICE int lowest_bit_of(int top) { return 2 * (top - (kWindow - 1) - 150) - kLowest; }

// The same in every thread of the warp. Magnitudes are those of grad * inv_scale.
struct Squares {
  Wide sum;          // of the squares in the window whose highest exponent is `top`
  uint32_t largest;  // magnitude of all elements
  uint32_t below;    // the largest magnitude below the window
};

FUSEDOPT_DEVICE Squares squares(const ChunkOfGrads& c, int t, float inv_scale, int top) {
  Squares s = {};
  for_each_element(c, t, [&](int, float grad) {
    const uint32_t magnitude = bits_of(grad * inv_scale) & 0x7fffffffu;
    const uint32_t hidden_bit = magnitude < 0x800000u ? 0 : 0x800000u;
    const uint64_t whole = (magnitude & 0x7fffffu) | hidden_bit;
    const uint64_t square = whole * whole;
    const int down = top - field_of(magnitude);
    s.largest = magnitude > s.largest ? magnitude : s.largest;
    if (down >= 0 && down < kWindow) {
      const int shift = 2 * (kWindow - 1 - down);
      add(s.sum, {square << shift, (square >> 1) >> (63 - shift)});
    } else if (down > 0) {
      s.below = magnitude > s.below ? magnitude : s.below;
    }
  });
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    add(s.sum, {__shfl_xor_sync(kAllThreads, s.sum.low, distance),
                __shfl_xor_sync(kAllThreads, s.sum.high, distance)});
  }
  s.largest = largest_of_warp(s.largest);
  s.below = largest_of_warp(s.below);
  return s;
}

// Adds a chunk to the words of the block. A digit gets less than 2^32 from each of three windows at
// most. `guess` is the highest exponent to look for first, and is left for the next chunk.
FUSEDOPT_DEVICE void add_exactly(const ChunkOfGrads& c, int t, bool counted, float inv_scale,
                                 int& guess, Word* words) {
  int top = guess;
  for (bool first = true;; first = false) {
    const Squares s = squares(c, t, inv_scale, top);
    if (s.largest >= kInf) {
      return add_word(words, t, t == (s.largest > kInf ? kNanChunks : kInfChunks) ? 1 : 0);
    }
    const int highest = field_of(s.largest);
    if (first && highest > top) {
      top = highest;
      continue;
    }
    if (s.largest != 0) {
      guess = highest + kMargin < kHighestField ? highest + kMargin : kHighestField;
    }
    if (counted) add_word(words, t, digit_of(s.sum, 32 * t - lowest_bit_of(top)));
    if (s.below == 0) return;
    top = field_of(s.below);
  }
}

// All chunks of this warp.
FUSEDOPT_DEVICE void add_chunks_exactly(const DeviceStep& step, int t, float inv_scale,
                                        Word* words) {
  const PlanView& plan = step.plan;
  int guess = 127;
  const int n_chunks = static_cast<int>(plan.n_chunks), by = static_cast<int>(gridDim.x) * kWarps;
  int c = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  for (; c < n_chunks; c += by) {
    const ChunkOfGrads grads = chunk_of_grads(plan, plan.chunks[c]);
    const bool counted = step.record.counts(plan.rows[plan.chunks[c].row]);
    add_exactly(grads, t, counted, inv_scale, guess, words);
  }
}

}  // namespace fusedopt
