// What one step needs to know besides the tensors: norm, clip coefficient, skip decision.
#pragma once

#include "platform.h"

namespace fusedopt {

enum class NormType : int32_t { kTwo = 2, kInf = 0 };

// Lives on the device as eight floats; Python reads the fields by index.
struct StepScalars {
  float grad_norm;      // of the unscaled gradients, before clipping; NaN when not measured
  float clip_coef;      // min(1, max_grad_norm / (grad_norm + 1e-6))
  float grad_mult;      // the single factor update applies: clip_coef / grad_scale
  float inv_scale;      // 1 / grad_scale, the reciprocal taken in fp64 as GradScaler does
  float found_inf;      // 1: some gradient element is inf or NaN
  float skip;           // 1: this step moves nothing
  float skipped_steps;  // running count
  float reserved;
};
static_assert(sizeof(StepScalars) == 32, "mirrored by fusedopt/plan.py");

struct StepOptions {
  double max_grad_norm;  // negative: no clipping
  NormType norm_type;
  bool measured;        // reduce ran, so the partials are this step's
  bool skip_nonfinite;  // a scaler is in charge, or the user asked
};

constexpr double kClipEpsilon = 1e-6;  // torch.nn.utils.clip_grad_norm_

FUSEDOPT_FN float inverse_scale(const float* grad_scale) {
  return grad_scale ? static_cast<float>(1.0 / static_cast<double>(*grad_scale)) : 1.0f;
}

// Whether the sum of squares of a chunk neither over- nor underflowed fp32; false for NaN.
FUSEDOPT_FN bool in_range(float sum) { return sum >= 0x1p-80f && sum <= 0x1.fffffep127f; }

// Otherwise the chunk is summed once more, scaled by a power of two to around one. Finite elements
// thus have a finite sum; an inf or NaN element is the only way to a non-finite partial.
struct Rescale {
  float scale;
  double unscale;  // its reciprocal
};

FUSEDOPT_FN Rescale rescale_for(float largest) {
  int exponent = static_cast<int>(bits_of(largest) >> 23) - 127;
  exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
  const float scale = float_of(static_cast<uint32_t>(127 - exponent) << 23);
  return {scale, 1.0 / static_cast<double>(scale)};
}

// The larger magnitude, with NaN above all: how partials of the inf-norm combine.
FUSEDOPT_FN double larger(double a, double b) { return b > a || b != b ? b : a; }

FUSEDOPT_FN bool is_finite(double x) { return x - x == 0.0; }

// total: sum of squares (norm 2) or maximum magnitude (norm inf) over all chunks. It is non-finite
// exactly when some element is: a chunk's partial of finite elements never overflows. A scale that
// has no finite reciprocal (0, below 2^-128, NaN) would make every param NaN: nobody can ask for
// that. Counting a skip is left to whoever can no longer fail.
FUSEDOPT_FN void decide(const StepOptions& o, double total, const float* grad_scale,
                        const float* found_inf, StepScalars& s) {
  const double norm = o.norm_type == NormType::kTwo ? sqrt(total) : total;
  s.inv_scale = inverse_scale(grad_scale);
  s.grad_norm = o.measured ? static_cast<float>(norm) : float_of(0x7fc00000u);
  s.clip_coef = 1.0f;
  if (o.measured && o.max_grad_norm >= 0.0) {
    const float coef = static_cast<float>(o.max_grad_norm / (norm + kClipEpsilon));
    s.clip_coef = coef > 1.0f ? 1.0f : coef;  // NaN stays NaN
  }
  s.grad_mult =
      static_cast<float>(static_cast<double>(s.clip_coef) * static_cast<double>(s.inv_scale));
  // `!= 0`, not `== 1`: GradScaler passes the sum of one flag per device.
  const bool bad_scale = !is_finite(static_cast<double>(s.inv_scale));
  const bool bad =
      bad_scale || (o.measured && !is_finite(total)) || (found_inf && *found_inf != 0.0f);
  s.found_inf = bad ? 1.0f : 0.0f;
  s.skip = bad_scale || (bad && o.skip_nonfinite) ? 1.0f : 0.0f;
}

}  // namespace fusedopt
