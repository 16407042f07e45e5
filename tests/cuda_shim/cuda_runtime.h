// As much of the CUDA runtime as csrc/cuda uses, made of host code, so that its kernels run and are
// tested on a machine without a GPU. Tests only; blocks.h says how a block runs.
//
// What is not here is not used: a kernel that calls more than this does not compile with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "blocks.h"

// ---- language -----------------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// A block runs on one host thread, so what that thread owns is shared by the block and by nobody
// else.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

// ---- device functions ---------------------------------------------------------------------------
// The line is that of the caller: threads that meet have to stand at the same one.

inline void __syncthreads(int line = __builtin_LINE()) { shim::block_barrier(line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  shim::warp_barrier(mask, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return shim::exchanged(mask, value, source & 31, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int line = __builtin_LINE()) {
  return shim::exchanged(mask, value, static_cast<int>(threadIdx.x % 32) ^ lane_mask, line);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return shim::atomic(address, [=](unsigned old) { return old + value; });
}

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return shim::atomic(address, [=](unsigned long long old) { return old + value; });
}

inline unsigned long long atomicMax(unsigned long long* address, unsigned long long value) {
  return shim::atomic(address, [=](unsigned long long old) { return old < value ? value : old; });
}

inline unsigned atomicExch(unsigned* address, unsigned value) {
  return shim::atomic(address, [=](unsigned) { return value; });
}

inline unsigned atomicInc(unsigned* address, unsigned last) {
  return shim::atomic(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

inline void __threadfence() { shim::device_fence(); }

template <class T>
T __ldcs(const T* address) {
  return shim::load(address);
}

template <class T>
T __ldcg(const T* address) {
  return shim::load(address);
}

template <class T>
void __stcs(T* address, T value) {
  shim::check_access<T>(address);
  __builtin_memcpy(address, &value, sizeof value);
}

template <class T>
void __stcg(T* address, T value) {
  __stcs(address, value);
}

// ---- runtime ------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorUnknown = 999,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

namespace shim {
cudaError_t max_active_blocks(int* blocks, int block_size);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, size_t param_bytes,
                   const Body& body);
}  // namespace shim

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int block_size,
                                                          size_t) {
  return shim::max_active_blocks(blocks, block_size);
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
    static void run(const void* call) {
      const Call& self = *static_cast<const Call*>(call);
      std::apply(self.kernel, self.params);
    }
  };
  static_assert((std::is_trivially_copyable_v<Params> && ...), "parameters are copied as bytes");
  const Call call{kernel, std::tuple<Params...>(std::forward<Args>(args)...)};
  return shim::launch(*config, reinterpret_cast<const void*>(kernel), (sizeof(Params) + ... + 0),
                      {Call::run, &call});
}
