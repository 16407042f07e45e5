"""The kernels: the one file that knows of grids (csrc/cuda/kernels.cu in Triton).

Every argument is an address or a count, and no value is compiled in: one binary of each kernel
serves every step.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .finalize import ROWS, finalize_step, words_of_devices
from .reduce import reduce_chunk
from .scalars import inverse_scale
from .tables import (
    FLAGS,
    GRAD_BYTES,
    GRAD_PRESENT,
    GRAD_SCALE,
    ROW_BYTES,
    ROW_STEP,
    S_SKIP,
    S_SKIPPED_STEPS,
    SCALARS,
    load,
    load_if,
    store,
    store_if,
)
from .update import update_chunk
from .words import WORDS, add_words, load_words, no_words, store_words


@triton.jit
def reduce_kernel(
    step, options, numbers, grads, rows, chunks, row_steps, sums, words, ticket,
    n_rows, n_chunks, own_number, finalizes,
    RULE: tl.constexpr,
):  # fmt: skip
    """Programs add their words to ``sums``, and the last one takes them from there."""
    flags = load(step + FLAGS, tl.int64)
    inv_scale = inverse_scale(load(step + GRAD_SCALE, tl.int64))
    own = no_words()
    for c in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        own = reduce_chunk(chunks, c, rows, grads, inv_scale, flags, own)
    add_words(sums, own)
    tl.debug_barrier()
    drawn = ticket.to(tl.pointer_type(tl.int32))
    if tl.atomic_add(drawn, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        total = load_words(sums)
        tl.debug_barrier()
        store_words(sums, no_words())
        tl.store(drawn, 0)
        store_words(words + own_number * WORDS * 8, total)
        if finalizes:
            finalize_step(step, total, options, numbers, grads, rows, n_rows, row_steps, RULE)


@triton.jit
def finalize_kernel(
    step, options, numbers, grads, rows, row_steps, words, n_rows, n_devices, RULE: tl.constexpr
):
    total = words_of_devices(words, n_devices)
    finalize_step(step, total, options, numbers, grads, rows, n_rows, row_steps, RULE)


@triton.jit
def write_step_counts(grads, rows, n_rows, row_steps, RULE: tl.constexpr):
    by = tl.num_programs(0) * ROWS
    for first in range(tl.program_id(0) * ROWS, n_rows, by):
        r = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = r < n_rows
        present = load_if(inside, grads + r * GRAD_BYTES + GRAD_PRESENT, tl.int32) != 0
        step = load_if(inside, rows + r * ROW_BYTES + ROW_STEP, tl.int64)
        counts = inside & present & (step != 0)
        count_at = row_steps + r * RULE.row_step_bytes + 4 * len(RULE.Hyper._fields)
        store_if(counts, step, load_if(counts, count_at, tl.float32))


@triton.jit
def update_kernel(
    step, options, grads, rows, chunks, row_steps, n_rows, n_chunks,
    RULE: tl.constexpr, STATES: tl.constexpr, STREAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scalars = load(step + SCALARS, tl.int64)
    if load(scalars + S_SKIP, tl.float32) != 0.0:
        if tl.program_id(0) == 0:
            skipped = load(scalars + S_SKIPPED_STEPS, tl.float32)
            store(scalars + S_SKIPPED_STEPS, skipped + 1.0)
    else:
        write_step_counts(grads, rows, n_rows, row_steps, RULE)
        c = n_chunks - 1 - tl.program_id(0)
        if c >= 0:
            update_chunk(
                step, options, grads, rows, chunks, c, row_steps, RULE, STATES, STREAMS, BLOCK
            )
