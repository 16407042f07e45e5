// How the elements of a stream are stored in memory: each codec's conversion to fp32 and back.
//
// Codecs of params and gradients round to nearest even. A codec of 16 bits is a struct that holds
// one element as stored in memory, with
//   kCodec      its number in rows and gradients
//   kTypeCode   DLPack's code of such a dtype
//   kInPlace    whether read-only CPU loops convert elements straight from memory: compilers
//               vectorise the shift of bf16, but find no instruction for the conversion of fp16
//   widened()   exact
//   narrowed()  rounded to nearest even
// Codecs of states and masters come after them, below. All are declared here, and nowhere else in
// C++.
//
// On a CPU the result does not depend on the instruction set or on the process's denormal flags:
// arithmetic is on integers, or on floats with a normal result. Nothing branches, so that loops
// vectorise. CUDA's conversions give the same values, but other payloads in NaNs.
#pragma once

#include "platform.h"

namespace fusedopt {

enum class Codec : int32_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kDithered = 3,      // bf16, rounded by the dither
  kLog8 = 4,          // 8 bits with sign, and a scale for each block
  kLog8Positive = 5,  // 8 bits without sign, likewise
  kRemainder16 = 6,   // of a master: its 16 bits beside the fp16 or bf16 param
  kRemainder8 = 7,    // of a master: its 8 bits beside the bf16 param
};

FUSEDOPT_FN int64_t bytes_of(Codec codec) {
  const bool is_byte =
      codec == Codec::kLog8 || codec == Codec::kLog8Positive || codec == Codec::kRemainder8;
  return codec == Codec::kFloat32 ? 4 : is_byte ? 1 : 2;
}

// A dithered codec adds this number to the bits that it drops, and then truncates. So the mean over
// elements and steps is right, where rounding to nearest would leave a slow average where it is.
// The numbers are a lattice in (element, step) and need no generator and no memory. The constants
// are those of the R2 sequence, M. Roberts, "The unreasonable effectiveness of quasirandom
// sequences".
constexpr uint32_t kDitherOfElement = 0xc13fa9a9u;

FUSEDOPT_FN uint32_t dither(uint32_t seed, uint32_t element) {
  return element * kDitherOfElement + seed;
}

// For a stream of a tensor. first: the place of the shard's first element in the whole tensor, mod
// 2^32; step: the number of the step that is being applied; stream: 0 for the param or its master,
// 1 + k for state k.
FUSEDOPT_FN uint32_t dither_seed(uint32_t first, float step, uint32_t stream) {
  return first * kDitherOfElement + static_cast<uint32_t>(step) * 0x91e10da5u +
         stream * 0x68e31da5u;
}

constexpr uint32_t kToNearest = 0x80000000u;  // in place of a dither: half of what is dropped

FUSEDOPT_FN bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

struct Float16 {
  uint16_t bits;

  static constexpr Codec kCodec = Codec::kFloat16;
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

// A state in bf16. A finite value stays finite: it is truncated where the dither would carry it
// into infinity.
struct Dithered {
  FUSEDOPT_FN float widened(uint16_t h) { return BFloat16::widened(h); }

  FUSEDOPT_FN uint16_t narrowed(float x, uint32_t dither) {
    const uint32_t f = bits_of(x);
    const uint32_t down = f >> 16;
    const uint32_t rounded = (f + (dither >> 16)) >> 16;
    const uint32_t finite = (rounded & 0x7fffu) == 0x7f80u ? down : rounded;
    return static_cast<uint16_t>(is_nan(f) ? down | 0x40u : finite);
  }
};

constexpr int kScaleBlock = 128;  // elements of a log8 state that share a scale

// A state in 8 bits: sign (if kSigned) and a magnitude of twelve cells an octave, linear near zero:
// the float 2^-kOctaves + x, whose bits are the logarithm, cut to cells of 2^21 / 3. The scale of a
// block is one byte e: the block is divided by 2^(e - 127), so that its largest magnitude is near
// one. Reads and writes denormals.
//
//   zero is code 0, and a positive value without sign never gets it: a second moment of zero beside
//   a first one of more would be divided by;
//   non-finite values have a code of their own and no part in the scale, so they spoil only
//   themselves: with sign NaN; without sign inf, which stops the update, as in fp32;
//   codes end at kLast, where a block is larger than the largest scale.
template <bool kSigned>
struct Log8 {
  static constexpr int kOctaves = kSigned ? 9 : 20;
  static constexpr uint32_t kZero = static_cast<uint32_t>(127 - kOctaves) << 23;  // 2^-kOctaves
  static constexpr uint32_t kLast = kSigned ? 127 : 254;
  static constexpr uint32_t kNonFinite = kSigned ? 0x80 : 0xff;

  // What counts for the scale: bits of the magnitude, which order as integers do.
  FUSEDOPT_FN int32_t magnitude(float x) {
    const auto a = static_cast<int32_t>(bits_of(x) & 0x7fffffffu);
    return a & (a - 0x7f800000) >> 31;  // zero where it is not finite, without a choice
  }

  FUSEDOPT_FN uint32_t scale_of(int32_t largest_magnitude) {
    const uint32_t e = (static_cast<uint32_t>(largest_magnitude) + 0xfffffu) >> 23;
    return e < 7 ? 7 : e > 253 ? 253 : e;
  }

