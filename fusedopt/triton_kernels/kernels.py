"""The kernels: the one file that knows of grids (csrc/cuda/kernels.cu in Triton).

Every argument is an address or a count, and no value is compiled in: one binary of each kernel
serves every step.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .finalize import ROWS, finalize_step, total_of_devices, total_of_partials
from .reduce import reduce_chunk
from .scalars import S_SKIP, S_SKIPPED_STEPS, inverse_scale
from .tables import (
    COUNT,
    FLAGS,
    GRAD_SCALE,
    GRAD_WORDS,
    ROW_STEP_FLOATS,
    ROW_WORDS,
    SCALARS,
    set_single,
    single,
    word,
)
from .update import update_chunk


@triton.jit
def reduce_kernel(
    step, options, numbers, grads, rows, chunks, partials, row_steps, totals, ticket,
    n_rows, n_chunks, own_total, finalizes,
    RULE: tl.constexpr,
):  # fmt: skip
    flags = word(step, FLAGS)
    inv_scale = inverse_scale(word(step, GRAD_SCALE))
    for c in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        partial = reduce_chunk(chunks, c, rows, grads, inv_scale, flags)
        tl.store(partials.to(tl.pointer_type(tl.float64)) + c, partial)
    tl.debug_barrier()
    drawn = ticket.to(tl.pointer_type(tl.int32))
    if tl.atomic_add(drawn, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(drawn, 0)
        total = total_of_partials(partials, n_chunks, flags)
        if finalizes:
            finalize_step(step, total, options, numbers, grads, rows, n_rows, row_steps, RULE)
        else:
            tl.store(totals.to(tl.pointer_type(tl.float64)) + own_total, total)


@triton.jit
def finalize_kernel(
    step, options, numbers, grads, rows, row_steps, totals, n_rows, n_totals, RULE: tl.constexpr
):
    total = total_of_devices(step, totals, n_totals)
    finalize_step(step, total, options, numbers, grads, rows, n_rows, row_steps, RULE)


@triton.jit
def write_step_counts(grads, rows, n_rows, row_steps):
    by = tl.num_programs(0) * ROWS
    for first in range(tl.program_id(0) * ROWS, n_rows, by):
        r = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = r < n_rows
        present = tl.load(
            grads.to(tl.pointer_type(tl.int64)) + r * GRAD_WORDS + 1, mask=inside, other=0
        )
        step = tl.load(rows.to(tl.pointer_type(tl.int64)) + r * ROW_WORDS + 5, mask=inside, other=0)
        counts = inside & ((present >> 32) != 0) & (step != 0)
        count = tl.load(
            row_steps.to(tl.pointer_type(tl.float32)) + r * ROW_STEP_FLOATS + COUNT, mask=counts
        )
        tl.store(step.to(tl.pointer_type(tl.float32)), count, mask=counts)


@triton.jit
def update_kernel(
    step, options, grads, rows, chunks, row_steps, n_rows, n_chunks,
    RULE: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scalars = word(step, SCALARS)
    if single(scalars, S_SKIP) != 0.0:
        if tl.program_id(0) == 0:
            set_single(scalars, S_SKIPPED_STEPS, single(scalars, S_SKIPPED_STEPS) + 1.0)
    else:
        write_step_counts(grads, rows, n_rows, row_steps)
        c = n_chunks - 1 - tl.program_id(0)
        if c >= 0:
            update_chunk(step, options, grads, rows, chunks, c, row_steps, RULE, HALVES, BLOCK)
