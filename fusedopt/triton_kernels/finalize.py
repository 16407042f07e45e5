"""Turn words into the step's scalars, prepare every update: csrc/cuda/finalize.cuh in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .scalars import decide
from .tables import DEVICE_NUMBER, GRAD, ROW, STEP, fields_at, load, read, store
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
    n = read(STEP, step).n_device_numbers.to(tl.int32)
    for first in range(0, n, NUMBERS):
        i = first + tl.arange(0, NUMBERS)
        inside = i < n
        number = read(DEVICE_NUMBER, numbers, i.to(tl.int64), inside)
        is_double = number.is_double != 0
        as_double = load(number.data, tl.float64, inside & is_double)
        as_float = load(number.data, tl.float32, inside & (is_double == 0))
        value = tl.where(is_double, as_double, as_float.to(tl.float64))
        store(options + number.field.to(tl.int64) * 8, value, inside)
    tl.debug_barrier()


@triton.jit
def bits_in(largest):
    """The number of binary digits of a count."""
    n_bits = largest.to(tl.int32) * 0
    while (largest >> n_bits.to(tl.int64)) > 0:
        n_bits += 1
    return n_bits


@triton.jit
def prepare_rows(options, grads, rows, n_rows, row_steps, RULE: tl.constexpr):
    for first in range(0, n_rows, ROWS):
        r = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = r < n_rows
        grad, row = read(GRAD, grads, r, inside), read(ROW, rows, r, inside)
        # A row without elements and without a count may be another device's.
        active = inside & (grad.present != 0) & ((row.numel > 0) | (row.step != 0))
        counts = active & (row.step != 0)
        count = tl.where(counts, load(row.step, tl.float32, counts) + 1.0, 0.0)
        t = count.to(tl.int64)
        own = read(RULE.options, options, row.group.to(tl.int64), active)
        hyper = RULE.prepare(*own, t, bits_in(tl.max(t, 0)))
        out = fields_at(RULE.row_step, row_steps, r)
        for k in tl.static_range(len(RULE.Hyper._fields)):
            store(out[k], hyper[k], active)
        store(out.count, count, active)


@triton.jit
def finalize_step(
    step, words, options, numbers, grads, rows, n_rows, row_steps, RULE: tl.constexpr
):
    """``words``: of this device alone, or of every device that shares the norm."""
    fetch_device_numbers(step, numbers, options)
    if decide(step, words) == 0:
        prepare_rows(options, grads, rows, n_rows, row_steps, RULE)
