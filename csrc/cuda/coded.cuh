// Streams of any codec: a warp takes a block of 128 elements, thread t its elements 4t..4t+3.
//
// A log8 state has one scale for such a block, from its largest magnitude. So a block is a warp's
// also where it is not whole, and where streams are not aligned. Values are the bits of fp32 in
// registers; what is in memory takes as many of the same four registers as it needs: four of fp32,
// two of 16 bits, one of 8 bits, and the second then has the scale.
#pragma once

#include "access.cuh"

namespace fusedopt {

static_assert(kScaleBlock == 4 * kWarp, "four elements a thread");

// A stream of a tensor from the chunk's first element on; null: there is none.
struct CodedStream {
  void* data;
  uint8_t* scales;
  uint32_t seed;  // of the dither of the chunk's elements
  Codec codec;
  int32_t bytes;  // of an element

  // Whether four elements at a time are on their own boundary.
  FUSEDOPT_DEVICE bool aligned() const {
    return (reinterpret_cast<uintptr_t>(data) & (4 * static_cast<uintptr_t>(bytes) - 1)) == 0;
  }
};

// A block, as one thread sees it.
struct Place {
  int i;      // of its first element in the chunk
  int block;  // of scales
  int count;  // elements that exist; four in a whole block
};

// In memory. Of elements that do not exist the bits are zero, and nothing is stored.

template <class T>
FUSEDOPT_DEVICE void load_each(const CodedStream& s, const Place& at, uint32_t* x) {
  constexpr int kPer = 4 / sizeof(T);  // elements in a register
  const T* data = static_cast<const T*>(s.data) + at.i;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t bits = j < at.count ? __ldcs(data + j) : 0;
    x[j / kPer] = j % kPer == 0 ? bits : x[j / kPer] | bits << 8 * sizeof(T) * (j % kPer);
  }
}

template <class T>
FUSEDOPT_DEVICE void store_each(const CodedStream& s, const Place& at, const uint32_t* x) {
  constexpr int kPer = 4 / sizeof(T);
  T* data = static_cast<T*>(s.data) + at.i;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < at.count) data[j] = static_cast<T>(x[j / kPer] >> 8 * sizeof(T) * (j % kPer));
  }
}

template <class T>
FUSEDOPT_DEVICE T* four_at(const CodedStream& s, int i) {
  return reinterpret_cast<T*>(static_cast<char*>(s.data) + s.bytes * i);
}

// kAtOnce: the stream is aligned, and all four elements exist.
template <bool kAtOnce>
FUSEDOPT_DEVICE void load_bits(const CodedStream& s, const Place& at, uint32_t* x) {
  if (s.bytes == 4) {
    if (!kAtOnce) return load_each<unsigned>(s, at, x);
    const uint4 v = __ldcs(four_at<const uint4>(s, at.i));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else if (s.bytes == 2) {
    if (!kAtOnce) return load_each<unsigned short>(s, at, x);
    const uint2 v = __ldcs(four_at<const uint2>(s, at.i));
    x[0] = v.x, x[1] = v.y;
  } else {
    if (!kAtOnce) {
      load_each<unsigned char>(s, at, x);
    } else {
      x[0] = __ldcs(four_at<const unsigned>(s, at.i));
    }
    if (s.scales) x[1] = __ldcs(static_cast<const unsigned char*>(s.scales) + at.block);
  }
}

template <bool kAtOnce>
FUSEDOPT_DEVICE void store_bits(const CodedStream& s, const Place& at, const uint32_t* x) {
  if (s.bytes == 4) {
    if (!kAtOnce) return store_each<unsigned>(s, at, x);
    __stcs(four_at<uint4>(s, at.i), make_uint4(x[0], x[1], x[2], x[3]));
  } else if (s.bytes == 2) {
    if (!kAtOnce) return store_each<unsigned short>(s, at, x);
    __stcs(four_at<uint2>(s, at.i), make_uint2(x[0], x[1]));
  } else {
    if (!kAtOnce) return store_each<unsigned char>(s, at, x);
    __stcs(four_at<unsigned>(s, at.i), x[0]);
  }
}

// From the bits in memory to those of fp32, and back, in the same registers.

// Calls visit(bits) for each 16-bit element, which gives those of its value.
template <class Visit>
FUSEDOPT_DEVICE void widen_pairs(uint32_t* x, const Visit& visit) {
  const uint32_t low = x[0], high = x[1];
  x[0] = bits_of(visit(static_cast<uint16_t>(low)));
  x[1] = bits_of(visit(static_cast<uint16_t>(low >> 16)));
  x[2] = bits_of(visit(static_cast<uint16_t>(high)));
  x[3] = bits_of(visit(static_cast<uint16_t>(high >> 16)));
}

FUSEDOPT_DEVICE uint32_t pair_of(uint16_t low, uint16_t high) {
  return low | static_cast<uint32_t>(high) << 16;
}

FUSEDOPT_DEVICE uint32_t dither_of(const CodedStream& s, const Place& at, int j) {
  return dither(s.seed, static_cast<uint32_t>(at.i + j));
}

FUSEDOPT_DEVICE void narrow_dithered(const CodedStream& s, const Place& at, uint32_t* x) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    x[k] = pair_of(Dithered::narrowed(float_of(x[2 * k]), dither_of(s, at, 2 * k)),
                   Dithered::narrowed(float_of(x[2 * k + 1]), dither_of(s, at, 2 * k + 1)));
  }
}

