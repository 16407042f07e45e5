// AdamW, Loshchilov & Hutter, arXiv:1711.05101; AMSGrad, Reddi et al., arXiv:1904.09237; order of
// operations as in torch.optim.
#pragma once

#include "common.h"

namespace fusedopt {

struct AdamW {
  static constexpr const char* kName = "adamw";
  static constexpr int kStates = 3;  // exp_avg, exp_avg_sq; max_exp_avg_sq with amsgrad
  static constexpr int kAlways = 2;
  static constexpr int kVariants = 2;

  struct Options {
    double lr, weight_decay;
    int64_t decoupled, maximize;
    double beta1, beta2, eps;
    int64_t amsgrad;

    FUSEDOPT_FIELDS(lr, weight_decay, decoupled, maximize, beta1, beta2, eps, amsgrad)
  };

  struct Hyper {
    float lerp_weight, beta2, one_minus_beta2, step_size, eps, decay, lerp_from_grad;

    FUSEDOPT_FIELDS(lerp_weight, beta2, one_minus_beta2, step_size, eps, decay, lerp_from_grad)
  };

  FUSEDOPT_FN int variant(const Options& o) { return o.amsgrad ? 1 : 0; }
  FUSEDOPT_FN constexpr int states(int variant) { return 2 + variant; }
  FUSEDOPT_FN float absent(int) { return float_of(0xff800000u); }  // below any second moment

  // Bias corrections come from the betas as rounded for the kernel. weight * geometric_sum is the
  // value of the recurrence for a constant gradient of one, so a constant gradient comes out exact.
  // torch divides sqrt(exp_avg_sq) by sqrt(bias_correction2). Here that root multiplies the
  // numerator and eps, once a step in fp64: each element saves a division.
  FUSEDOPT_FN Hyper prepare(const Options& o, int64_t step) {
    const float weight1 = static_cast<float>(1.0 - o.beta1);
    const float weight2 = static_cast<float>(1.0 - o.beta2);
    const float beta2 = static_cast<float>(o.beta2);
    const double bias_correction1 =
        static_cast<double>(weight1) * geometric_sum(1.0 - static_cast<double>(weight1), step);
    const double bias_correction2 = static_cast<double>(weight2) * geometric_sum(beta2, step);
    const double root = sqrt(bias_correction2);
    const bool from_grad = weight1 >= 0.5f;  // as torch.lerp, so that a weight of one is exact
    return {from_grad ? -(1.0f - weight1) : weight1,
            beta2,
            weight2,
            static_cast<float>(o.lr / bias_correction1 * root),
            static_cast<float>(o.eps * root),
            decay_factor(o),
            from_grad ? 1.0f : 0.0f};
  }

  template <int kStates>
  FUSEDOPT_FN void update(const Hyper& h, Kind kind, float grad, float& param, float& exp_avg,
                          float& exp_avg_sq, float& max_exp_avg_sq) {
    apply_decay(h.decay, kind, grad, param);
    exp_avg = fma(h.lerp_weight, grad - exp_avg, bits_of(h.lerp_from_grad) ? grad : exp_avg);
    exp_avg_sq = fma(h.one_minus_beta2 * grad, grad, h.beta2 * exp_avg_sq);
    float second_moment = exp_avg_sq;
    if (kStates == 3) {
      const bool larger = exp_avg_sq > max_exp_avg_sq || exp_avg_sq != exp_avg_sq;
      max_exp_avg_sq = larger ? exp_avg_sq : max_exp_avg_sq;
      second_moment = max_exp_avg_sq;
    }
    param = param - div(h.step_size * exp_avg, sqrt(second_moment) + h.eps);
  }
};

}  // namespace fusedopt
