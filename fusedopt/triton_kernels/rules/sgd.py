"""SGD: csrc/rules/sgd.h in Triton, line for line."""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .common import apply_decay, decay_factor

# enum Variant
PLAIN = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
NESTEROV = tl.constexpr(2)


class Hyper(NamedTuple):
    minus_lr: tl.tensor
    buffer_momentum: tl.tensor
    grad_weight: tl.tensor
    momentum: tl.tensor
    decay: tl.tensor


@triton.jit
def variant(lr, weight_decay, decoupled, maximize, momentum, dampening, nesterov):
    moving = tl.where(nesterov != 0, NESTEROV, MOMENTUM)
    return tl.where(momentum == 0.0, PLAIN, moving)


@triton.jit
def prepare(
    lr, weight_decay, decoupled, maximize, momentum, dampening, nesterov, step, n_bits
):  # fmt: skip
    first = step <= 1
    return Hyper(
        (-1.0 * lr).to(tl.float32),
        tl.where(first, 0.0, momentum.to(tl.float32)),
        tl.where(first, 1.0, (1.0 - dampening).to(tl.float32)),
        momentum.to(tl.float32),
        decay_factor(lr, weight_decay, decoupled),
    )


@triton.jit
def update(h, kind, grad, param, momentum_buffer, STATES: tl.constexpr):
    grad, param = apply_decay(h.decay, kind, grad, param)
    if kind.variant != PLAIN:
        momentum_buffer = tl.fma(h.buffer_momentum, momentum_buffer, h.grad_weight * grad)
        nesterov = kind.variant == NESTEROV
        grad = tl.where(nesterov, tl.fma(h.momentum, momentum_buffer, grad), momentum_buffer)
    param = tl.fma(h.minus_lr, grad, param)
    return param, momentum_buffer