FUSEDOPT_DEVICE void narrow_nearest(Codec codec, const uint32_t* x, uint32_t* pairs) {
  HalfCodecs::with(codec, [&](auto half) {
    using C = decltype(half);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      pairs[k] = pair_of(C::narrowed(float_of(x[2 * k])), C::narrowed(float_of(x[2 * k + 1])));
    }
  });
}

template <class C>
FUSEDOPT_DEVICE void widen_log8(uint32_t* x) {
  const uint32_t codes = x[0];
  const float down = C::down(x[1]);
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = bits_of(C::widened(codes >> 8 * j & 0xffu, down));
}

// Called by a whole warp. All its threads have read the scale before one of them writes it.
template <class C>
FUSEDOPT_DEVICE void narrow_log8(const CodedStream& s, const Place& at, uint32_t* x) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto own = static_cast<uint32_t>(C::magnitude(float_of(x[j])));
    const uint32_t magnitude = j < at.count ? own : 0;
    largest = magnitude > largest ? magnitude : largest;
  }
  const uint32_t scale = C::scale_of(largest_of_warp(largest));
  const float up = C::up(scale);
  uint32_t codes = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    codes |= C::narrowed(float_of(x[j]), up, dither_of(s, at, j)) << 8 * j;
  }
  x[0] = codes;
  __syncwarp();
  if (threadIdx.x % kWarp != 0) return;
  __stcg(static_cast<unsigned char*>(s.scales) + at.block, static_cast<unsigned char>(scale));
}

// Of a state, a gradient, or a param without a master.
FUSEDOPT_DEVICE void widen_stream(const CodedStream& s, uint32_t* x) {
  switch (s.codec) {
    case Codec::kFloat16:
      return widen_pairs(x, Float16::widened);
    case Codec::kBFloat16:
    case Codec::kDithered:
      return widen_pairs(x, BFloat16::widened);
    case Codec::kLog8:
      return widen_log8<Log8<true>>(x);
    case Codec::kLog8Positive:
      return widen_log8<Log8<false>>(x);
    default:
      return;
  }
}

FUSEDOPT_DEVICE void narrow_state(const CodedStream& s, const Place& at, uint32_t* x) {
  switch (s.codec) {
    case Codec::kDithered:
      return narrow_dithered(s, at, x);
    case Codec::kLog8:
      return narrow_log8<Log8<true>>(s, at, x);
    case Codec::kLog8Positive:
      return narrow_log8<Log8<false>>(s, at, x);
    default:
      return;
  }
}

