// Conversion between any codec in memory and the fp32 of the loops.
//
// Included by kernels.cpp alone, which is compiled once per instruction set; hence the anonymous
// namespace: nothing in here may be shared between the copies.
#pragma once

#include <type_traits>

#include "../records.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fusedopt {
namespace {

constexpr int64_t kBlock = 512;  // elements converted at a time; stays in L1

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kSlice = 256;  // fp32 elements between two rounds of prefetching

// Streams jump to a new address at every tensor and stride of chunks, and the hardware prefetchers
// need a while to follow. With few streams they never have enough cache lines in flight.
enum class Fetch {
  kNone,  // the data is in L1
  kNear,  // to L1
  kFar,   // to L2, from further ahead: one stream needs more lines in flight than L1 can await
};

// Prefetches memory ahead of the n elements at `at`. That memory may be past the tensor's end, so
// prefetching does not pay for tensors of a slice or less.
template <Fetch kFetch, class T>
void prefetch(const T* at, int64_t n) {
  if (kFetch == Fetch::kNone) return;
  constexpr bool kFar = kFetch == Fetch::kFar;
  constexpr int64_t kAhead = kFar ? 8192 : 2048;  // bytes
  constexpr int64_t kLine = 64 / sizeof(T);
  const T* ahead = at + kAhead / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(ahead + i, 0, kFar ? 2 : 3);
}

FUSEDOPT_FN float widened(float x) { return x; }

template <class C>
FUSEDOPT_FN float widened(C x) {
  return C::widened(x.bits);
}

// Convert eight elements at a time, if the codec has instructions. Return where they stopped.
template <class C>
int64_t widen_eights(const uint16_t*, int64_t, float*) {
  return 0;
}

template <class C>
int64_t narrow_eights(const float*, int64_t, uint16_t*) {
  return 0;
}

#if defined(__F16C__)
template <>
int64_t widen_eights<Float16>(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  return i;
}

template <>
int64_t narrow_eights<Float16>(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
  return i;
}
#endif

template <Fetch kFetch>
void widen(const uint16_t* in, Codec codec, int64_t n, float* out) {
  prefetch<kFetch>(in, n);
  HalfCodecs::with(codec, [=](auto half) {
    using C = decltype(half);
    const int64_t first = widen_eights<C>(in, n, out);
#pragma omp simd
    for (int64_t i = first; i < n; ++i) out[i] = C::widened(in[i]);
  });
}

void narrow(const float* in, Codec codec, int64_t n, uint16_t* out) {
  HalfCodecs::with(codec, [=](auto half) {
    using C = decltype(half);
    const int64_t first = narrow_eights<C>(in, n, out);
#pragma omp simd
    for (int64_t i = first; i < n; ++i) out[i] = C::narrowed(in[i]);
  });
}

// Of a bf16 state; element: the place of the first one in its tensor. Dithers are counted in 32
// bits here and below: from a count in 64 bits compilers would make two vectors.
void narrow_dithered(const float* in, uint32_t seed, uint32_t element, int64_t n, uint16_t* out) {
  const uint32_t first = dither(seed, element);
  const int count = static_cast<int>(n);
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    out[i] = Dithered::narrowed(in[i], dither(first, static_cast<uint32_t>(i)));
  }
}

// Log8 states from the first element of a block on.
template <class C>
void widen_log8(const uint8_t* in, const uint8_t* scales, int64_t n, float* out) {
  prefetch<Fetch::kNear>(in, n);
  for (int64_t at = 0; at < n; at += kScaleBlock) {
    const float down = C::down(scales[at / kScaleBlock]);
    const int64_t last = min(at + kScaleBlock, n);
#pragma omp simd
    for (int64_t i = at; i < last; ++i) out[i] = C::widened(in[i], down);
  }
}

// One block, or what a tensor has of its last one. A constant count needs no loop for a rest.
template <class C, class Count>
void narrow_log8_block(const float* in, uint32_t first, Count n, uint8_t* out, uint8_t* scale) {
  const int count = n;
  int32_t largest = 0;
  for (int i = 0; i < count; ++i) {  // with a pragma, gcc keeps the largest in memory
    const int32_t magnitude = C::magnitude(in[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  const uint32_t e = C::scale_of(largest);
  const float up = C::up(e);
  *scale = static_cast<uint8_t>(e);
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const uint32_t t = dither(first, static_cast<uint32_t>(i));
    out[i] = static_cast<uint8_t>(C::narrowed(in[i], up, t));
  }
}

template <class C>
void narrow_log8(const float* in, uint32_t seed, uint32_t element, int64_t n, uint8_t* out,
                 uint8_t* scales) {
  for (int64_t at = 0; at < n; at += kScaleBlock) {
    const uint32_t first = dither(seed, element + static_cast<uint32_t>(at));
    uint8_t* scale = scales + at / kScaleBlock;
    if (n - at >= kScaleBlock) {
      narrow_log8_block<C>(in + at, first, std::integral_constant<int, kScaleBlock>(), out + at,
                           scale);
    } else {
      narrow_log8_block<C>(in + at, first, static_cast<int>(n - at), out + at, scale);
    }
  }
}

// Masters that lie beside a half param.
template <class Param>
void join16(const uint16_t* param, const int16_t* remainder, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = Remainder16::joined(Param{param[i]}, remainder[i]);
}

template <class Param>
void split16(const float* in, int64_t n, uint16_t* param, int16_t* remainder) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Param p;
    remainder[i] = Remainder16::split(in[i], p);
    param[i] = p.bits;
  }
}

void join8(const uint16_t* param, const int8_t* remainder, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = Remainder8::joined(BFloat16{param[i]}, remainder[i]);
}

void split8(const float* in, uint32_t seed, uint32_t element, int64_t n, uint16_t* param,
            int8_t* remainder) {
  const uint32_t first = dither(seed, element);
  const int count = static_cast<int>(n);
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    BFloat16 p;
    remainder[i] = Remainder8::split(in[i], dither(first, static_cast<uint32_t>(i)), p);
    param[i] = p.bits;
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
