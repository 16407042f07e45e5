// The few definitions that differ between a C++ and a CUDA compiler.
//
// Everything in csrc/*.h is compiled several times with different instruction sets and linked into
// one library. Of a function that is merely `inline` the linker keeps one copy, which might hold
// instructions that the running CPU lacks. So FUSEDOPT_FN forces inlining.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDOPT_MEMBER __host__ __device__ __forceinline__
#define FUSEDOPT_FN static FUSEDOPT_MEMBER
#else
#define FUSEDOPT_MEMBER inline __attribute__((always_inline))
#define FUSEDOPT_FN static FUSEDOPT_MEMBER
#endif

namespace fusedopt {

// Multiply-add with one rounding, written out because contraction is off: the compiler must never
// choose where a rounding happens (numeric contract).
FUSEDOPT_FN float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

FUSEDOPT_FN float sqrt(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FUSEDOPT_FN double sqrt(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

FUSEDOPT_FN float div(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

FUSEDOPT_FN uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

FUSEDOPT_FN float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// 2^exponent, which must be a normal double.
FUSEDOPT_FN double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

}  // namespace fusedopt
