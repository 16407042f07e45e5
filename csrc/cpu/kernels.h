// The CPU backend's two passes over memory, compiled once per instruction set; dispatch.cpp picks
// one at run time.
#pragma once

#include "../rules.h"
#include "../scalars.h"

namespace fusedopt {

struct Kernels {
  const char* name;
  // gradients -> words, which start as zeros
  void (*reduce)(const PlanView& plan, const StepRecord& step, uint64_t* words, int num_threads);
  // gradients, params, states -> params, states
  void (*update)(const PlanView& plan, int rule, const StepRecord& step, int num_threads);
};

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace fusedopt
