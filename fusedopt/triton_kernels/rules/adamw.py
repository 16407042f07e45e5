"""AdamW: csrc/rules/adamw.h in Triton, line for line."""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .common import apply_decay, decay_factor, geometric_sum


class Hyper(NamedTuple):
    lerp_weight: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    step_size: tl.tensor
    eps: tl.tensor
    decay: tl.tensor
    lerp_from_grad: tl.tensor


@triton.jit
def variant(lr, weight_decay, decoupled, maximize, beta1, beta2, eps, amsgrad):
    return tl.where(amsgrad != 0, 1, 0)


@triton.jit
def prepare(lr, weight_decay, decoupled, maximize, beta1, beta2, eps, amsgrad, step, n_bits):
    weight1 = (1.0 - beta1).to(tl.float32)
    weight2 = (1.0 - beta2).to(tl.float32)
    beta2 = beta2.to(tl.float32)
    bias_correction1 = weight1.to(tl.float64) * geometric_sum(
        1.0 - weight1.to(tl.float64), step, n_bits
    )
    bias_correction2 = weight2.to(tl.float64) * geometric_sum(beta2.to(tl.float64), step, n_bits)
    root = tl.sqrt(bias_correction2)
    from_grad = weight1 >= 0.5
    return Hyper(
        tl.where(from_grad, -1.0 * (1.0 - weight1), weight1),
        beta2,
        weight2,
        (lr / bias_correction1 * root).to(tl.float32),
        (eps * root).to(tl.float32),
        decay_factor(lr, weight_decay, decoupled),
        tl.where(from_grad, 1.0, 0.0),
    )


@triton.jit
def update(h, kind, grad, param, exp_avg, exp_avg_sq, max_exp_avg_sq, STATES: tl.constexpr):
    grad, param = apply_decay(h.decay, kind, grad, param)
    exp_avg = tl.fma(
        h.lerp_weight, grad - exp_avg, tl.where(h.lerp_from_grad != 0.0, grad, exp_avg)
    )
    exp_avg_sq = tl.fma(h.one_minus_beta2 * grad, grad, h.beta2 * exp_avg_sq)
    second_moment = exp_avg_sq
    if STATES == 3:
        larger = (exp_avg_sq > max_exp_avg_sq) | (exp_avg_sq != exp_avg_sq)
        max_exp_avg_sq = tl.where(larger, exp_avg_sq, max_exp_avg_sq)
        second_moment = max_exp_avg_sq
    param = param - tl.div_rn(h.step_size * exp_avg, tl.sqrt_rn(second_moment) + h.eps)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq
