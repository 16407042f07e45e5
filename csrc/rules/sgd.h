// Stochastic gradient descent with momentum; order of operations as in torch.optim.
#pragma once

#include "common.h"

namespace fusedopt {

struct SGD {
  static constexpr const char* kName = "sgd";
  static constexpr int kStates = 1;  // momentum_buffer, with momentum
  static constexpr int kAlways = 0;
  static constexpr int kVariants = 3;
  enum Variant { kPlain, kMomentum, kNesterov };

  struct Options {
    double lr, weight_decay;
    int64_t decoupled, maximize;
    double momentum, dampening;
    int64_t nesterov, reserved;

    FUSEDOPT_FIELDS(lr, weight_decay, decoupled, maximize, momentum, dampening, nesterov)
  };

  struct Hyper {
    float minus_lr, buffer_momentum, grad_weight, momentum, decay;

    FUSEDOPT_FIELDS(minus_lr, buffer_momentum, grad_weight, momentum, decay)
  };

  FUSEDOPT_FN int variant(const Options& o) {
    if (o.momentum == 0.0) return kPlain;
    return o.nesterov ? kNesterov : kMomentum;
  }
  FUSEDOPT_FN constexpr int states(int variant) { return variant == kPlain ? 0 : 1; }
  FUSEDOPT_FN float absent(int) { return 0.0f; }

  // torch starts the buffer as a copy of the first gradient: no momentum, no dampening.
  FUSEDOPT_FN Hyper prepare(const Options& o, int64_t step) {
    const bool first = step <= 1;
    return {static_cast<float>(-o.lr), first ? 0.0f : static_cast<float>(o.momentum),
            first ? 1.0f : static_cast<float>(1.0 - o.dampening), static_cast<float>(o.momentum),
            decay_factor(o)};
  }

  template <int kStates>
  FUSEDOPT_FN void update(const Hyper& h, Kind kind, float grad, float& param,
                          float& momentum_buffer) {
    apply_decay(h.decay, kind, grad, param);
    if (kStates == 1 && kind.variant != kPlain) {
      momentum_buffer = fma(h.buffer_momentum, momentum_buffer, h.grad_weight * grad);
      const bool nesterov = kind.variant == kNesterov;
      grad = nesterov ? fma(h.momentum, momentum_buffer, grad) : momentum_buffer;
    }
    param = fma(h.minus_lr, grad, param);
  }
};

}  // namespace fusedopt
