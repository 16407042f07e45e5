"""The scalars of a step: csrc/scalars.h in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fusedopt.backends import records

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
from .words import (
    ABORT,
    BAD_SCALE,
    DIGITS,
    FINGERPRINTS,
    FOUND_INF,
    LARGEST,
    SLOTS,
    VOTES,
    no_words,
    sum_of_squares,
    voted,
    word_of,
)

BY_ABORT = tl.constexpr(records.BY_ABORT)
BY_OPTIONS = tl.constexpr(records.BY_OPTIONS)


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
def scaler_found_inf(step):
    found = tl.full([], 0, tl.int1)
    if step.found_inf != 0:
        found = load(step.found_inf, tl.float32) != 0.0
    return found


@triton.jit
def words_of_rank(step):
    """What a rank adds to its words, before the ranks add them up."""
    words = no_words()
    slot = tl.arange(0, SLOTS)
    if step.n_ranks != 0:
        bad_scale = is_finite(inverse_scale(step.grad_scale)) == 0
        votes = scaler_found_inf(step).to(tl.int64) * FOUND_INF
        votes += bad_scale.to(tl.int64) * BAD_SCALE
        words = tl.where(slot == VOTES, votes, words)
        if (step.flags & NORM_IS_TWO) != 0:
            words = tl.where(slot == LARGEST, FINGERPRINTS * 256 + step.fingerprint, words)
        else:
            words = tl.where(slot == DIGITS - 2, step.fingerprint, words)
            words = tl.where(slot == DIGITS - 1, FINGERPRINTS - step.fingerprint, words)
    return words


@triton.jit
def refusal(step, words):
    """Why no rank may do this step, as the host reads it; zero: all may."""
    refused = tl.full([], 0, tl.int32)
    if step.n_ranks != 0:
        largest = word_of(words, LARGEST).to(tl.int64)
        if (step.flags & NORM_IS_TWO) != 0:
            alike = largest == step.n_ranks * (FINGERPRINTS * 256 + step.fingerprint)
        else:
            both = word_of(words, DIGITS - 2).to(tl.int64) + word_of(words, DIGITS - 1).to(tl.int64)
            alike = (largest < FINGERPRINTS) & (both == FINGERPRINTS)
        refused = tl.where(alike, 0, BY_OPTIONS)
        refused = tl.where(voted(word_of(words, VOTES).to(tl.int64), ABORT), BY_ABORT, refused)
    return refused


@triton.jit
def decide(step, words):
    """Fill in the StepScalars; returns 1 where the step is to be skipped.

    Args:
        step: address of the step's record.
        words: of all gradients.
    """
    step = read(STEP, step)
    refused = refusal(step, words)
    if refused != 0:
        store(step.refusal, refused)
        store(fields_at(STEP_SCALARS, step.scalars).skip, tl.full([], 2.0, tl.float32))
        if step.inf_flag != 0:  # as after any step that fails
            store(step.inf_flag, tl.full([], 0.0, tl.float32))
        skip = tl.full([], 1, tl.int1)
    else:
        skip = decide_alike(step, words)
    return skip


@triton.jit
def decide_alike(step, words):
    """``decide`` for a step that no rank refuses."""
    measured = (step.flags & MEASURED) != 0
    norm = tl.full([], 0.0, tl.float64)
    if measured:
        norm = norm_of(step.flags, words)
    inv_scale = inverse_scale(step.grad_scale)
    coef = (step.max_grad_norm / (norm + tl.full([], 1e-6, tl.float64))).to(tl.float32)
    coef = tl.where(coef > 1.0, 1.0, coef)  # NaN stays NaN
    clip_coef = tl.where(measured & (step.max_grad_norm >= 0.0), coef, 1.0)
    grad_mult = (clip_coef.to(tl.float64) * inv_scale.to(tl.float64)).to(tl.float32)
    bad_scale, found = is_finite(inv_scale) == 0, scaler_found_inf(step)
    if step.n_ranks != 0:
        votes = word_of(words, VOTES).to(tl.int64)
        bad_scale, found = voted(votes, BAD_SCALE), voted(votes, FOUND_INF)
    bad = bad_scale | (is_finite(norm) == 0) | found
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
