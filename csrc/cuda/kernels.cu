// The kernels and their launches; with exact.cu, the files that know of grids.
#include <cstring>
#include <type_traits>

#include "coded_update.cuh"
#include "finalize.cuh"
#include "grid.cuh"
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

// One warp for each chunk, so that chunks need no barrier. Warps add their words to the block's,
// blocks to the sums. The last block copies the sums and leaves zeros for the next launch. Where no
// other device or rank has words to add, it finalizes.
__global__ void __launch_bounds__(kThreads, 4)
    reduce_kernel(const __grid_constant__ DeviceStep step) {
  __shared__ float inv_scale;
  __shared__ Word block_words[kWords];
  const int t = threadIdx.x;
  if (t == 0) inv_scale = inverse_scale(step.record.grad_scale);
  if (t < kWords) block_words[t] = 0;
  __syncthreads();
  add_word(block_words, t % kWarp, word_of_warp(step, t % kWarp, inv_scale));
  __syncthreads();
  if (t < kWords) add_word(step.sums, t, block_words[t]);
  if (!is_last_block(step.ticket)) return;
  if (t < kWords) {  // finalize_step() reads them in the same threads
    const Word of_rank = step.own_number == 0 ? word_of_rank(step.record, t) : 0;
    step.words[step.own_number * kWords + t] = __ldcg(step.sums + t) + of_rank;  // past L1
    step.sums[t] = 0;
  }
  if (step.n_devices == 1 && step.record.n_ranks == 0) finalize_step(step);
}

__global__ void __launch_bounds__(kThreads)
    finalize_kernel(const __grid_constant__ DeviceStep step) {
  finalize_step(step);
}

template <class R>
FUSEDOPT_DEVICE void write_step_counts(const PlanView& plan, int64_t first, int64_t by) {
  const auto* row_steps = static_cast<const RowStep<R>*>(plan.row_steps);
#pragma unroll 1
  for (int64_t r = first; r < plan.n_rows; r += by) {
    if (plan.grads[r].present && plan.rows[r].step) *plan.rows[r].step = row_steps[r].step;
  }
}

// Step counts are written in the last launch of a step, so that a step that raised has not counted.
// With 64 registers four blocks are resident. Without kCoded all states and masters are fp32.
template <class R, int n, bool kCoded>
__global__ void __launch_bounds__(kThreads, 4)
    update_kernel(const __grid_constant__ DeviceStep step) {
  const float skip = step.record.scalars->skip;
  if (skip != 0.0f) {
    if (skip == 1.0f && blockIdx.x == 0 && threadIdx.x == 0) {
      step.record.scalars->skipped_steps += 1.0f;
    }
    return;
  }
  write_step_counts<R>(step.plan, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
  using K = Compiled<R, n>;
  update_chunks<std::conditional_t<kCoded, CodedWork<K>, Work<K>>>(step);
}

using UpdateKernel = void (*)(DeviceStep);

// Each rule has a kernel for each number of states that a tensor may have.
template <class R, int n = R::kStates>
UpdateKernel update_kernel_of(int n_states, bool coded) {
  if constexpr (n > 1 && n > R::kAlways) {
    if (n_states < n) return update_kernel_of<R, n - 1>(n_states, coded);
  }
  return coded ? update_kernel<R, n, true> : update_kernel<R, n, false>;
}

UpdateKernel update_kernel_of(const DeviceStep& step) {
  UpdateKernel kernel = nullptr;
  Rules::with(step.rule, [&](auto tag) {
    kernel = update_kernel_of<typename decltype(tag)::Rule>(step.n_states, step.coded);
  });
  return kernel;
}

}  // namespace

cudaError_t write_page(void* destination, const void* source, size_t bytes, cudaStream_t stream) {
  Payload payload;
  std::memcpy(payload.words, source, bytes);
  return launch(write_kernel, 1, stream, payload, static_cast<uint4*>(destination),
                static_cast<int>(bytes / 16));
}

cudaError_t reduce(const DeviceStep& step, int blocks, cudaStream_t stream) {
  if (step.record.has(StepRecord::kExact)) return reduce_exactly(step, blocks, stream);
  return launch(reduce_kernel, grid(step.plan.n_chunks, kWarps, blocks), stream, step);
}

cudaError_t finalize(const DeviceStep& step, cudaStream_t stream) {
  return launch(finalize_kernel, 1, stream, step);
}

cudaError_t update(const DeviceStep& step, int blocks, cudaStream_t stream) {
  return launch(update_kernel_of(step), grid(step.plan.n_chunks, 1, blocks), stream, step);
}

cudaError_t resident_blocks(const DeviceStep& step, int* reduce_blocks, int* update_blocks) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(reduce_blocks, reduce_kernel, kThreads, 0);
  if (error != cudaSuccess) return error;
  UpdateKernel update = update_kernel_of(step);
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(update_blocks, update, kThreads, 0);
  *reduce_blocks *= processors;
  *update_blocks *= processors;
  return error;
}

}  // namespace fusedopt
