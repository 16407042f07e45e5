"""The kernels: the one file that knows of grids (csrc/cuda/kernels.cu and exact.cu in
Triton).

Every argument is an address or a count, and no value is compiled in: one binary of each kernel
serves every step.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .exact import FIRST_GUESS, reduce_chunk_exactly
from .finalize import ROWS, finalize_step, words_of_devices
from .reduce import reduce_chunk
from .scalars import inverse_scale, words_of_rank
from .tables import GRAD, ROW, STEP, STEP_SCALARS, fields_at, read, store
from .update import update_chunk
from .words import WORDS, add_words, load_words, no_words, store_words


@triton.jit
def hand_in(
    own, record, step, options, numbers, grads, rows, row_steps, sums, words, ticket,
    n_rows, n_devices, own_number,
    RULE: tl.constexpr,
):  # fmt: skip
    """Programs add their words to ``sums``; the last program takes the total from there."""
    add_words(sums, own)
    tl.debug_barrier()
    drawn = ticket.to(tl.pointer_type(tl.int32))
    if tl.atomic_add(drawn, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        total = load_words(sums)
        tl.debug_barrier()
        store_words(sums, no_words())
        tl.store(drawn, 0)
        if own_number == 0:
            total += words_of_rank(record)
        store_words(words + own_number * WORDS * 8, total)
        if (n_devices == 1) & (record.n_ranks == 0):
            finalize_step(step, total, options, numbers, grads, rows, n_rows, row_steps, RULE)


@triton.jit
def reduce_kernel(
    step, options, numbers, grads, rows, chunks, row_steps, sums, words, ticket,
    n_rows, n_chunks, n_devices, own_number,
    RULE: tl.constexpr,
):  # fmt: skip
    record = read(STEP, step)
    inv_scale = inverse_scale(record.grad_scale)
    own = no_words()
    for c in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        own = reduce_chunk(chunks, c, rows, grads, inv_scale, record.flags, own)
    hand_in(
        own, record, step, options, numbers, grads, rows, row_steps, sums, words, ticket,
        n_rows, n_devices, own_number, RULE,
    )  # fmt: skip


@triton.jit
def reduce_exactly_kernel(
    step, options, numbers, grads, rows, chunks, row_steps, sums, words, ticket,
    n_rows, n_chunks, n_devices, own_number,
    RULE: tl.constexpr,
):  # fmt: skip
    """As ``reduce_kernel``, for ``norm_bits="exact"``."""
    record = read(STEP, step)
    inv_scale = inverse_scale(record.grad_scale)
    own = no_words()
    guess = tl.full([], FIRST_GUESS, tl.int32)
    for c in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        own, guess = reduce_chunk_exactly(
            chunks, c, rows, grads, inv_scale, record.flags, own, guess
        )
    hand_in(
        own, record, step, options, numbers, grads, rows, row_steps, sums, words, ticket,
        n_rows, n_devices, own_number, RULE,
    )  # fmt: skip


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
        grad, row = read(GRAD, grads, r, inside), read(ROW, rows, r, inside)
        counts = inside & (grad.present != 0) & (row.step != 0)
        store(row.step, read(RULE.row_step, row_steps, r, counts).count, counts)


@triton.jit
def update_kernel(
    step, options, grads, rows, chunks, row_steps, n_rows, n_chunks,
    RULE: tl.constexpr, STATES: tl.constexpr, STREAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scalars = read(STEP, step).scalars
    skip = read(STEP_SCALARS, scalars).skip
    if skip != 0.0:
        if (skip == 1.0) & (tl.program_id(0) == 0):
            skipped_steps = read(STEP_SCALARS, scalars).skipped_steps
            store(fields_at(STEP_SCALARS, scalars).skipped_steps, skipped_steps + 1.0)
    else:
        write_step_counts(grads, rows, n_rows, row_steps, RULE)
        c = n_chunks - 1 - tl.program_id(0)
        if c >= 0:
            update_chunk(
                step, options, grads, rows, chunks, c, row_steps, RULE, STATES, STREAMS, BLOCK
            )
