// Lion, Chen et al., arXiv:2302.06675.
#pragma once

#include "common.h"

namespace fusedopt {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr int kStates = 1;  // exp_avg
  static constexpr int kAlways = 1;
  static constexpr int kVariants = 1;

  struct Options {
    double lr, weight_decay;
    int64_t decoupled, maximize;
    double beta1, beta2;
    int64_t reserved[2];

    FUSEDOPT_FIELDS(lr, weight_decay, decoupled, maximize, beta1, beta2)
  };

  struct Hyper {
    float minus_lr, beta1, one_minus_beta1, beta2, one_minus_beta2, decay;

    FUSEDOPT_FIELDS(minus_lr, beta1, one_minus_beta1, beta2, one_minus_beta2, decay)
  };

  FUSEDOPT_FN int variant(const Options&) { return 0; }
  FUSEDOPT_FN constexpr int states(int) { return 1; }
  FUSEDOPT_FN float absent(int) { return 0.0f; }

  FUSEDOPT_FN Hyper prepare(const Options& o, int64_t) {
    return {static_cast<float>(-o.lr),         static_cast<float>(o.beta1),
            static_cast<float>(1.0 - o.beta1), static_cast<float>(o.beta2),
            static_cast<float>(1.0 - o.beta2), decay_factor(o)};
  }

  // Zero and NaN do not move a param, as with torch.sign.
  FUSEDOPT_FN float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

  template <int kStates>
  FUSEDOPT_FN void update(const Hyper& h, Kind kind, float grad, float& param, float& exp_avg) {
    apply_decay(h.decay, kind, grad, param);
    param = fma(h.minus_lr, sign(fma(h.one_minus_beta1, grad, h.beta1 * exp_avg)), param);
    exp_avg = fma(h.one_minus_beta2, grad, h.beta2 * exp_avg);
  }
};

}  // namespace fusedopt
