// How the elements of a stream are stored in memory: each codec's conversion to fp32 and back.
//
// A 16-bit codec is declared here, and nowhere else in C++. It is a struct that holds one element
// as stored in memory, with
//   kCodec      its number in rows and gradients
//   kName       the name of that number in Python
//   kTypeCode   DLPack's code of such a dtype
//   kInPlace    whether read-only CPU loops convert elements straight from memory: compilers
//               vectorise the shift of bf16, but find no instruction for the conversion of fp16
//   widened()   exact
//   narrowed()  rounded to nearest even
// On a CPU the result does not depend on the instruction set or on the process's denormal flags:
// arithmetic is on integers, or on floats with a normal result. Nothing branches, so that loops
// vectorise. CUDA's conversions give the same values, but other payloads in NaNs.
#pragma once

#include "platform.h"

namespace fusedopt {

enum class Codec : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

FUSEDOPT_FN int64_t bytes_of(Codec codec) { return codec == Codec::kFloat32 ? 4 : 2; }

struct Float16 {
  uint16_t bits;

  static constexpr Codec kCodec = Codec::kFloat16;
  static constexpr const char* kName = "FLOAT16";
  static constexpr int kTypeCode = 2;
  static constexpr bool kInPlace = false;

  FUSEDOPT_FN float widened(uint16_t h) {
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

  FUSEDOPT_FN uint16_t narrowed(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#else
    const uint32_t f = bits_of(x);
    const uint32_t a = f & 0x7fffffffu;
    // Normal range: drop 13 bits, ties to even; values that round past 65504 carry into infinity.
    uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
    normal = a >= 0x47800000u ? 0x7c00u : normal;
    // Below 2^-14 the spacing of fp16 is 2^-24, as is fp32's in [0.5, 1): adding 0.5 rounds.
    const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
    const uint32_t quiet_nan = 0x7e00u | ((a >> 13) & 0x3ffu);
    uint32_t h = a < 0x38800000u ? subnormal : normal;
    h = a > 0x7f800000u ? quiet_nan : h;
    return static_cast<uint16_t>(h | ((f >> 16) & 0x8000u));
#endif
  }
};

struct BFloat16 {
  uint16_t bits;

  static constexpr Codec kCodec = Codec::kBFloat16;
  static constexpr const char* kName = "BFLOAT16";
  static constexpr int kTypeCode = 4;
  static constexpr bool kInPlace = true;

  FUSEDOPT_FN float widened(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

  FUSEDOPT_FN uint16_t narrowed(float x) {
    const uint32_t f = bits_of(x);
    const uint32_t rounded = (f + 0x7fffu + ((f >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (f >> 16) | 0x40u;
    return static_cast<uint16_t>((f & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
  }
};

template <class C, class... Others>
struct CodecList {
  // Calls visit(C()) for the codec with this number, which must be in the list.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
  template <class Visit>
  FUSEDOPT_FN auto with(Codec codec, const Visit& visit) {
    if constexpr (sizeof...(Others) == 0) {
      return visit(C());
    } else {
      return codec == C::kCodec ? visit(C()) : CodecList<Others...>::with(codec, visit);
    }
  }

  template <class Visit>
  FUSEDOPT_FN void for_each(const Visit& visit) {
    visit(C()), (visit(Others()), ...);
  }
};

using HalfCodecs = CodecList<Float16, BFloat16>;

FUSEDOPT_FN float widened(uint16_t bits, Codec codec) {
  return HalfCodecs::with(codec, [=](auto half) { return decltype(half)::widened(bits); });
}

FUSEDOPT_FN uint16_t narrowed(float x, Codec codec) {
  return HalfCodecs::with(codec, [=](auto half) { return decltype(half)::narrowed(x); });
}

}  // namespace fusedopt
