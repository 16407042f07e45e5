// The choice of instruction set, and what of the CPU backend is no pass over memory.
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

// words -> StepScalars, and a RowStep for each row
void finalize(const PlanView& plan, int rule, const StepRecord& step, const uint64_t* words);

// The rows' step counts, or the count of skipped steps. Belongs to the update, in the same call
// from Python: a signal's handler may raise between two calls, and a step that raised has not
// counted.
void count(const PlanView& plan, int rule, const StepRecord& step);

}  // namespace fusedopt