  FUSEDOPT_FN float up(uint32_t scale) { return float_of((254 - scale) << 23); }  // 2^(127 - e)
  FUSEDOPT_FN float down(uint32_t scale) { return float_of(scale << 23); }        // 2^(e - 127)

  FUSEDOPT_FN uint32_t narrowed(float x, float up, uint32_t dither) {
    const uint32_t bits = bits_of(x);
    const uint32_t a = bits & 0x7fffffffu;
    const uint32_t thirds = bits_of(fma(float_of(a), up, float_of(kZero))) - kZero;
    const uint32_t n = thirds + (thirds << 1);
    uint32_t code = (n + (dither >> 11)) >> 21;
    code = code < kLast ? code : kLast;
    if (kSigned) {
      // Below half a cell a moment decays to zero, although it is dithered elsewhere: a param whose
      // gradient stays away would move for good, or jump where a code comes back.
      code = n < (1u << 20) ? 0 : code;
      code |= code > 0 ? bits >> 24 & 0x80u : 0;
    } else {
      const uint32_t least = a < 1 ? a : 1;
      code = code > least ? code : least;
    }
    // A second moment below zero is none, and is treated as NaN.
    const bool is_none = a >= 0x7f800000u || (!kSigned && bits > 0x80000000u);
    return is_none ? kNonFinite : code;
  }

  FUSEDOPT_FN float widened(uint32_t code, float down) {
    const uint32_t cell = kSigned ? code & 0x7fu : code;
    const uint32_t bits = kZero + cell * 699050u + (cell * 683u >> 10);  // floor(cell * 2^21 / 3)
    const float x = (float_of(bits) - float_of(kZero)) * down;
    if (kSigned) {
      const uint32_t with_sign = bits_of(x) | (code & 0x80u) << 24;
      return float_of(code == kNonFinite ? 0x7fc00000u : with_sign);
    }
    return code == kNonFinite ? float_of(0x7f800000u) : x;
  }
};

// A master as the half param and a remainder. Whatever is written to the param, the two are a value
// within a step of it, and never NaN unless it is.
//
// In bf16 the master's bits are P * 2^16 + remainder, for all fp32 values but NaN. Ties round away
// from zero, since an even P would need 65,537 remainders.
struct Remainder16 {
  FUSEDOPT_FN float joined(BFloat16 param, int16_t remainder) {
    const uint32_t high = static_cast<uint32_t>(param.bits) << 16;
    const uint32_t bits = high + static_cast<uint32_t>(static_cast<int32_t>(remainder));
    return float_of(is_nan(bits) ? high : bits);
  }

  FUSEDOPT_FN int16_t split(float x, BFloat16& param) {
    const uint32_t bits = bits_of(x);
    const uint32_t high = is_nan(bits) ? bits >> 16 | 0x40u : (bits + 0x8000u) >> 16;
    param.bits = static_cast<uint16_t>(high);
    return static_cast<int16_t>(is_nan(bits) ? 0 : bits & 0xffffu);
  }

  // In fp16 the remainder counts steps of 2^-15 of the param's own: exact for magnitudes from 2^-16
  // to 65,520, and within 2^-40 below.
  FUSEDOPT_FN float unit(float param) {
    const uint32_t exponent = bits_of(param) >> 23 & 0xffu;
    return float_of((exponent < 113 ? 113 - 25 : exponent - 25) << 23);
  }

  FUSEDOPT_FN float joined(Float16 param, int16_t remainder) {
    const float p = Float16::widened(param.bits);
    const float x = fma(static_cast<float>(remainder), unit(p), p);
    const bool is_param = remainder == 0 || (param.bits & 0x7c00u) == 0x7c00u;  // -0, inf, NaN
    return is_param ? p : x;
  }

  FUSEDOPT_FN int16_t split(float x, Float16& param) {
    param.bits = Float16::narrowed(x);
    const float p = Float16::widened(param.bits);
    const float per_unit = float_of((254u << 23) - bits_of(unit(p)));  // 1 / unit
    const float units = (x - p) * per_unit + 0x1.8p23f;                // rounded to nearest even
    const uint32_t remainder = bits_of(units) - bits_of(0x1.8p23f);
    return static_cast<int16_t>((param.bits & 0x7c00u) == 0x7c00u ? 0 : remainder);
  }
};

// The master has the upper 24 bits of fp32, dithered.
struct Remainder8 {
  FUSEDOPT_FN float joined(BFloat16 param, int8_t remainder) {
    const uint32_t high = static_cast<uint32_t>(param.bits) << 16;
    const uint32_t low = static_cast<uint32_t>(static_cast<int32_t>(remainder)) << 8;
    return float_of(is_nan(high + low) ? high : high + low);
  }

  FUSEDOPT_FN int8_t split(float x, uint32_t dither, BFloat16& param) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + (dither >> 24)) >> 8;
    const bool is_inf = (rounded & 0x7fffffu) == 0x7f8000u;
    const uint32_t c = is_inf ? bits >> 8 : rounded;
    const uint32_t high = is_nan(bits) ? bits >> 16 | 0x40u : (c + 0x80u) >> 8;
    param.bits = static_cast<uint16_t>(high);
    return static_cast<int8_t>(is_nan(bits) ? 0 : c & 0xffu);
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
