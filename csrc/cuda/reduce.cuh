// A warp turns one chunk of gradients into its partial: sum of squares, or largest magnitude.
//
// The lanes of the numeric contract are by element index modulo 256. A thread holds eight of them,
// so they meet in the contract's order: inside the thread, then by shuffles between neighbours.
#pragma once

#include "../scalars.h"
#include "access.cuh"

namespace fusedopt {

struct ChunkOfGrads {
  const void* data;  // the chunk's first element
  DType dtype;
  int n;
};

__device__ __forceinline__ ChunkOfGrads chunk_of_grads(const PlanView& plan, const Chunk& chunk) {
  const Grad& grad = plan.grads[chunk.row];
  if (!grad.present) return {nullptr, DType::kFloat32, 0};
  const int64_t begin = chunk.index * kChunk;
  const int64_t left = plan.rows[chunk.row].numel - begin;
  const int64_t size = grad.dtype == DType::kFloat32 ? 4 : 2;
  return {static_cast<const char*>(grad.data) + begin * size, grad.dtype,
          static_cast<int>(left < kChunk ? left : kChunk)};
}

// Lane of the contract that accumulator j of thread t stands for.
__device__ __forceinline__ int lane_of(DType dtype, int t, int j) {
  return dtype == DType::kFloat32 ? element_of_slot(t, j) : 8 * t + j;
}

// A row one element at a time, all eight loads before the first use.
template <class T>
__device__ __forceinline__ void load_some(const T* data, const ChunkOfGrads& c, int row, int t,
                                          T (&x)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int i = row + lane_of(c.dtype, t, j);
    x[j] = i < c.n ? __ldcg(data + i) : T();
  }
}

// visit(j, value) for the elements of this thread, those of each lane in ascending order.
template <class Visit>
__device__ __forceinline__ void for_each_element(const ChunkOfGrads& c, int t, const Visit& visit) {
  int row = 0;
  if (aligned16(c.data) && c.dtype == DType::kFloat32) {
    const float4* data = static_cast<const float4*>(c.data) + t;
    for (; row + 4 * kWarpElements <= c.n; row += 4 * kWarpElements, data += kWarpElements) {
      float4 x[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = __ldcg(data + k * kWarp);
      __syncwarp();  // ptxas for sm_100 and sm_120 would otherwise start the last loads late
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int j = 4 * (k % 2);
        visit(j, x[k].x), visit(j + 1, x[k].y), visit(j + 2, x[k].z), visit(j + 3, x[k].w);
      }
    }
#pragma unroll 1
    for (; row + kWarpElements <= c.n; row += kWarpElements, data += kWarpElements / 4) {
      const float4 low = __ldcg(data), high = __ldcg(data + kWarp);
      visit(0, low.x), visit(1, low.y), visit(2, low.z), visit(3, low.w);
      visit(4, high.x), visit(5, high.y), visit(6, high.z), visit(7, high.w);
    }
  } else if (aligned16(c.data)) {
    const bool is_float16 = c.dtype == DType::kFloat16;
    const auto* data = static_cast<const uint4*>(c.data);
#pragma unroll 4
    for (; row + kWarpElements <= c.n; row += kWarpElements) {
      const uint4 bits = __ldcg(data + row / 8 + t);
      visit(0, widened(bits.x & 0xffffu, is_float16)), visit(1, widened(bits.x >> 16, is_float16));
      visit(2, widened(bits.y & 0xffffu, is_float16)), visit(3, widened(bits.y >> 16, is_float16));
      visit(4, widened(bits.z & 0xffffu, is_float16)), visit(5, widened(bits.z >> 16, is_float16));
      visit(6, widened(bits.w & 0xffffu, is_float16)), visit(7, widened(bits.w >> 16, is_float16));
    }
  }
  for (; row < c.n; row += kWarpElements) {
    float x[8];
    if (c.dtype == DType::kFloat32) {
      load_some(static_cast<const float*>(c.data), c, row, t, x);
    } else {
      unsigned short bits[8];
      load_some(static_cast<const unsigned short*>(c.data), c, row, t, bits);
      const bool is_float16 = c.dtype == DType::kFloat16;
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = widened(bits[j], is_float16);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (row + lane_of(c.dtype, t, j) < c.n) visit(j, x[j]);
    }
  }
}

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    x = x + __shfl_xor_sync(kAllThreads, x, distance);
  }
  return x;
}

struct Scan {
  float sum;      // of (grad * mult1 * mult2)^2
  float largest;  // |grad * mult1|; NaN if there is one
};

__device__ __forceinline__ Scan scan(const ChunkOfGrads& c, int t, float mult1, float mult2) {
  float lane[8] = {};
  uint32_t largest = 0;  // as integers magnitudes are ordered, with NaN above infinity
  for_each_element(c, t, [&](int j, float grad) {
    const float x = grad * mult1;
    const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
    lane[j] = fma(x * mult2, x * mult2, lane[j]);
  });
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllThreads, largest, distance);
    largest = other > largest ? other : largest;
  }
  const float low = (lane[0] + lane[1]) + (lane[2] + lane[3]);
  const float high = (lane[4] + lane[5]) + (lane[6] + lane[7]);
  const bool contiguous = c.dtype != DType::kFloat32;  // low and high are eight adjacent lanes
  const float first = sum_over_warp(contiguous ? low + high : low);
  const float second = sum_over_warp(high);
  return {contiguous ? first : first + second, float_of(largest)};
}

// As on the CPU (csrc/cpu/reduce.h): a finite chunk has a finite partial.
__device__ __forceinline__ double reduce_chunk(const ChunkOfGrads& c, int t, NormType norm_type,
                                               float inv_scale) {
  const Scan s = scan(c, t, inv_scale, 1.0f);
  if (norm_type == NormType::kInf) return s.largest;
  if (in_range(s.sum) || c.n == 0) return s.sum;
  if (s.largest == 0.0f || s.largest - s.largest != 0.0f) return s.largest;
  const Rescale rescale = rescale_for(s.largest);
  return static_cast<double>(scan(c, t, inv_scale, rescale.scale).sum) * rescale.unscale *
         rescale.unscale;
}

}  // namespace fusedopt
