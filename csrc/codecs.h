// How the elements of a stream lie in memory: every codec's way to fp32 registers and back.
// fp16 and bf16 are bit patterns: exact widening, round-to-nearest-even narrowing. On a CPU integer
// arithmetic only, so that the result does not depend on the instruction set or on the process's
// denormal flags; branch-free, so that loops over it vectorise. CUDA's conversions give the same
// values, and other payloads to NaNs.
#pragma once

#include "platform.h"

namespace fusedopt {

enum class Codec : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

FUSEDOPT_FN int64_t bytes_of(Codec codec) { return codec == Codec::kFloat32 ? 4 : 2; }

FUSEDOPT_FN float bfloat16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

FUSEDOPT_FN uint16_t float_to_bfloat16(float x) {
  const uint32_t f = bits_of(x);
  const uint32_t rounded = (f + 0x7fffu + ((f >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (f >> 16) | 0x40u;
  return static_cast<uint16_t>((f & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

FUSEDOPT_FN float float16_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t shifted = magnitude << 13;
  const uint32_t normal = shifted + (112u << 23);  // exponent bias 15 -> 127
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t special = shifted | 0x7f800000u | (magnitude > 0x7c00u ? 0x400000u : 0u);
  uint32_t bits = magnitude < 0x400u ? subnormal : normal;
  bits = magnitude >= 0x7c00u ? special : bits;
  return float_of(bits | (static_cast<uint32_t>(h & 0x8000u) << 16));
#endif
}

FUSEDOPT_FN uint16_t float_to_float16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
#else
  const uint32_t f = bits_of(x);
  const uint32_t a = f & 0x7fffffffu;
  // Normal range: drop 13 bits, ties to even; what rounds past 65504 carries into infinity.
  uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  normal = a >= 0x47800000u ? 0x7c00u : normal;
  // Below 2^-14 the spacing is 2^-24, which is the spacing of fp32 in [0.5, 1): adding 0.5 rounds.
  const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  const uint32_t quiet_nan = 0x7e00u | ((a >> 13) & 0x3ffu);
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a > 0x7f800000u ? quiet_nan : h;
  return static_cast<uint16_t>(h | ((f >> 16) & 0x8000u));
#endif
}

// Of the codecs that are 16 bits wide.
FUSEDOPT_FN float widened(uint16_t bits, Codec codec) {
  return codec == Codec::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

FUSEDOPT_FN uint16_t narrowed(float x, Codec codec) {
  return codec == Codec::kFloat16 ? float_to_float16(x) : float_to_bfloat16(x);
}

}  // namespace fusedopt
