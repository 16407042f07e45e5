// The update rules: pure functions of register values, the one text every C++ and CUDA backend
// runs.
//
// A rule is a struct with
//   Options      one param group as the user gave it (64 bytes, doubles; Python packs it)
//   RowScalars   what depends on a tensor's own step count; finalize() computes it once per step
//   Hyper        the two above as rounded for the kernel
//   update()     one element: grad in, param and states in and out, all fp32 registers; what is the
//                same for a whole tensor (the kind of decay) comes as a value, so that a CPU loop
//                can make it a constant and a CUDA block a uniform branch
// Loads, stores, conversions and tails belong to the driver.
//
// Sources: AdamW, Loshchilov & Hutter, arXiv:1711.05101; AMSGrad, Reddi et al., arXiv:1904.09237;
// order of operations as in torch.optim.
#pragma once

#include "platform.h"

namespace fusedopt {

enum class Rule : int32_t { kAdamW = 0, kSGD = 1 };

constexpr int kOptionsBytes = 64;  // of a group, for every rule; packed by Python

enum class Decay { kNone, kCoupled, kDecoupled };

// What a rule gets as its gradient.
FUSEDOPT_FN float clipped(float grad, float grad_mult, float max_grad_value) {
  float g = grad * grad_mult;
  g = g > max_grad_value ? max_grad_value : g;  // NaN passes both comparisons
  return g < -max_grad_value ? -max_grad_value : g;
}

// Sum of b^i for 0 <= i < t by repeated doubling. For b < 1 it is (1 - b^t) / (1 - b), without the
// cancellation, and it has a value at b == 1 (a beta that rounds to one).
FUSEDOPT_FN double geometric_sum(double b, int64_t t) {
  double sum = 0.0;
  double power = 1.0;
  int bit = 62;
  while (bit > 0 && ((t >> bit) & 1) == 0) --bit;  // leading zeros change neither
  for (; bit >= 0; --bit) {
    sum = sum * (1.0 + power);
    power = power * power;
    if ((t >> bit) & 1) {
      sum = 1.0 + b * sum;
      power = power * b;
    }
  }
  return sum;
}

struct AdamW {
  static constexpr int kStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

  struct Options {
    double lr, weight_decay, beta1, beta2, eps;
    int64_t decoupled, maximize, amsgrad;
  };
  static_assert(sizeof(Options) == kOptionsBytes, "mirrored by fusedopt/adamw.py");

  struct RowScalars {
    float step_size, eps;  // both times sqrt(bias_correction2)
  };

  struct Hyper {
    float lerp_weight, beta2, one_minus_beta2, step_size, eps, decay;
    bool lerp_from_grad;
  };

  // Bias corrections belong to the betas as rounded for the kernel: weight * geometric_sum is what
  // the recurrence accumulates for a constant gradient, so a constant gradient comes out exact.
  // sqrt(bias_correction2) divides sqrt(exp_avg_sq) in torch; here it multiplies numerator and eps,
  // once a step in fp64, which saves each element a division.
  FUSEDOPT_FN RowScalars row_scalars(const Options& o, int64_t step) {
    const double weight1 = static_cast<float>(1.0 - o.beta1);
    const double weight2 = static_cast<float>(1.0 - o.beta2);
    const double beta2 = static_cast<float>(o.beta2);
    const double bias_correction1 = weight1 * geometric_sum(1.0 - weight1, step);
    const double bias_correction2 = weight2 * geometric_sum(beta2, step);
    const double root = sqrt(bias_correction2);
    return {static_cast<float>(o.lr / bias_correction1 * root), static_cast<float>(o.eps * root)};
  }

  FUSEDOPT_FN Decay decay(const Options& o) {
    if (o.weight_decay == 0.0) return Decay::kNone;
    return o.decoupled ? Decay::kDecoupled : Decay::kCoupled;
  }

  FUSEDOPT_FN Hyper hyper(const Options& o, RowScalars row) {
    const double decay = o.decoupled ? -o.lr * o.weight_decay : o.weight_decay;
    // As torch.lerp: from the nearer end, so that a weight of one gives exactly the gradient.
    const float weight = static_cast<float>(1.0 - o.beta1);
    const bool from_grad = weight >= 0.5f;
    return {from_grad ? -(1.0f - weight) : weight,
            static_cast<float>(o.beta2),
            static_cast<float>(1.0 - o.beta2),
            row.step_size,
            row.eps,
            static_cast<float>(decay),
            from_grad};
  }

  template <bool kAmsgrad>
  FUSEDOPT_FN void update(const Hyper& h, Decay decay, float grad, float& param, float& exp_avg,
                          float& exp_avg_sq, float& max_exp_avg_sq) {
    if (decay == Decay::kDecoupled) param = fma(h.decay, param, param);
    if (decay == Decay::kCoupled) grad = fma(h.decay, param, grad);
    exp_avg = fma(h.lerp_weight, grad - exp_avg, h.lerp_from_grad ? grad : exp_avg);
    exp_avg_sq = fma(h.one_minus_beta2 * grad, grad, h.beta2 * exp_avg_sq);
    float second_moment = exp_avg_sq;
    if (kAmsgrad) {
      const bool larger = exp_avg_sq > max_exp_avg_sq || exp_avg_sq != exp_avg_sq;
      max_exp_avg_sq = larger ? exp_avg_sq : max_exp_avg_sq;
      second_moment = max_exp_avg_sq;
    }
    param = param - div(h.step_size * exp_avg, sqrt(second_moment) + h.eps);
  }
};

struct SGD {
  static constexpr int kStates = 1;  // momentum_buffer

  struct Options {
    double lr, weight_decay, momentum, dampening;
    int64_t decoupled, maximize, nesterov, reserved;
  };
  static_assert(sizeof(Options) == kOptionsBytes, "mirrored by fusedopt/sgd.py");

  struct RowScalars {
    float momentum, grad_weight;
  };

  struct Hyper {
    float minus_lr, buffer_momentum, grad_weight, momentum, decay;
  };

  // torch starts the buffer as a copy of the first gradient: no momentum, no dampening.
  FUSEDOPT_FN RowScalars row_scalars(const Options& o, int64_t step) {
    if (step <= 1) return {0.0f, 1.0f};
    return {static_cast<float>(o.momentum), static_cast<float>(1.0 - o.dampening)};
  }

  FUSEDOPT_FN Decay decay(const Options& o) {
    if (o.weight_decay == 0.0) return Decay::kNone;
    return o.decoupled ? Decay::kDecoupled : Decay::kCoupled;
  }

  FUSEDOPT_FN Hyper hyper(const Options& o, RowScalars row) {
    const double decay = o.decoupled ? -o.lr * o.weight_decay : o.weight_decay;
    return {static_cast<float>(-o.lr), row.momentum, row.grad_weight,
            static_cast<float>(o.momentum), static_cast<float>(decay)};
  }

  FUSEDOPT_FN void update(const Hyper& h, Decay decay, bool momentum, bool nesterov, float grad,
                          float& param, float& momentum_buffer) {
    if (decay == Decay::kDecoupled) param = fma(h.decay, param, param);
    if (decay == Decay::kCoupled) grad = fma(h.decay, param, grad);
    if (momentum) {
      momentum_buffer = fma(h.buffer_momentum, momentum_buffer, h.grad_weight * grad);
      grad = nesterov ? fma(h.momentum, momentum_buffer, grad) : momentum_buffer;
    }
    param = fma(h.minus_lr, grad, param);
  }
};

}  // namespace fusedopt
