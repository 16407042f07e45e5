// Types and functions that the rules share.
#pragma once

#include "../fields.h"
#include "../platform.h"

namespace fusedopt {

constexpr int kOptionsBytes = 64;  // of a group, for every rule; packed by Python

enum class Decay { kNone, kCoupled, kDecoupled };
constexpr int kDecays = 3;

struct Kind {
  Decay decay;
  int variant;
};

template <class R>
FUSEDOPT_FN Kind kind_of(const typename R::Options& o) {
  const Decay decay = o.decoupled ? Decay::kDecoupled : Decay::kCoupled;
  return {o.weight_decay == 0.0 ? Decay::kNone : decay, R::variant(o)};
}

// Weight decay adds the param times this factor, to the param or to the gradient.
template <class Options>
FUSEDOPT_FN float decay_factor(const Options& o) {
  return static_cast<float>(o.decoupled ? -o.lr * o.weight_decay : o.weight_decay);
}

FUSEDOPT_FN void apply_decay(float factor, Kind kind, float& grad, float& param) {
  if (kind.decay == Decay::kDecoupled) param = fma(factor, param, param);
  if (kind.decay == Decay::kCoupled) grad = fma(factor, param, grad);
}

// The gradient that a rule gets.
FUSEDOPT_FN float clipped(float grad, float grad_mult, float max_grad_value) {
  float g = grad * grad_mult;
  g = g > max_grad_value ? max_grad_value : g;  // NaN stays NaN
  return g < -max_grad_value ? -max_grad_value : g;
}

// Sum of b^i for 0 <= i < t by repeated doubling. For b < 1 it is (1 - b^t) / (1 - b), without the
// cancellation, and it has a value at b == 1 (a beta that rounds to one).
FUSEDOPT_FN double geometric_sum(double b, int64_t t) {
  double sum = 0.0;
  double power = 1.0;
  int bit = 62;
  while (bit > 0 && ((t >> bit) & 1) == 0) --bit;  // leading zeros change no value
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

// The result of finalize for the update of one tensor.
template <class R>
struct alignas(32) RowStep {
  typename R::Hyper hyper;
  float step;  // the number of this step, if it is applied
};

template <class R>
FUSEDOPT_FN RowStep<R> row_step(const typename R::Options& options, float step) {
  return {R::prepare(options, static_cast<int64_t>(step)), step};
}

template <class R>
struct RuleTag {
  using Rule = R;
};

template <class... R>
struct RuleList {
  static constexpr int kCount = sizeof...(R);

  // Calls visit(RuleTag<R>()) for the rule at `index`. `visit` is a host or a device function.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
  template <class Visit>
  FUSEDOPT_MEMBER static void with(int index, const Visit& visit) {
    int i = 0;
    ((i++ == index ? visit(RuleTag<R>()) : void()), ...);
  }
};

}  // namespace fusedopt
