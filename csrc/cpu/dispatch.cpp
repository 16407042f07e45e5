#include "dispatch.h"

#include <cstring>

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

// Most tensors share group and step count with the one before, and copy its result.
template <class R>
void prepare_rows(const PlanView& plan) {
  const auto* groups = static_cast<const typename R::Options*>(plan.options);
  auto* row_steps = static_cast<RowStep<R>*>(plan.row_steps);
  int64_t known = -1;
  for (int64_t r = 0; r < plan.n_rows; ++r) {
    const Row& row = plan.rows[r];
    if (!plan.grads[r].present) continue;
    const float step = row.step ? *row.step + 1.0f : 0.0f;
    const bool same =
        known >= 0 && row.group == plan.rows[known].group && step == row_steps[known].step;
    row_steps[r] = same ? row_steps[known] : row_step<R>(groups[row.group], step);
    known = r;
  }
}

template <class R>
void write_step_counts(const PlanView& plan) {
  const auto* row_steps = static_cast<const RowStep<R>*>(plan.row_steps);
  for (int64_t r = 0; r < plan.n_rows; ++r) {
    if (plan.grads[r].present && plan.rows[r].step) *plan.rows[r].step = row_steps[r].step;
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

void finalize(const PlanView& plan, int rule, const StepRecord& step, const uint64_t* words) {
  const DenormalsKept denormals_kept;
  decide(step, words, *step.scalars);
  if (step.scalars->skip != 0.0f) return;
  Rules::with(rule, [&](auto tag) { prepare_rows<typename decltype(tag)::Rule>(plan); });
}

void count(const PlanView& plan, int rule, const StepRecord& step) {
  if (step.scalars->skip == 1.0f) step.scalars->skipped_steps += 1.0f;
  if (step.scalars->skip != 0.0f) return;
  Rules::with(rule, [&](auto tag) { write_step_counts<typename decltype(tag)::Rule>(plan); });
}

}  // namespace fusedopt
