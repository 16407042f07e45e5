"""Partials to the step's scalars, and every tensor's update: csrc/cuda/finalize.cuh in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .reduce import sum_of_lanes
from .rules import adamw_hyper, adamw_row_scalars, sgd_hyper, sgd_row_scalars
from .scalars import decide, larger
from .tables import (
    COUNT,
    FLAGS,
    GRAD_WORDS,
    LANES,
    MEASURED,
    N_NUMBERS,
    NORM_IS_TWO,
    NUMBER_WORDS,
    OPTIONS_WORDS,
    ROW_STEP_FLOATS,
    ROW_WORDS,
    double,
    word,
)

ROWS = tl.constexpr(64)  # prepared at once
NUMBERS = tl.constexpr(32)  # fetched at once


@triton.jit
def load_partials(partials, c, n_chunks, WHOLE: tl.constexpr):
    """Past the L1 cache: other programs have just written them."""
    pointer = tl.multiple_of(partials.to(tl.pointer_type(tl.float64)), 16) + c + tl.arange(0, LANES)
    if WHOLE:
        return tl.load(pointer, cache_modifier=".cg")
    else:
        inside = c + tl.arange(0, LANES) < n_chunks
        return tl.load(pointer, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def combined(two, a, b):
    return tl.where(two, a + b, larger(a, b))


@triton.jit
def total_of_partials(partials, n_chunks, flags):
    """Lanes by chunk index, then adjacent pairs."""
    two = (flags & NORM_IS_TWO) != 0
    lane = tl.full([LANES], 0.0, tl.float64)
    whole = n_chunks // (2 * LANES) * (2 * LANES)
    for c in range(0, whole, 2 * LANES):  # two rows on their way at once
        first = load_partials(partials, c, n_chunks, True)
        second = load_partials(partials, c + LANES, n_chunks, True)
        lane = combined(two, combined(two, lane, first), second)
    for c in range(whole, n_chunks, LANES):
        lane = combined(two, lane, load_partials(partials, c, n_chunks, False))
    total = sum_of_lanes(lane)
    if two == 0:
        total = tl.max(lane, 0)
        if tl.sum((lane != lane).to(tl.int32), 0) != 0:
            total = tl.full([], float("nan"), tl.float64)
    return total


@triton.jit
def total_of_devices(step, totals, n_totals):
    flags = word(step, FLAGS)
    total = tl.full([], 0.0, tl.float64)
    if (flags & MEASURED) != 0:
        for i in range(n_totals):
            total = combined((flags & NORM_IS_TWO) != 0, total, double(totals, i))
    return total


@triton.jit
def fetch_device_numbers(step, numbers, options):
    """Options that the user keeps on the device."""
    n = word(step, N_NUMBERS)
    for first in range(0, n.to(tl.int32), NUMBERS):
        i = first + tl.arange(0, NUMBERS)
        inside = i < n
        record = numbers.to(tl.pointer_type(tl.int64)) + i * NUMBER_WORDS
        data = tl.load(record, mask=inside, other=0)
        kind = tl.load(record + 1, mask=inside, other=0)
        is_double = (kind >> 32) != 0
        field = kind & 0xFFFFFFFF
        as_double = tl.load(
            data.to(tl.pointer_type(tl.float64)), mask=inside & is_double, other=0.0
        )
        as_float = tl.load(
            data.to(tl.pointer_type(tl.float32)), mask=inside & (is_double == 0), other=0.0
        )
        value = tl.where(is_double, as_double, as_float.to(tl.float64))
        tl.store(options.to(tl.pointer_type(tl.float64)) + field, value, mask=inside)
    tl.debug_barrier()


@triton.jit
def option(options, group, index, active, TYPE: tl.constexpr):
    record = options.to(tl.pointer_type(TYPE)) + group * OPTIONS_WORDS
    return tl.load(record + index, mask=active, other=0)


@triton.jit
def bits_in(largest):
    """Binary digits of a count."""
    n_bits = largest.to(tl.int32) * 0
    while (largest >> n_bits.to(tl.int64)) > 0:
        n_bits += 1
    return n_bits


@triton.jit
def prepare_rows(options, grads, rows, n_rows, row_steps, RULE: tl.constexpr):
    for first in range(0, n_rows, ROWS):
        r = first + tl.arange(0, ROWS)
        inside = r < n_rows
        row = rows.to(tl.pointer_type(tl.int64)) + r.to(tl.int64) * ROW_WORDS
        grad = grads.to(tl.pointer_type(tl.int64)) + r.to(tl.int64) * GRAD_WORDS
        present = (tl.load(grad + 1, mask=inside, other=0) >> 32) != 0
        step = tl.load(row + 5, mask=inside, other=0)
        numel = tl.load(row + 6, mask=inside, other=0)
        group = tl.load(row + 7, mask=inside, other=0) & 0xFFFFFFFF
        active = inside & present & ((numel > 0) | (step != 0))
        counts = active & (step != 0)
        count = tl.load(step.to(tl.pointer_type(tl.float32)), mask=counts, other=0.0)
        count = tl.where(counts, count + 1.0, 0.0)
        t = count.to(tl.int64)
        lr = option(options, group, 0, active, tl.float64)
        weight_decay = option(options, group, 1, active, tl.float64)
        decoupled = option(options, group, 4 if RULE == "sgd" else 5, active, tl.int64)
        if RULE == "adamw":
            beta1 = option(options, group, 2, active, tl.float64)
            beta2 = option(options, group, 3, active, tl.float64)
            eps = option(options, group, 4, active, tl.float64)
            n_bits = bits_in(tl.max(t, 0))
            step_size, row_eps = adamw_row_scalars(lr, beta1, beta2, eps, t, n_bits)
            hyper = adamw_hyper(lr, weight_decay, beta1, beta2, decoupled, step_size, row_eps)
        else:
            momentum = option(options, group, 2, active, tl.float64)
            dampening = option(options, group, 3, active, tl.float64)
            buffer_momentum, grad_weight = sgd_row_scalars(momentum, dampening, t)
            hyper = sgd_hyper(lr, weight_decay, momentum, decoupled, buffer_momentum, grad_weight)
        out = row_steps.to(tl.pointer_type(tl.float32)) + r.to(tl.int64) * ROW_STEP_FLOATS
        for k in tl.static_range(len(hyper)):
            tl.store(out + k, hyper[k], mask=active)
        tl.store(out + COUNT, count, mask=active)


@triton.jit
def finalize_step(
    step, total, options, numbers, grads, rows, n_rows, row_steps, RULE: tl.constexpr
):
    """``total``: over all chunks, of this device alone or of every one that shares the norm."""
    fetch_device_numbers(step, numbers, options)
    if decide(step, total) == 0:
        prepare_rows(options, grads, rows, n_rows, row_steps, RULE)
