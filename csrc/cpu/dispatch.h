// The choice of instruction set, and the parts of the CPU backend that make no pass over memory.
#pragma once

#include "kernels.h"

namespace fusedopt {

// Kernels in this build that this CPU can run, best first; null-terminated.
const Kernels* const* available_kernels();

// The kernels that reduce and update use; at first the best available.
const Kernels& current_kernels();

// Returns false, and changes nothing, when `name` is not available.
bool select_kernels(const char* name);

bool built_with_openmp();

// words -> StepScalars, and a RowStep for each row
void finalize(const PlanView& plan, int rule, const StepRecord& step, const uint64_t* words);

// Writes the rows' step counts, or the count of skipped steps. Runs in the update's own call from
// Python: between two calls a signal's handler may raise, and a step that raised must not count.
void count(const PlanView& plan, int rule, const StepRecord& step);

}  // namespace fusedopt
