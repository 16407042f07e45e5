"""Words to the step's scalars, and every tensor's update: csrc/cuda/finalize.cuh in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .scalars import decide
from .tables import (
    GRAD_BYTES,
    GRAD_PRESENT,
    N_NUMBERS,
    NUMBER_BYTES,
    NUMBER_DATA,
    NUMBER_FIELD,
    NUMBER_IS_DOUBLE,
    OPTIONS_BYTES,
    ROW_BYTES,
    ROW_GROUP,
    ROW_NUMEL,
    ROW_STEP,
    load,
    load_if,
    options_of,
    store_if,
)
from .words import WORDS, combined, load_words, no_words

ROWS = tl.constexpr(64)  # prepared at once
NUMBERS = tl.constexpr(32)  # fetched at once


@triton.jit
def words_of_devices(words, n_devices):
    total = no_words()
    for i in range(n_devices):
        total = combined(total, load_words(words + i * WORDS * 8))
    return total


@triton.jit
def fetch_device_numbers(step, numbers, options):
    """Options that the user keeps on the device."""
    n = load(step + N_NUMBERS, tl.int64).to(tl.int32)
    for first in range(0, n, NUMBERS):
        i = first + tl.arange(0, NUMBERS)
        inside = i < n
        record = numbers + i.to(tl.int64) * NUMBER_BYTES
        data = load_if(inside, record + NUMBER_DATA, tl.int64)
        field = load_if(inside, record + NUMBER_FIELD, tl.int32)
        is_double = load_if(inside, record + NUMBER_IS_DOUBLE, tl.int32) != 0
        as_double = load_if(inside & is_double, data, tl.float64)
        as_float = load_if(inside & (is_double == 0), data, tl.float32)
        value = tl.where(is_double, as_double, as_float.to(tl.float64))
        store_if(inside, options + field.to(tl.int64) * 8, value)
    tl.debug_barrier()


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
        r = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = r < n_rows
        row = rows + r * ROW_BYTES
        present = load_if(inside, grads + r * GRAD_BYTES + GRAD_PRESENT, tl.int32) != 0
        step = load_if(inside, row + ROW_STEP, tl.int64)
        numel = load_if(inside, row + ROW_NUMEL, tl.int64)
        group = load_if(inside, row + ROW_GROUP, tl.int32).to(tl.int64)
        active = inside & present & ((numel > 0) | (step != 0))  # else it may be another device's
        counts = active & (step != 0)
        count = tl.where(counts, load_if(counts, step, tl.float32) + 1.0, 0.0)
        t = count.to(tl.int64)
        own = options_of(options + group * OPTIONS_BYTES, active, RULE)
        hyper = RULE.prepare(*own, t, bits_in(tl.max(t, 0)))
        out = row_steps + r * RULE.row_step_bytes
        for k in tl.static_range(len(RULE.Hyper._fields)):
            store_if(active, out + 4 * k, hyper[k])
        store_if(active, out + 4 * len(RULE.Hyper._fields), count)


@triton.jit
def finalize_step(
    step, words, options, numbers, grads, rows, n_rows, row_steps, RULE: tl.constexpr
):
    """``words``: of this device alone, or of every one that shares the norm."""
    fetch_device_numbers(step, numbers, options)
    if decide(step, words) == 0:
        prepare_rows(options, grads, rows, n_rows, row_steps, RULE)
