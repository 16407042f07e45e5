"""The scalars of a step: csrc/scalars.h in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .tables import (
    MEASURED,
    NORM_IS_TWO,
    SKIP_NONFINITE,
    STEP,
    STEP_SCALARS,
    fields_at,
    load,
    read,
    store,
)
from .words import LARGEST, sum_of_squares, word_of


@triton.jit
def inverse_scale(grad_scale):
    inverse = tl.full([], 1.0, tl.float32)
    if grad_scale != 0:
        inverse = (1.0 / load(grad_scale, tl.float32).to(tl.float64)).to(tl.float32)
    return inverse


@triton.jit
def in_range(sum):
    return (sum >= 2.0**-80) & (sum <= 3.4028234663852886e38)


@triton.jit
def rescale_for(largest):
    """A power of two, and the exponent of the power that undoes it in a sum of squares."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.where(exponent < -126, -126, tl.where(exponent > 126, 126, exponent))
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True), 2 * exponent


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def norm_of(flags, words):
    if (flags & NORM_IS_TWO) != 0:
        norm = tl.sqrt(sum_of_squares(words))
    else:
        magnitude = word_of(words, LARGEST).to(tl.int32).to(tl.float32, bitcast=True)
        norm = magnitude.to(tl.float64)
    return norm


@triton.jit
def decide(step, words):
    """Fill in the StepScalars; returns 1 where the step is to be skipped.

    Args:
        step: address of the step's record.
        words: of all gradients.
    """
    step = read(STEP, step)
    measured = (step.flags & MEASURED) != 0
    norm = tl.full([], 0.0, tl.float64)
    if measured:
        norm = norm_of(step.flags, words)
    inv_scale = inverse_scale(step.grad_scale)
    coef = (step.max_grad_norm / (norm + tl.full([], 1e-6, tl.float64))).to(tl.float32)
    coef = tl.where(coef > 1.0, 1.0, coef)  # NaN stays NaN
    clip_coef = tl.where(measured & (step.max_grad_norm >= 0.0), coef, 1.0)
    grad_mult = (clip_coef.to(tl.float64) * inv_scale.to(tl.float64)).to(tl.float32)
    bad_scale = is_finite(inv_scale) == 0
    bad = bad_scale | (is_finite(norm) == 0)
    if step.found_inf != 0:
        bad = bad | (load(step.found_inf, tl.float32) != 0.0)
    skip = bad_scale | (bad & ((step.flags & SKIP_NONFINITE) != 0))
    scalars = fields_at(STEP_SCALARS, step.scalars)
    store(scalars.grad_norm, tl.where(measured, norm.to(tl.float32), float("nan")))
    store(scalars.clip_coef, clip_coef)
    store(scalars.grad_mult, grad_mult)
    store(scalars.inv_scale, inv_scale)
    store(scalars.found_inf, bad.to(tl.float32))
    store(scalars.skip, skip.to(tl.float32))
    if step.inf_flag != 0:
        store(step.inf_flag, bad.to(tl.float32))
    return skip
