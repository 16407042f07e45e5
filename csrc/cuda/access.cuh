// Eight elements of a stream in one thread's registers.
//
// A warp takes 256 consecutive elements, in two halves. Of each half thread t holds the group of
// elements 4t..4t+3. Its access to a group of an fp32 stream is 16 bytes: one run of memory for the
// warp. Of a 16-bit stream, which is accessed 16 bytes at a time, elements 8t..8t+7 are the
// thread's; two shuffles a register bring them to the threads that hold the same elements in fp32,
// and back. Streams of other codecs are in coded.cuh.
#pragma once

#include "../records.h"

#define FUSEDOPT_DEVICE __device__ __forceinline__

namespace fusedopt {

constexpr int kThreads = 256;  // of a block, for every kernel
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpElements = 256;
constexpr unsigned kAllThreads = 0xffffffffu;

// A stream of a tensor from the chunk's first element on; null: there is none.
struct Stream {
  void* data;
  Codec codec;

  FUSEDOPT_DEVICE uint16_t* half() const { return static_cast<uint16_t*>(data); }
};

FUSEDOPT_DEVICE Stream stream_at(const void* data, Codec codec, int64_t element) {
  const char* at = data ? static_cast<const char*>(data) + element * bytes_of(codec) : nullptr;
  return {const_cast<char*>(at), codec};
}

FUSEDOPT_DEVICE bool aligned16(const Stream& s) {
  return (reinterpret_cast<uintptr_t>(s.data) & 15u) == 0;
}

FUSEDOPT_DEVICE float widened_low(uint32_t pair, Codec c) { return widened(pair & 0xffffu, c); }

FUSEDOPT_DEVICE float widened_high(uint32_t pair, Codec c) { return widened(pair >> 16, c); }

FUSEDOPT_DEVICE uint32_t narrowed_pair(float low, float high, Codec codec) {
  return narrowed(low, codec) | static_cast<uint32_t>(narrowed(high, codec)) << 16;
}

FUSEDOPT_DEVICE void narrow_group(const float* x, Codec codec, uint32_t* pair) {
  pair[0] = narrowed_pair(x[0], x[1], codec);
  pair[1] = narrowed_pair(x[2], x[3], codec);
}

// A group of an fp32 stream. The step does not read it again: evict first.
FUSEDOPT_DEVICE void load_group(const Stream& s, int at, int t, float* x) {
  const float4 v =
      __ldcs(reinterpret_cast<const float4*>(static_cast<const float*>(s.data) + at) + t);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

FUSEDOPT_DEVICE void store_group(const Stream& s, int at, int t, const float* x) {
  __stcs(reinterpret_cast<float4*>(static_cast<float*>(s.data) + at) + t,
         make_float4(x[0], x[1], x[2], x[3]));
}

// One element, whatever its alignment. Without kAnyCodec the stream is known to be fp32.
template <bool kAnyCodec>
FUSEDOPT_DEVICE float load_element(const Stream& s, int i) {
  if (!kAnyCodec || s.codec == Codec::kFloat32)
    return __ldcs(static_cast<const float*>(s.data) + i);
  return widened(__ldcs(static_cast<const unsigned short*>(s.data) + i), s.codec);
}

FUSEDOPT_DEVICE uint4 load_eight(const Stream& s, int at, int t) {
  return __ldcs(reinterpret_cast<const uint4*>(s.half() + at) + t);
}

FUSEDOPT_DEVICE void store_eight(const Stream& s, int at, int t, const uint4& x) {
  __stcs(reinterpret_cast<uint4*>(s.half() + at) + t, x);
}

// From the order in memory to the thread's group in half 0 or 1 of the warp's elements. Group g
// comes from thread g / 2.
FUSEDOPT_DEVICE void spread(const uint4& memory, int t, int half, uint32_t* pair) {
  const int from = half * (kWarp / 2) + t / 2;
  const uint32_t x = __shfl_sync(kAllThreads, memory.x, from);
  const uint32_t y = __shfl_sync(kAllThreads, memory.y, from);
  const uint32_t z = __shfl_sync(kAllThreads, memory.z, from);
  const uint32_t w = __shfl_sync(kAllThreads, memory.w, from);
  pair[0] = t % 2 ? z : x;
  pair[1] = t % 2 ? w : y;
}

// The reverse of spread(): thread t collects groups 2t and 2t+1.
FUSEDOPT_DEVICE uint4 gather(const uint32_t (&pair)[4], int t) {
  const int from = (2 * t) % kWarp;
  const bool high = t >= kWarp / 2;
  uint32_t out[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t low_half = __shfl_sync(kAllThreads, pair[k % 2], from + k / 2);
    const uint32_t high_half = __shfl_sync(kAllThreads, pair[2 + k % 2], from + k / 2);
    out[k] = high ? high_half : low_half;
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

FUSEDOPT_DEVICE uint32_t largest_of_warp(uint32_t x) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllThreads, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace fusedopt
