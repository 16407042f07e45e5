// One block turns the words into the step's scalars and prepares every tensor's update.
#pragma once

#include "../rules.h"
#include "../scalars.h"
#include "access.cuh"
#include "launch.h"

namespace fusedopt {

// Copies options that the user keeps on the device. A barrier follows before the block reads them.
FUSEDOPT_DEVICE void fetch_device_numbers(const DeviceStep& step) {
  for (int64_t i = threadIdx.x; i < step.record.n_device_numbers; i += kThreads) {
    const DeviceNumber& number = step.numbers[i];
    step.fields[number.field] = number.is_double ? *static_cast<const double*>(number.data)
                                                 : *static_cast<const float*>(number.data);
  }
}

// Word t of all devices together. Loads bypass L1: another block may just have written the word.
FUSEDOPT_DEVICE uint64_t word_of_devices(const DeviceStep& step, int t) {
  uint64_t word = 0;
  for (int d = 0; d < step.n_devices; ++d) {
    word = combined(t, word, __ldcg(step.words + d * kWords + t));
  }
  return word;
}

FUSEDOPT_DEVICE float next_step(const Row& row) { return row.step ? *row.step + 1.0f : 0.0f; }

// Whether row r takes part in the step on this device.
FUSEDOPT_DEVICE bool is_active(const PlanView& plan, int64_t r) {
  return plan.grads[r].present && (plan.rows[r].numel > 0 || plan.rows[r].step);
}

constexpr int kSharedGroups = 32;

// fp64 is slow on consumer GPUs, and the tensors of a group mostly share their step count. So one
// thread a group computes the numbers of one tensor, and tensors with the same count copy them.
template <class R>
FUSEDOPT_DEVICE void prepare_rows(const PlanView& plan) {
  __shared__ RowStep<R> group_step[kSharedGroups];
  __shared__ unsigned claims[kSharedGroups];
  __shared__ int64_t first_row[kSharedGroups];
  const auto* options = static_cast<const typename R::Options*>(plan.options);
  auto* row_steps = static_cast<RowStep<R>*>(plan.row_steps);
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
    row_steps[r] = same ? group_step[row.group] : row_step<R>(options[row.group], count);
  }
}

// Called by a whole block, once all words are there: of this device alone, or of every device that
// shares the norm.
FUSEDOPT_DEVICE void finalize_step(const DeviceStep& step) {
  __shared__ uint64_t words[kWords];
  __shared__ bool skip;
  const int t = threadIdx.x;
  fetch_device_numbers(step);
  if (t < kWords) words[t] = word_of_devices(step, t);
  __syncthreads();
  if (t == 0) {
    decide(step.record, words, *step.record.scalars);
    skip = step.record.scalars->skip != 0.0f;
  }
  __syncthreads();
  if (skip || step.plan.n_rows == 0) return;
  Rules::with(step.rule, [&](auto tag) { prepare_rows<typename decltype(tag)::Rule>(step.plan); });
}

}  // namespace fusedopt
