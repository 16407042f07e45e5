// Eight elements of a stream in one thread's registers.
//
// A warp takes 256 consecutive elements. Of an fp32 stream thread t holds elements 4t..4t+3 and
// 128+4t..128+4t+3, so that each of its two 16-byte accesses is one run of 512 bytes for the warp.
// Of a 16-bit stream one 16-byte access covers elements 8t..8t+7; two shuffles a register bring
// them to the threads that hold the same elements in fp32, and back.
#pragma once

#include "../dtypes.h"
#include "../plan.h"

namespace fusedopt {

constexpr int kThreads = 256;  // of a block, for every kernel
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpElements = 256;
constexpr unsigned kAllThreads = 0xffffffffu;

// Element of the warp's 256 that slot j of thread t holds.
__device__ __forceinline__ int element_of_slot(int t, int j) {
  return (j < 4 ? 0 : kWarpElements / 2 - 4) + 4 * t + j;
}

__device__ __forceinline__ bool aligned16(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & 15u) == 0;
}

// Four elements of an fp32 stream, its last read in this step: evict first.
__device__ __forceinline__ void load_group(const float* data, int t, float* x) {
  const float4 v = __ldcs(reinterpret_cast<const float4*>(data) + t);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

__device__ __forceinline__ void fill_group(float value, float* x) {
  x[0] = x[1] = x[2] = x[3] = value;
}

__device__ __forceinline__ void store_group(float* data, int t, const float* x) {
  __stcs(reinterpret_cast<float4*>(data) + t, make_float4(x[0], x[1], x[2], x[3]));
}

__device__ __forceinline__ uint4 load_half(const uint16_t* data, int t) {
  return __ldcs(reinterpret_cast<const uint4*>(data) + t);
}

// From the order of memory to the slots of `half` 0 or 1 of the warp's elements: the four elements
// of group g lie with thread g / 2.
__device__ __forceinline__ void spread(const uint4& memory, int t, int half, uint32_t* pair) {
  const int from = half * (kWarp / 2) + t / 2;
  const uint32_t x = __shfl_sync(kAllThreads, memory.x, from);
  const uint32_t y = __shfl_sync(kAllThreads, memory.y, from);
  const uint32_t z = __shfl_sync(kAllThreads, memory.z, from);
  const uint32_t w = __shfl_sync(kAllThreads, memory.w, from);
  pair[0] = t % 2 ? z : x;
  pair[1] = t % 2 ? w : y;
}

// The way back: thread t collects groups 2t and 2t+1.
__device__ __forceinline__ uint4 gather(const uint32_t (&pair)[4], int t) {
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

__device__ __forceinline__ float widened(uint32_t bits, bool is_float16) {
  const uint16_t half = static_cast<uint16_t>(bits);
  return is_float16 ? float16_to_float(half) : bfloat16_to_float(half);
}

__device__ __forceinline__ uint32_t narrowed(float x, bool is_float16) {
  return is_float16 ? float_to_float16(x) : float_to_bfloat16(x);
}

__device__ __forceinline__ void narrow(const float* x, bool is_float16, uint32_t* pair) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    pair[k] = narrowed(x[2 * k], is_float16) | (narrowed(x[2 * k + 1], is_float16) << 16);
  }
}

// One element, wherever it lies.
__device__ __forceinline__ float element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return __ldcs(static_cast<const float*>(data) + i);
  const unsigned short half = __ldcs(static_cast<const unsigned short*>(data) + i);
  return widened(half, dtype == DType::kFloat16);
}

}  // namespace fusedopt
