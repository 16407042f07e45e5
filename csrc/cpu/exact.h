// norm_bits="exact": adds the squares of all elements of a chunk to the words of this thread,
// exactly.
//
// The square of an fp32 number has 48 bits: exact in fp64. Adding a power of two to it and
// subtracting that again leaves its high bits, as a multiple of a unit; the rest is its low bits.
// High and low bits are added up apart. All terms of a sum are multiples of one number, and the sum
// is below 2^53 of them. So no addition rounds, and the order of elements leaves no trace.
//
// That holds for elements of kWindow neighbouring exponents. In most blocks there are no others but
// zeros; the elements below the window are left to another.
//
// Included by kernels.cpp alone, which is compiled once per instruction set; hence the anonymous
// namespace: nothing in here may be shared between the copies.
#pragma once

#include "reduce.h"

namespace fusedopt {
namespace {

// For a block of kBlock elements whose squares are below 2^limit:
constexpr int kHighUnit = -44;  // high bits are multiples of 2^(limit + kHighUnit)
constexpr int kLowUnit = -89;   // low bits are multiples of 2^(limit + kLowUnit)
constexpr int kWindow = 21;     // exponents
static_assert(kBlock <= 1 << (53 + kHighUnit), "a sum of high bits has 53 bits");
static_assert(kBlock <= 1 << (54 + kLowUnit - kHighUnit), "low bits are half a high unit at most");
static_assert(2 * (kWindow - 1) + 48 + kLowUnit <= 0, "a square has 48 bits");

constexpr int32_t kMagnitude = 0x7fffffff, kInf = 0x7f800000;

int32_t magnitude_of(float x) { return static_cast<int32_t>(bits_of(x)) & kMagnitude; }

// Magnitudes as integers: of the largest element, and of the smallest one that is not zero.
struct Extent {
  int32_t largest, smallest;
};

// x = g * mult; g may be x.
Extent scale(const float* g, int64_t n, float mult, float* x) {
  int32_t largest = 0;
  uint32_t smallest = ~0u;  // less one: zeros are above all others
#pragma omp simd reduction(max : largest) reduction(min : smallest)
  for (int64_t i = 0; i < n; ++i) {
    x[i] = g[i] * mult;
    const int32_t magnitude = magnitude_of(x[i]);
    largest = magnitude > largest ? magnitude : largest;
    const uint32_t less_one = static_cast<uint32_t>(magnitude) - 1u;
    smallest = less_one < smallest ? less_one : smallest;
  }
  return {largest, static_cast<int32_t>(smallest + 1u)};
}

// digits += value * 2^(bit + kLowest)
void add_bits(uint64_t value, int bit, uint64_t* digits) {
  const uint64_t low = (value & 0xffffffffu) << (bit & 31);
  const uint64_t high = (value >> 32) << (bit & 31);
  uint64_t* at = digits + (bit >> 5);
  at[0] += low & 0xffffffffu;
  at[1] += (low >> 32) + (high & 0xffffffffu);
  at[2] += high >> 32;
}

// The exponent field of the largest element of a window; denormals count as the smallest normals.
int top_of(int32_t largest) {
  const int top = largest >> 23;
  return top < 1 ? 1 : top;
}

// Adds squares of elements that all lie in the window below `top`, or are zero.
void add_window(const float* x, int64_t n, int top, uint64_t* digits) {
  const int limit = 2 * (top - 126);
  const double split = power_of_two(limit + kHighUnit + 52);
  double high = 0.0, low = 0.0;
#pragma omp simd reduction(+ : high, low)
  for (int64_t i = 0; i < n; ++i) {
    const double wide = static_cast<double>(x[i]);
    const double square = wide * wide;
    const double part = (square + split) - split;
    high += part;
    low += square - part;
  }
  // Rounded to nearest, so the low bits may be negative.
  constexpr int kBits = kHighUnit - kLowUnit;
  const auto highs = static_cast<int64_t>(high * power_of_two(-limit - kHighUnit));
  const auto lows = static_cast<int64_t>(low * power_of_two(-limit - kLowUnit));
  const int bit = limit + kLowUnit - kLowest;
  add_bits(static_cast<uint64_t>(lows & ((int64_t{1} << kBits) - 1)), bit, digits);
  add_bits(static_cast<uint64_t>(highs + (lows >> kBits)), bit + kBits, digits);
}

// Leaves in x what lies below `lowest`, and moves the rest to `window`. Returns what is then the
// largest magnitude in x.
int32_t take_window(float* x, int64_t n, int32_t lowest, float* window) {
  int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = magnitude_of(x[i]);
    const bool inside = magnitude >= lowest;
    window[i] = inside ? x[i] : 0.0f;
    x[i] = inside ? 0.0f : x[i];
    largest = !inside && magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Adds the squares of a block, and destroys it.
void add_block(float* x, int64_t n, Extent extent, uint64_t* digits) {
  while (extent.largest > 0) {
    const int top = top_of(extent.largest);
    const int32_t lowest = top <= kWindow ? 0 : (top - kWindow + 1) << 23;
    if (extent.smallest >= lowest) return add_window(x, n, top, digits);
    alignas(64) float window[kBlock];
    extent.largest = take_window(x, n, lowest, window);
    add_window(window, n, top, digits);
  }
}

// The digits of the chunk's sum of squares; returns its largest magnitude.
template <Fetch kFetch>
int32_t add_exactly(const GradChunk& c, float inv_scale, uint64_t* digits) {
  alignas(64) float x[kBlock];
  int32_t largest = 0;
  for (int64_t i = 0; i < c.n; i += kBlock) {
    const int64_t n = min(kBlock, c.n - i);
    const float* g = as_float<kFetch>(c.grad.data, c.grad.codec, c.begin + i, n, x);
    if (c.grad.codec == Codec::kFloat32) prefetch<kFetch>(g, n);
    const Extent extent = scale(g, n, inv_scale, x);
    largest = extent.largest > largest ? extent.largest : largest;
    if (largest < kInf) add_block(x, n, extent, digits);
  }
  return largest;
}

// A chunk adds to each word as little as a partial does: less than 2^32.
void reduce_exactly(const PlanView& plan, const StepRecord& step, int64_t first, int64_t last,
                    float inv_scale, uint64_t* words) {
  for (int64_t c = first; c < last; ++c) {
    const GradChunk chunk(plan, plan.chunks[c]);
    if (!chunk.grad.present) continue;
    uint64_t digits[kDigits] = {};
    const int32_t largest = chunk.n == kChunk ? add_exactly<Fetch::kFar>(chunk, inv_scale, digits)
                                              : add_exactly<Fetch::kNear>(chunk, inv_scale, digits);
    if (largest >= kInf) {
      add(addend_of({float_of(static_cast<uint32_t>(largest)), 0}, false), words);
    } else if (step.counts(plan.rows[plan.chunks[c].row])) {
      uint64_t carry = 0;
      for (int d = 0; d < kDigits; ++d) {
        carry += digits[d];
        words[d] += carry & 0xffffffffu;
        carry >>= 32;
      }
    }
  }
}

}  // namespace
}  // namespace fusedopt
