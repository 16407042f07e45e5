// One block turns the partials into the step's scalars and prepares every tensor's update.
#pragma once

#include "access.cuh"
#include "step.h"

namespace fusedopt {

static_assert(kThreads == kLanes, "one thread is one lane of the contract");

__device__ __forceinline__ double combined(NormType norm_type, double a, double b) {
  return norm_type == NormType::kTwo ? a + b : larger(a, b);
}

// Lanes by chunk index, then adjacent pairs, as combine_partials() of the CPU. Partials are read
// past the L1 cache: other blocks have just written them.
__device__ __forceinline__ double total_of_partials(const PlanView& plan, NormType norm_type) {
  __shared__ double lanes[kThreads];
  const int t = threadIdx.x;
  double lane = 0.0;
#pragma unroll 8
  for (int64_t c = t; c < plan.n_chunks; c += kThreads) {
    lane = combined(norm_type, lane, __ldcg(plan.partials + c));
  }
  lanes[t] = lane;
  __syncthreads();
  for (int width = kThreads / 2; width >= 1; width /= 2) {
    const double pair = t < width ? combined(norm_type, lanes[2 * t], lanes[2 * t + 1]) : 0.0;
    __syncthreads();
    if (t < width) lanes[t] = pair;
    __syncthreads();
  }
  return lanes[0];
}

// Options that the user keeps on the device. Whoever reads them has to meet a barrier first.
__device__ __forceinline__ void fetch_device_numbers(const DeviceStep& step) {
  auto* fields = static_cast<double*>(step.group_options);
  for (int i = threadIdx.x; i < step.n_device_numbers; i += kThreads) {
    const DeviceNumber& number = step.device_numbers[i];
    fields[number.field] = number.is_double ? *static_cast<const double*>(number.data)
                                            : *static_cast<const float*>(number.data);
  }
}

template <class R>
__device__ __forceinline__ RowStep<R> row_step(const typename R::Options& options, float step) {
  return {R::hyper(options, R::row_scalars(options, static_cast<int64_t>(step))), step};
}

__device__ __forceinline__ float next_step(const Row& row) {
  return row.step ? *row.step + 1.0f : 0.0f;
}

// Takes part in the step, and on this device.
__device__ __forceinline__ bool is_active(const PlanView& plan, int64_t r) {
  return plan.grads[r].present && (plan.rows[r].numel > 0 || plan.rows[r].step);
}

constexpr int kSharedGroups = 32;

// fp64 is slow on consumer GPUs and the tensors of a group mostly share their step count: one
// thread a group works out the numbers of whichever tensor came first, and the others look whether
// they are theirs too.
template <class R>
__device__ __forceinline__ void prepare_rows(const DeviceStep& step) {
  __shared__ RowStep<R> group_step[kSharedGroups];
  __shared__ unsigned claims[kSharedGroups];
  __shared__ int64_t first_row[kSharedGroups];
  const PlanView& plan = step.plan;
  const auto* options = static_cast<const typename R::Options*>(step.group_options);
  auto* rows = static_cast<RowStep<R>*>(plan.row_scalars);
  const int t = threadIdx.x;
  if (t < kSharedGroups) claims[t] = 0;
  __syncthreads();
  for (int64_t r = t; r < plan.n_rows; r += kThreads) {
    const int32_t group = plan.rows[r].group;
    if (group < kSharedGroups && is_active(plan, r) && atomicAdd(&claims[group], 1u) == 0) {
      first_row[group] = r;
    }
  }
  __syncthreads();
  if (t < kSharedGroups && claims[t] > 0) {
    group_step[t] = row_step<R>(options[t], next_step(plan.rows[first_row[t]]));
  }
  __syncthreads();
  for (int64_t r = t; r < plan.n_rows; r += kThreads) {
    if (!is_active(plan, r)) continue;
    const Row& row = plan.rows[r];
    const float count = next_step(row);
    const bool same = row.group < kSharedGroups && group_step[row.group].step == count;
    rows[r] = same ? group_step[row.group] : row_step<R>(options[row.group], count);
  }
}

// Called by a whole block. All totals are there: of this device alone, or of every one that shares
// the norm.
__device__ __forceinline__ void finalize_step(const DeviceStep& step) {
  __shared__ bool skip;
  fetch_device_numbers(step);
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int i = 0; step.step_options.measured && i < step.n_totals; ++i) {
      total = combined(step.step_options.norm_type, total, __ldcg(step.totals + i));
    }
    decide(step.step_options, total, step.grad_scale, step.found_inf, *step.scalars);
    if (step.inf_flag) *step.inf_flag = step.scalars->found_inf;
    skip = step.scalars->skip != 0.0f;
  }
  __syncthreads();  // for skip and the numbers fetched
  if (skip || step.plan.n_rows == 0) return;
  if (step.rule == Rule::kAdamW) {
    prepare_rows<AdamW>(step);
  } else {
    prepare_rows<SGD>(step);
  }
}

}  // namespace fusedopt
