"""The update rules: csrc/rules.h in Triton, line for line.

The same pure functions under the same names, in the same order, on blocks instead of registers.
Loads, stores, conversions and tails belong to ``update.py``. Where a line looks odd, the reason
stands in csrc/rules.h; tests/triton_backend/test_triton_rules.py holds both texts to one table of
cases.
``-1.0 * x`` and not ``-x``, which before Triton 3.8 is ``0 - x`` and loses the sign of a zero.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

# enum class Decay
DECAY_NONE = tl.constexpr(0)
DECAY_COUPLED = tl.constexpr(1)
DECAY_DECOUPLED = tl.constexpr(2)


@triton.jit
def clipped(grad, grad_mult, max_grad_value):
    g = grad * grad_mult
    g = tl.where(g > max_grad_value, max_grad_value, g)  # NaN passes both comparisons
    return tl.where(g < -1.0 * max_grad_value, -1.0 * max_grad_value, g)


@triton.jit
def geometric_sum(b, t, n_bits):  # n_bits: of the longest t; leading zeros change neither
    sum = tl.full(t.shape, 0.0, tl.float64)
    power = tl.full(t.shape, 1.0, tl.float64)
    for i in range(n_bits):
        bit = tl.cast(n_bits - 1 - i, tl.int64)
        sum = sum * (1.0 + power)
        power = power * power
        odd = ((t >> bit) & 1) != 0
        sum = tl.where(odd, 1.0 + b * sum, sum)
        power = tl.where(odd, power * b, power)
    return sum


# ---- struct AdamW -------------------------------------------------------------------------------


@triton.jit
def adamw_row_scalars(lr, beta1, beta2, eps, step, n_bits):
    weight1 = (1.0 - beta1).to(tl.float32).to(tl.float64)
    weight2 = (1.0 - beta2).to(tl.float32).to(tl.float64)
    beta2 = beta2.to(tl.float32).to(tl.float64)
    bias_correction1 = weight1 * geometric_sum(1.0 - weight1, step, n_bits)
    bias_correction2 = weight2 * geometric_sum(beta2, step, n_bits)
    root = tl.sqrt(bias_correction2)
    return (lr / bias_correction1 * root).to(tl.float32), (eps * root).to(tl.float32)


@triton.jit
def decay_kind(weight_decay, decoupled):
    kind = tl.where(decoupled != 0, DECAY_DECOUPLED, DECAY_COUPLED)
    return tl.where(weight_decay == 0.0, DECAY_NONE, kind)


@triton.jit
def adamw_hyper(lr, weight_decay, beta1, beta2, decoupled, step_size, eps):
    decay = tl.where(decoupled != 0, -1.0 * lr * weight_decay, weight_decay)
    weight = (1.0 - beta1).to(tl.float32)
    from_grad = weight >= 0.5
    return (
        tl.where(from_grad, -1.0 * (1.0 - weight), weight),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        step_size,
        eps,
        decay.to(tl.float32),
        from_grad.to(tl.float32),
    )


@triton.jit
def adamw_update(h, decay, grad, param, exp_avg, exp_avg_sq, max_exp_avg_sq, AMSGRAD: tl.constexpr):
    lerp_weight, beta2, one_minus_beta2, step_size, eps, h_decay, lerp_from_grad = h
    if decay == DECAY_DECOUPLED:
        param = tl.fma(h_decay, param, param)
    if decay == DECAY_COUPLED:
        grad = tl.fma(h_decay, param, grad)
    exp_avg = tl.fma(lerp_weight, grad - exp_avg, tl.where(lerp_from_grad != 0.0, grad, exp_avg))
    exp_avg_sq = tl.fma(one_minus_beta2 * grad, grad, beta2 * exp_avg_sq)
    second_moment = exp_avg_sq
    if AMSGRAD:
        larger = (exp_avg_sq > max_exp_avg_sq) | (exp_avg_sq != exp_avg_sq)
        max_exp_avg_sq = tl.where(larger, exp_avg_sq, max_exp_avg_sq)
        second_moment = max_exp_avg_sq
    param = param - tl.div_rn(step_size * exp_avg, tl.sqrt_rn(second_moment) + eps)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


# ---- struct SGD ---------------------------------------------------------------------------------


@triton.jit
def sgd_row_scalars(momentum, dampening, step):
    first = step <= 1
    return (
        tl.where(first, 0.0, momentum).to(tl.float32),
        tl.where(first, 1.0, 1.0 - dampening).to(tl.float32),
    )


@triton.jit
def sgd_hyper(lr, weight_decay, momentum, decoupled, buffer_momentum, grad_weight):
    decay = tl.where(decoupled != 0, -1.0 * lr * weight_decay, weight_decay)
    return (
        (-1.0 * lr).to(tl.float32),
        buffer_momentum,
        grad_weight,
        momentum.to(tl.float32),
        decay.to(tl.float32),
    )


@triton.jit
def sgd_update(h, decay, momentum, nesterov, grad, param, momentum_buffer):
    minus_lr, buffer_momentum, grad_weight, h_momentum, h_decay = h
    if decay == DECAY_DECOUPLED:
        param = tl.fma(h_decay, param, param)
    if decay == DECAY_COUPLED:
        grad = tl.fma(h_decay, param, grad)
    if momentum:
        momentum_buffer = tl.fma(buffer_momentum, momentum_buffer, grad_weight * grad)
        grad = tl.where(nesterov, tl.fma(h_momentum, momentum_buffer, grad), momentum_buffer)
    param = tl.fma(minus_lr, grad, param)
    return param, momentum_buffer
