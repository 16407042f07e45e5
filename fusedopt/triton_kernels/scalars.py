"""What one step needs to know besides the tensors: csrc/scalars.h in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .tables import (
    FLAGS,
    FOUND_INF,
    GRAD_SCALE,
    INF_FLAG,
    MAX_GRAD_NORM,
    MEASURED,
    NORM_IS_TWO,
    SCALARS,
    SKIP_NONFINITE,
    double,
    set_single,
    single,
    word,
)

# struct StepScalars
S_GRAD_NORM = tl.constexpr(0)
S_CLIP_COEF = tl.constexpr(1)
S_GRAD_MULT = tl.constexpr(2)
S_INV_SCALE = tl.constexpr(3)
S_FOUND_INF = tl.constexpr(4)
S_SKIP = tl.constexpr(5)
S_SKIPPED_STEPS = tl.constexpr(6)


@triton.jit
def inverse_scale(grad_scale):
    inverse = tl.full([], 1.0, tl.float32)
    if grad_scale != 0:
        inverse = (1.0 / single(grad_scale, 0).to(tl.float64)).to(tl.float32)
    return inverse


@triton.jit
def in_range(sum):
    return (sum >= 2.0**-80) & (sum <= 3.4028234663852886e38)


@triton.jit
def rescale_for(largest):
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.where(exponent < -126, -126, tl.where(exponent > 126, 126, exponent))
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def larger(a, b):
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def decide(step, total):
    """Fill in the StepScalars; returns 1 where the step is to be skipped.

    Args:
        step: address of the step's header.
        total: fp64 sum of squares, or largest magnitude, of all gradients.
    """
    flags = word(step, FLAGS)
    measured = (flags & MEASURED) != 0
    max_grad_norm = double(step, MAX_GRAD_NORM)
    scalars = word(step, SCALARS)
    norm = tl.where((flags & NORM_IS_TWO) != 0, tl.sqrt(total), total)
    inv_scale = inverse_scale(word(step, GRAD_SCALE))
    coef = (max_grad_norm / (norm + tl.full([], 1e-6, tl.float64))).to(tl.float32)
    coef = tl.where(coef > 1.0, 1.0, coef)  # NaN stays NaN
    clip_coef = tl.where(measured & (max_grad_norm >= 0.0), coef, 1.0)
    grad_mult = (clip_coef.to(tl.float64) * inv_scale.to(tl.float64)).to(tl.float32)
    bad_scale = is_finite(inv_scale) == 0
    bad = bad_scale | (measured & (is_finite(total) == 0))
    found_inf = word(step, FOUND_INF)
    if found_inf != 0:
        bad = bad | (single(found_inf, 0) != 0.0)
    skip = bad_scale | (bad & ((flags & SKIP_NONFINITE) != 0))
    set_single(scalars, S_GRAD_NORM, tl.where(measured, norm.to(tl.float32), float("nan")))
    set_single(scalars, S_CLIP_COEF, clip_coef)
    set_single(scalars, S_GRAD_MULT, grad_mult)
    set_single(scalars, S_INV_SCALE, inv_scale)
    set_single(scalars, S_FOUND_INF, bad.to(tl.float32))
    set_single(scalars, S_SKIP, skip.to(tl.float32))
    inf_flag = word(step, INF_FLAG)
    if inf_flag != 0:
        set_single(inf_flag, 0, bad.to(tl.float32))
    return skip
