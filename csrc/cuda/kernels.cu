// The kernels and their launches; the one file that knows of grids.
#include <cstring>

#include "finalize.cuh"
#include "launch.h"
#include "reduce.cuh"
#include "update.cuh"

namespace fusedopt {
namespace {

struct alignas(16) Payload {
  uint4 words[kPayloadBytes / 16];
};

__global__ void __launch_bounds__(kThreads)
    write_kernel(const __grid_constant__ Payload payload, uint4* destination, int n) {
  for (int i = threadIdx.x; i < n; i += kThreads) destination[i] = payload.words[i];
}

// A warp a chunk, so that chunks need no barrier. The block that finishes last, by the ticket it
// draws, adds up the partials: in their order, whichever block that is.
__global__ void __launch_bounds__(kThreads, 4)
    reduce_kernel(const __grid_constant__ DeviceStep step, bool finalizes) {
  __shared__ float inv_scale;
  __shared__ bool is_last;
  if (threadIdx.x == 0) inv_scale = inverse_scale(step.grad_scale);
  __syncthreads();
  const int t = threadIdx.x % kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const PlanView& plan = step.plan;
  for (int64_t c = warp; c < plan.n_chunks; c += static_cast<int64_t>(gridDim.x) * kWarps) {
    const double partial = reduce_chunk(chunk_of_grads(plan, plan.chunks[c]), t,
                                        step.step_options.norm_type, inv_scale);
    if (t == 0) plan.partials[c] = partial;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for the whole block, whose stores the barrier has ordered before this
    is_last = atomicInc(step.ticket, gridDim.x - 1) == gridDim.x - 1;  // and is zero again
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  const double total = total_of_partials(plan, step.step_options.norm_type);
  // No barrier: the only reader here is the thread that has written it.
  if (threadIdx.x == 0) step.totals[step.own_total] = total;
  if (finalizes) finalize_step(step);
}

__global__ void __launch_bounds__(kThreads)
    finalize_kernel(const __grid_constant__ DeviceStep step) {
  finalize_step(step);
}

template <class R>
__device__ __forceinline__ void write_step_counts(const PlanView& plan, int64_t first, int64_t by) {
  const auto* rows = static_cast<const RowStep<R>*>(plan.row_scalars);
#pragma unroll 1
  for (int64_t r = first; r < plan.n_rows; r += by) {
    if (plan.grads[r].present && plan.rows[r].step) *plan.rows[r].step = rows[r].step;
  }
}

// Counts are written here, after which no launch can fail, so that a step that raised has not
// counted. Chunks from the last to the first: the end of the gradients is likeliest to be in the L2
// cache still. 64 registers let four blocks reside.
template <class R, bool kAmsgrad>
__global__ void __launch_bounds__(kThreads, 4)
    update_kernel(const __grid_constant__ DeviceStep step) {
  if (step.scalars->skip != 0.0f) {
    if (blockIdx.x == 0 && threadIdx.x == 0) step.scalars->skipped_steps += 1.0f;
    return;
  }
  const PlanView& plan = step.plan;
  write_step_counts<R>(plan, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
  const int last = static_cast<int>(plan.n_chunks) - 1;
  for (int c = last - static_cast<int>(blockIdx.x); c >= 0; c -= static_cast<int>(gridDim.x)) {
    update_chunk<R, kAmsgrad>(step, plan.chunks[c]);
  }
}

using UpdateKernel = void (*)(DeviceStep);

UpdateKernel update_kernel_of(Rule rule, bool amsgrad) {
  if (rule == Rule::kSGD) return update_kernel<SGD, false>;
  return amsgrad ? update_kernel<AdamW, true> : update_kernel<AdamW, false>;
}

cudaLaunchConfig_t config(int blocks, cudaStream_t stream) {
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(kThreads);
  launch.stream = stream;
  return launch;
}

// As many blocks as there is work for, one at least.
int grid(int64_t chunks, int chunks_per_block, int most) {
  const int64_t wanted = (chunks + chunks_per_block - 1) / chunks_per_block;
  return static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace

cudaError_t write_page(void* destination, const void* source, size_t bytes, cudaStream_t stream) {
  Payload payload;
  std::memcpy(payload.words, source, bytes);
  const cudaLaunchConfig_t launch = config(1, stream);
  return cudaLaunchKernelEx(&launch, write_kernel, payload, static_cast<uint4*>(destination),
                            static_cast<int>(bytes / 16));
}

cudaError_t reduce(const DeviceStep& step, bool finalizes, int blocks, cudaStream_t stream) {
  const cudaLaunchConfig_t launch = config(grid(step.plan.n_chunks, kWarps, blocks), stream);
  return cudaLaunchKernelEx(&launch, reduce_kernel, step, finalizes);
}

cudaError_t finalize(const DeviceStep& step, cudaStream_t stream) {
  const cudaLaunchConfig_t launch = config(1, stream);
  return cudaLaunchKernelEx(&launch, finalize_kernel, step);
}

cudaError_t update(const DeviceStep& step, bool amsgrad, int blocks, cudaStream_t stream) {
  const cudaLaunchConfig_t launch = config(grid(step.plan.n_chunks, 1, blocks), stream);
  return cudaLaunchKernelEx(&launch, update_kernel_of(step.rule, amsgrad), step);
}

cudaError_t resident_blocks(Rule rule, bool amsgrad, int* reduce_blocks, int* update_blocks) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(reduce_blocks, reduce_kernel, kThreads, 0);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      update_blocks, update_kernel_of(rule, amsgrad), kThreads, 0);
  *reduce_blocks *= processors;
  *update_blocks *= processors;
  return error;
}

}  // namespace fusedopt
