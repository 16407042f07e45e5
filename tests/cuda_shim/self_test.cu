// Small kernels with known answers, and known mistakes, for tests/cuda/test_cuda_shim_self.py.
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffffu;

// Sum over the block, through shared memory. Without one of the barriers it is wrong.
template <bool kBarrierBefore, bool kBarrierAfter>
__device__ unsigned block_sum(unsigned value) {
  __shared__ unsigned values[kThreads];
  const unsigned t = threadIdx.x;
  values[t] = value;
  if (kBarrierBefore) __syncthreads();
  for (unsigned width = kThreads / 2; width > 0; width /= 2) {
    if (t < width) values[t] += values[t + width];
    if (kBarrierAfter) __syncthreads();
  }
  return values[0];
}

template <bool kBarrierBefore, bool kBarrierAfter>
__global__ void __launch_bounds__(kThreads) sum_kernel(const unsigned* data, unsigned* sums) {
  const unsigned sum = block_sum<kBarrierBefore, kBarrierAfter>(
      __ldcs(data + blockIdx.x * blockDim.x + threadIdx.x));
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Every type that travels through a warp.
__global__ void shuffle_kernel(float* floats, double* doubles, unsigned* bits, int* ints) {
  const int t = static_cast<int>(threadIdx.x);
  const int lane = t % 32;
  floats[t] = __shfl_xor_sync(kAll, static_cast<float>(t), 1);
  doubles[t] = __shfl_xor_sync(kAll, t * 0.5, 16);
  bits[t] = __shfl_sync(kAll, 0x80000000u + static_cast<unsigned>(t), (lane + 5) % 32);
  int sum = t;
  for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  ints[t] = sum;
}

// A warp reverses its numbers in shared memory.
template <bool kBarrier>
__global__ void warp_kernel(unsigned* data) {
  __shared__ unsigned values[kThreads];
  const unsigned t = threadIdx.x;
  values[t] = data[t];
  if (kBarrier) __syncwarp();
  data[t] = values[t ^ 31];
}

enum Missing { kNothing, kFenceBefore, kFenceAfter, kReset };

// The block that draws the last ticket adds up what all have written.
template <Missing kMissing>
__global__ void ticket_kernel(unsigned* partials, unsigned* ticket, unsigned* total) {
  __shared__ bool is_last;
  const unsigned t = threadIdx.x;
  if (t == 0) {
    partials[blockIdx.x] = blockIdx.x + 1;
    if (kMissing != kFenceBefore) __threadfence();
    const unsigned last = gridDim.x - 1;
    is_last = (kMissing == kReset ? atomicAdd(ticket, 1u) : atomicInc(ticket, last)) == last;
    if (kMissing != kFenceAfter) __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  const unsigned sum = block_sum<true, true>(t < gridDim.x ? __ldcg(partials + t) : 0u);
  if (t == 0) *total = sum;
}

struct Table {
  unsigned words[960];
};

__global__ void write_kernel(const __grid_constant__ Table table, unsigned* destination) {
  for (unsigned i = threadIdx.x; i < 960; i += kThreads) destination[i] = table.words[i];
}

template <class T>
__global__ void vector_kernel(const T* from, T* to) {
  __stcs(to + threadIdx.x, __ldcs(from + threadIdx.x));
}

__global__ void overrun_kernel(unsigned* data, int n) {
  const int t = static_cast<int>(threadIdx.x);
  if (t <= n) data[t] = 1;  // one too many
}

// Threads that wait in vain.
__global__ void some_return_kernel() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 128) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lone_shuffle_kernel(unsigned* data) {
  if (threadIdx.x % 32 == 3) return;
  data[threadIdx.x] = __shfl_sync(kAll, threadIdx.x, 3);
}

template <class... Params, class... Args>
int launch(unsigned blocks, void (*kernel)(Params...), Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = reinterpret_cast<cudaStream_t>(0x5);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace

#define TEST_API extern "C" __attribute__((visibility("default")))

TEST_API int sum(const unsigned* data, unsigned* sums, unsigned blocks, int missing) {
  if (missing == 1) return launch(blocks, sum_kernel<false, true>, data, sums);
  if (missing == 2) return launch(blocks, sum_kernel<true, false>, data, sums);
  return launch(blocks, sum_kernel<true, true>, data, sums);
}

TEST_API int shuffles(float* floats, double* doubles, unsigned* bits, int* ints) {
  return launch(1, shuffle_kernel, floats, doubles, bits, ints);
}

TEST_API int warps(unsigned* data, bool barrier) {
  return launch(1, barrier ? warp_kernel<true> : warp_kernel<false>, data);
}

TEST_API int ticket(unsigned* partials, unsigned* drawn, unsigned* total, unsigned blocks,
                    int missing) {
  switch (missing) {
    case kFenceBefore:
      return launch(blocks, ticket_kernel<kFenceBefore>, partials, drawn, total);
    case kFenceAfter:
      return launch(blocks, ticket_kernel<kFenceAfter>, partials, drawn, total);
    case kReset:
      return launch(blocks, ticket_kernel<kReset>, partials, drawn, total);
    default:
      return launch(blocks, ticket_kernel<kNothing>, partials, drawn, total);
  }
}

TEST_API int write(unsigned* destination, unsigned first) {
  Table table;
  for (unsigned i = 0; i < 960; ++i) table.words[i] = first + i;
  return launch(1, write_kernel, table, destination);
}

TEST_API int vectors(const void* from, void* to, int bytes) {
  if (bytes == 16) {
    return launch(1, vector_kernel<uint4>, static_cast<const uint4*>(from),
                  static_cast<uint4*>(to));
  }
  return launch(1, vector_kernel<float>, static_cast<const float*>(from), static_cast<float*>(to));
}

TEST_API int overrun(unsigned* data, int n) { return launch(1, overrun_kernel, data, n); }

TEST_API int wild(unsigned* data) { return launch(2, overrun_kernel, data, 300); }

TEST_API int stuck(int kind, unsigned* data) {
  if (kind == 0) return launch(1, some_return_kernel);
  if (kind == 1) return launch(1, two_barriers_kernel);
  return launch(1, lone_shuffle_kernel, data);
}

TEST_API int grid_of(unsigned blocks) { return launch(blocks, some_return_kernel); }