// The values to update. `half`: the fp16 or bf16 param, whose bits are `pairs`, beside the master
// in x; there is none where x is the param itself.

template <class C>
FUSEDOPT_DEVICE C half_at(const uint32_t* pairs, int j) {
  return {static_cast<uint16_t>(pairs[j / 2] >> 16 * (j % 2))};
}

template <class C>
FUSEDOPT_DEVICE void join16(const uint32_t* pairs, uint32_t* x) {
  const uint32_t rest[2] = {x[0], x[1]};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto remainder = static_cast<int16_t>(rest[j / 2] >> 16 * (j % 2));
    x[j] = bits_of(Remainder16::joined(half_at<C>(pairs, j), remainder));
  }
}

FUSEDOPT_DEVICE void join8(const uint32_t* pairs, uint32_t* x) {
  const uint32_t rest = x[0];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto remainder = static_cast<int8_t>(rest >> 8 * j);
    x[j] = bits_of(Remainder8::joined(half_at<BFloat16>(pairs, j), remainder));
  }
}

// Where a param is not the rounding of its master, someone wrote to it, and its own value counts.
FUSEDOPT_DEVICE void follow_external_writes(Codec codec, const uint32_t* pairs, uint32_t* x) {
  HalfCodecs::with(codec, [&](auto half) {
    using C = decltype(half);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint16_t written = half_at<C>(pairs, j).bits;
      if (C::narrowed(float_of(x[j])) != written) x[j] = bits_of(C::widened(written));
    }
  });
}

FUSEDOPT_DEVICE void widen_primary(const CodedStream& s, const CodedStream& half,
                                   const uint32_t* pairs, uint32_t* x) {
  if (s.codec == Codec::kRemainder16) {
    return half.codec == Codec::kFloat16 ? join16<Float16>(pairs, x) : join16<BFloat16>(pairs, x);
  }
  if (s.codec == Codec::kRemainder8) return join8(pairs, x);
  if (half.data) return follow_external_writes(half.codec, pairs, x);
  widen_stream(s, x);
}

template <class C>
FUSEDOPT_DEVICE void split16(uint32_t* x, uint32_t* pairs) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    C low, high;
    const int16_t of_low = Remainder16::split(float_of(x[2 * k]), low);
    const int16_t of_high = Remainder16::split(float_of(x[2 * k + 1]), high);
    x[k] = pair_of(static_cast<uint16_t>(of_low), static_cast<uint16_t>(of_high));
    pairs[k] = pair_of(low.bits, high.bits);
  }
}

FUSEDOPT_DEVICE void split8(const CodedStream& s, const Place& at, uint32_t* x, uint32_t* pairs) {
  uint32_t rest = 0;
  pairs[0] = pairs[1] = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    BFloat16 param;
    const int8_t remainder = Remainder8::split(float_of(x[j]), dither_of(s, at, j), param);
    rest |= static_cast<uint32_t>(static_cast<uint8_t>(remainder)) << 8 * j;
    pairs[j / 2] |= static_cast<uint32_t>(param.bits) << 16 * (j % 2);
  }
  x[0] = rest;
}

FUSEDOPT_DEVICE void narrow_primary(const CodedStream& s, const CodedStream& half, const Place& at,
                                    uint32_t* x, uint32_t* pairs) {
  if (s.codec == Codec::kRemainder16) {
    return half.codec == Codec::kFloat16 ? split16<Float16>(x, pairs) : split16<BFloat16>(x, pairs);
  }
  if (s.codec == Codec::kRemainder8) return split8(s, at, x, pairs);
  if (half.data) return narrow_nearest(half.codec, x, pairs);  // the master is fp32
  if (s.codec == Codec::kDithered) return narrow_dithered(s, at, x);
  if (s.codec != Codec::kFloat32) narrow_nearest(s.codec, x, x);
}

}  // namespace fusedopt
