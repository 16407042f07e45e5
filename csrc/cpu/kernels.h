// The CPU backend's verbs, compiled once per instruction set; dispatch.cpp picks one at run time.
#pragma once

#include "../plan.h"
#include "../rules.h"
#include "../scalars.h"

namespace fusedopt {

struct UpdateArgs {
  Rule rule;
  const void* options;  // Rule::Options[n_groups]
  float grad_mult;
  float max_grad_value;
};

struct Kernels {
  const char* name;
  // gradients -> plan.partials
  void (*reduce)(const PlanView& plan, NormType norm_type, float inv_scale, int num_threads);
  // gradients, params, states -> params, states
  void (*update)(const PlanView& plan, const UpdateArgs& args, int num_threads);
};

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace fusedopt
