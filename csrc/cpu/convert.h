// Any codec in memory, fp32 in the loops.
//
// Included by kernels.cpp alone, which is compiled once per instruction set; hence the anonymous
// namespace: nothing in here may be shared between the copies.
#pragma once

#include "../records.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fusedopt {
namespace {

constexpr int64_t kBlock = 512;  // elements converted at a time; stays in L1

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kSlice = 256;  // fp32 elements between two rounds of prefetching

// The streams begin anew at every tensor and stride of chunks, and the hardware's prefetchers need
// a while to follow; with few streams they never have enough lines on the way.
enum class Fetch {
  kNone,  // it is in L1
  kNear,  // to L1
  kFar,   // to L2, and from further off: one stream needs more lines on the way than L1 waits for
};

// Fetches what lies ahead of the n elements at `at`, which may be past the end of the tensor, so
// that tensors of no more than a slice are better off without.
template <Fetch kFetch, class T>
void prefetch(const T* at, int64_t n) {
  if (kFetch == Fetch::kNone) return;
  constexpr bool kFar = kFetch == Fetch::kFar;
  constexpr int64_t kAhead = kFar ? 8192 : 2048;  // bytes
  constexpr int64_t kLine = 64 / sizeof(T);
  const T* ahead = at + kAhead / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(ahead + i, 0, kFar ? 2 : 3);
}

// Widened by a shift, which loops get from the compiler where they read; the instruction that
// widens fp16 they do not.
struct BFloat16 {
  uint16_t bits;
};

FUSEDOPT_FN float widened(float x) { return x; }
FUSEDOPT_FN float widened(BFloat16 x) { return bfloat16_to_float(x.bits); }

void widen_float16(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) out[j] = float16_to_float(in[j]);
}

void narrow_float16(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) out[j] = float_to_float16(in[j]);
}

void widen_bfloat16(const uint16_t* in, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = bfloat16_to_float(in[i]);
}

void narrow_bfloat16(const float* in, int64_t n, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat16(in[i]);
}

template <Fetch kFetch>
void widen(const uint16_t* in, Codec codec, int64_t n, float* out) {
  prefetch<kFetch>(in, n);
  if (codec == Codec::kFloat16) {
    widen_float16(in, n, out);
  } else {
    widen_bfloat16(in, n, out);
  }
}

void narrow(const float* in, Codec codec, int64_t n, uint16_t* out) {
  if (codec == Codec::kFloat16) {
    narrow_float16(in, n, out);
  } else {
    narrow_bfloat16(in, n, out);
  }
}

// fp32 data is used where it lies; anything else is widened into buffer.
template <Fetch kFetch>
const float* as_float(const void* data, Codec codec, int64_t begin, int64_t n, float* buffer) {
  if (codec == Codec::kFloat32) return static_cast<const float*>(data) + begin;
  widen<kFetch>(static_cast<const uint16_t*>(data) + begin, codec, n, buffer);
  return buffer;
}

}  // namespace
}  // namespace fusedopt
