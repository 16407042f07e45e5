"""Functions that the rules share: csrc/rules/common.h in Triton, line for line.

The C++ file explains lines that look odd; test_triton_rules.py tests both with one table of cases.
Write ``-1.0 * x``, not ``-x``: before Triton 3.8 that is ``0 - x``, which loses the sign of a zero.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# enum class Decay
NONE = tl.constexpr(0)
COUPLED = tl.constexpr(1)
DECOUPLED = tl.constexpr(2)


class Kind(NamedTuple):
    decay: tl.tensor
    variant: tl.tensor


@triton.jit
def kind_of(weight_decay, decoupled, variant):
    decay = tl.where(decoupled != 0, DECOUPLED, COUPLED)
    return Kind(tl.where(weight_decay == 0.0, NONE, decay), variant)


@triton.jit
def decay_factor(lr, weight_decay, decoupled):
    return tl.where(decoupled != 0, -1.0 * lr * weight_decay, weight_decay).to(tl.float32)


@triton.jit
def apply_decay(factor, kind, grad, param):
    if kind.decay == DECOUPLED:
        param = tl.fma(factor, param, param)
    if kind.decay == COUPLED:
        grad = tl.fma(factor, param, grad)
    return grad, param


@triton.jit
def clipped(grad, grad_mult, max_grad_value):
    g = grad * grad_mult
    g = tl.where(g > max_grad_value, max_grad_value, g)  # NaN stays NaN
    return tl.where(g < -1.0 * max_grad_value, -1.0 * max_grad_value, g)


@triton.jit
def geometric_sum(b, t, n_bits):  # n_bits: of the longest t; leading zeros change no value
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
