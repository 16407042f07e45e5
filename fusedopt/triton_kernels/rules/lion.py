"""Lion: csrc/rules/lion.h in Triton, line for line."""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .common import apply_decay, decay_factor


class Hyper(NamedTuple):
    minus_lr: tl.tensor
    beta1: tl.tensor
    one_minus_beta1: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    decay: tl.tensor


@triton.jit
def variant(lr, weight_decay, decoupled, maximize, beta1, beta2):
    return 0


@triton.jit
def prepare(lr, weight_decay, decoupled, maximize, beta1, beta2, step, n_bits):
    return Hyper(
        (-1.0 * lr).to(tl.float32),
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        decay_factor(lr, weight_decay, decoupled),
    )


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def update(h, kind, grad, param, exp_avg, STATES: tl.constexpr):
    grad, param = apply_decay(h.decay, kind, grad, param)
    param = tl.fma(h.minus_lr, sign(tl.fma(h.one_minus_beta1, grad, h.beta1 * exp_avg)), param)
    exp_avg = tl.fma(h.one_minus_beta2, grad, h.beta2 * exp_avg)
    return param, exp_avg
