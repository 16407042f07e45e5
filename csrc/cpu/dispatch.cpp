#include "dispatch.h"

#include <cstring>

#include "../rules.h"
#include "denormals.h"

namespace fusedopt {
namespace {

struct KernelList {
  const Kernels* items[4] = {};
  const Kernels* current = nullptr;

  KernelList() {
    int n = 0;
#if defined(FUSEDOPT_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      items[n++] = &kernels_avx512;
    }
#endif
#if defined(FUSEDOPT_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      items[n++] = &kernels_avx2;
    }
#endif
    items[n++] = &kernels_generic;
    current = items[0];
  }
};

KernelList& kernel_list() {
  static KernelList list;
  return list;
}

// Lanes by chunk index, then adjacent pairs: the order is fixed, whatever computed the partials.
template <class Combine>
double combine_partials(const PlanView& plan, Combine combine) {
  double lanes[kLanes] = {};
  for (int64_t c = 0; c < plan.n_chunks; ++c) {
    lanes[c % kLanes] = combine(lanes[c % kLanes], plan.partials[c]);
  }
  for (int width = kLanes / 2; width >= 1; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] = combine(lanes[2 * l], lanes[2 * l + 1]);
  }
  return lanes[0];
}

double total(const PlanView& plan, NormType norm_type) {
  if (norm_type == NormType::kTwo) {
    return combine_partials(plan, [](double a, double b) { return a + b; });
  }
  return combine_partials(plan, [](double a, double b) { return larger(a, b); });
}

// Tensors mostly share group and step count, so the last answer is usually the next one.
template <class R>
void prepare_rows(const PlanView& plan, const void* options) {
  const auto* groups = static_cast<const typename R::Options*>(options);
  auto* row_scalars = static_cast<typename R::RowScalars*>(plan.row_scalars);
  typename R::RowScalars memo = {};
  int32_t memo_group = -1;
  int64_t memo_step = -1;
  for (int64_t r = 0; r < plan.n_rows; ++r) {
    const Row& row = plan.rows[r];
    if (!plan.grads[r].present) continue;
    const int64_t step = row.step ? static_cast<int64_t>(*row.step + 1.0f) : 0;
    if (row.group != memo_group || step != memo_step) {
      memo = R::row_scalars(groups[row.group], step);
      memo_group = row.group;
      memo_step = step;
    }
    row_scalars[r] = memo;
  }
}

}  // namespace

const Kernels* const* available_kernels() { return kernel_list().items; }

const Kernels& current_kernels() { return *kernel_list().current; }

bool select_kernels(const char* name) {
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    if (std::strcmp((*k)->name, name) == 0) {
      kernel_list().current = *k;
      return true;
    }
  }
  return false;
}

bool built_with_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

void finalize(const PlanView& plan, Rule rule, const void* options, const StepOptions& step_options,
              const float* grad_scale, const float* found_inf, float* inf_flag,
              StepScalars& scalars) {
  const DenormalsKept denormals_kept;
  const double sum = step_options.measured ? total(plan, step_options.norm_type) : 0.0;
  decide(step_options, sum, grad_scale, found_inf, scalars);
  if (inf_flag) *inf_flag = scalars.found_inf;
  if (scalars.skip != 0.0f) return;
  if (rule == Rule::kAdamW) {
    prepare_rows<AdamW>(plan, options);
  } else {
    prepare_rows<SGD>(plan, options);
  }
}

void count(const PlanView& plan, StepScalars& scalars) {
  scalars.skipped_steps += scalars.skip;
  if (scalars.skip != 0.0f) return;
  for (int64_t r = 0; r < plan.n_rows; ++r) {
    if (plan.grads[r].present && plan.rows[r].step) *plan.rows[r].step += 1.0f;
  }
}

}  // namespace fusedopt
