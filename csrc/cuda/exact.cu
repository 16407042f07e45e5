// The kernel for norm_bits="exact", apart from the others: where two kernels of a file use the same
// functions, the compiler lays out their shared memory together.
#include "exact.cuh"
#include "finalize.cuh"
#include "grid.cuh"
#include "launch.h"

namespace fusedopt {
namespace {

// As reduce_kernel, around another loop. With the 64 registers of four blocks it would spill on
// sm_100 and sm_120.
__global__ void __launch_bounds__(kThreads, 3)
    reduce_exactly_kernel(const __grid_constant__ DeviceStep step) {
  __shared__ float inv_scale;
  __shared__ Word block_words[kWords];
  const int t = threadIdx.x;
  if (t == 0) inv_scale = inverse_scale(step.record.grad_scale);
  if (t < kWords) block_words[t] = 0;
  __syncthreads();
  add_chunks_exactly(step, t % kWarp, inv_scale, block_words);
  __syncthreads();
  if (t < kWords) add_word(step.sums, t, block_words[t]);
  if (!is_last_block(step.ticket)) return;
  if (t < kWords) {
    const Word of_rank = step.own_number == 0 ? word_of_rank(step.record, t) : 0;
    step.words[step.own_number * kWords + t] = __ldcg(step.sums + t) + of_rank;
    step.sums[t] = 0;
  }
  if (step.n_devices == 1 && step.record.n_ranks == 0) finalize_step(step);
}

}  // namespace

cudaError_t reduce_exactly(const DeviceStep& step, int blocks, cudaStream_t stream) {
  return launch(reduce_exactly_kernel, grid(step.plan.n_chunks, kWarps, blocks), stream, step);
}

}  // namespace fusedopt
