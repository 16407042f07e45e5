// The CPU backend as seen from the bindings: three verbs and the choice of instruction set.
#pragma once

#include "kernels.h"

namespace fusedopt {

// Instruction sets this build holds and this CPU runs, best first; null-terminated.
const Kernels* const* available_kernels();

// What reduce and update use. Starts as the best one available.
const Kernels& current_kernels();

// Returns false, and changes nothing, when `name` is not available.
bool select_kernels(const char* name);

bool built_with_openmp();

// Partials and counters -> StepScalars and RowScalars. inf_flag (may be null) is the tensor
// GradScaler.update() will read.
void finalize(const PlanView& plan, Rule rule, const void* options, const StepOptions& step_options,
              const float* grad_scale, const float* found_inf, float* inf_flag,
              StepScalars& scalars);

// The rows' step counts, or the count of skipped steps. Belongs to the update, in the same call
// from Python: a signal's handler may raise between two calls, and a step that raised has not
// counted.
void count(const PlanView& plan, StepScalars& scalars);

}  // namespace fusedopt
