"""One chunk of a param and its states, updated in place: csrc/cuda/update.cuh in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .dtypes import narrowed, widened
from .rules import adamw_update, clipped, decay_kind, sgd_update
from .scalars import S_GRAD_MULT
from .tables import (
    CHUNK,
    CHUNK_WORDS,
    FLOAT16,
    FLOAT32,
    GRAD_WORDS,
    MAX_GRAD_VALUE,
    OPTIONS_WORDS,
    ROW_STEP_FLOATS,
    ROW_WORDS,
    SCALARS,
    chunk_elements,
    double,
    half_word,
    single,
    word,
)


@triton.jit
def load_stream(address, at, there, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + at, mask=there, other=0, eviction_policy="evict_first")


@triton.jit
def store_stream(address, at, there, value, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + at, value, mask=there, eviction_policy="evict_first")


@triton.jit
def load_over(address, at, there, otherwise, TYPE: tl.constexpr):
    """Whatever the alignment; ``otherwise`` where nothing is loaded."""
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.load(pointer + at, mask=there, other=otherwise, eviction_policy="evict_first")


@triton.jit
def unpacked(words):
    """16-bit values from words of two. Loaded one by one, Triton would give a thread eight
    neighbours of every stream, and fp32 stores, which are of four, would need shared memory."""
    low, high = (words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16)
    return tl.reshape(tl.join(low, high), [2 * words.shape[0]])


@triton.jit
def packed(bits):
    low, high = tl.split(tl.reshape(bits, [bits.shape[0] // 2, 2]))
    return low.to(tl.uint32) | (high.to(tl.uint32) << 16)


@triton.jit
def current_param(master, half, has_master, half_is_float16):
    """The param before this step. Where it is not its master's rounding, someone wrote to it."""
    written = widened(half, half_is_float16)
    if has_master:
        written = tl.where(narrowed(master, half_is_float16) == half, master, written)
    return written


@triton.jit
def load_hyper(row_step, RULE: tl.constexpr):
    """Anew for every block, out of the L1 cache: registers are for the data."""
    h0 = single(row_step, 0)
    h1 = single(row_step, 1)
    h2 = single(row_step, 2)
    h3 = single(row_step, 3)
    h4 = single(row_step, 4)
    if RULE == "sgd":
        return h0, h1, h2, h3, h4
    else:
        return h0, h1, h2, h3, h4, single(row_step, 5), single(row_step, 6)


@triton.jit
def update_block(
    streams, settings, row_step, first, n,
    RULE: tl.constexpr, HALVES: tl.constexpr, ALIGNED: tl.constexpr, GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` elements from ``first``, all loads before the first use.

    ALIGNED: all of them are there, and every stream but the gradient starts on a 16-byte boundary;
    a gradient that does not costs the wide loads of the gradient alone.
    """
    grad_at, grad_dtype, grad_aligned, primary, half, half_is_float16, state0, state1, state2 = (
        streams
    )
    decay, grad_mult, max_grad_value, momentum, nesterov = settings
    at = first + tl.arange(0, BLOCK)
    if ALIGNED:
        there = tl.full([BLOCK], True, tl.int1)
    else:
        there = at < n
    float_grad = there
    if HALVES:
        float_grad = there & (grad_dtype == FLOAT32)
        half_grad = there & (grad_dtype != FLOAT32)
        if ALIGNED:
            pair = first // 2 + tl.arange(0, BLOCK // 2)
            pairs = tl.full([BLOCK // 2], True, tl.int1)
            wide_grad = (grad_dtype != FLOAT32) & grad_aligned
            half_words = load_stream(half, pair, pairs & (half != 0), tl.uint32, True)
            grad_words = load_stream(grad_at, pair, pairs & wide_grad, tl.uint32, True)
        else:
            half_bits = load_stream(half, at, there & (half != 0), tl.uint16, False)
            grad_bits = load_stream(grad_at, at, half_grad, tl.uint16, False)
    param = load_stream(primary, at, there & (primary != 0), tl.float32, ALIGNED)
    s0 = load_stream(state0, at, there & (state0 != 0), tl.float32, ALIGNED)
    if RULE == "adamw" or RULE == "amsgrad":
        s1 = load_stream(state1, at, there, tl.float32, ALIGNED)
    if RULE == "amsgrad":
        s2 = load_stream(state2, at, there & (state2 != 0), tl.float32, ALIGNED)
    if GRAD == "either":
        grad = load_stream(grad_at, at, float_grad & grad_aligned, tl.float32, True)
        grad = load_over(grad_at, at, float_grad & (grad_aligned == 0), grad, tl.float32)
    else:
        grad = load_stream(grad_at, at, float_grad, tl.float32, GRAD == "wide")

    if HALVES:
        if ALIGNED:
            half_bits = unpacked(half_words)
            narrow_grad = half_grad & (grad_aligned == 0)
            grad_bits = load_over(grad_at, at, narrow_grad, unpacked(grad_words), tl.uint16)
        if grad_dtype != FLOAT32:
            grad = widened(grad_bits, grad_dtype == FLOAT16)
        if half != 0:
            param = current_param(param, half_bits, primary != 0, half_is_float16)
    grad = clipped(grad, grad_mult, max_grad_value)
    h = load_hyper(row_step, RULE)
    if RULE == "sgd":
        param, s0 = sgd_update(h, decay, momentum, nesterov, grad, param, s0)
    elif RULE == "amsgrad":
        s2 = tl.where(state2 != 0, s2, float("-inf"))  # without amsgrad: any moment is larger
        param, s0, s1, s2 = adamw_update(h, decay, grad, param, s0, s1, s2, True)
    else:
        param, s0, s1, s2 = adamw_update(h, decay, grad, param, s0, s1, s1, False)

    store_stream(primary, at, there & (primary != 0), param, tl.float32, ALIGNED)
    store_stream(state0, at, there & (state0 != 0), s0, tl.float32, ALIGNED)
    if RULE == "adamw" or RULE == "amsgrad":
        store_stream(state1, at, there, s1, tl.float32, ALIGNED)
    if RULE == "amsgrad":
        store_stream(state2, at, there & (state2 != 0), s2, tl.float32, ALIGNED)
    if HALVES:
        if half != 0:
            bits = narrowed(param, half_is_float16)
            if ALIGNED:
                store_stream(half, pair, pairs, packed(bits), tl.uint32, True)
            else:
                store_stream(half, at, there, bits, tl.uint16, False)


@triton.jit
def moved(address, n_bytes):
    """``address + n_bytes``; what is absent stays absent."""
    return tl.where(address != 0, address + n_bytes, 0)


@triton.jit
def streams_of(row, grad, begin, RULE: tl.constexpr):
    """Where each stream of a chunk starts, and whether all of the row's are aligned."""
    grad_dtype = half_word(grad, 2)
    dtype = half_word(row, 15)
    param = word(row, 0)
    grad_at = word(grad, 0) + begin * tl.where(grad_dtype == FLOAT32, 4, 2)
    primary = moved(tl.where(dtype == FLOAT32, param, word(row, 1)), begin * 4)
    half = tl.where(dtype == FLOAT32, 0, param + begin * 2)
    state0 = moved(word(row, 2), begin * 4)
    state1 = state0
    state2 = state0
    if RULE == "adamw" or RULE == "amsgrad":
        state1 = moved(word(row, 3), begin * 4)
    if RULE == "amsgrad":
        state2 = moved(word(row, 4), begin * 4)
    is_float16 = dtype == FLOAT16
    grad_aligned = grad_at % 16 == 0
    aligned = (primary | half | state0 | state1 | state2) % 16 == 0
    streams = (grad_at, grad_dtype, grad_aligned, primary, half, is_float16, state0, state1, state2)
    return streams, aligned


@triton.jit
def settings_of(step, group, RULE: tl.constexpr):
    """What is the same for a whole tensor; ``group`` is the address of its Options."""
    grad_mult = single(word(step, SCALARS), S_GRAD_MULT)
    maximize = word(group, 5 if RULE == "sgd" else 6) != 0
    grad_mult = tl.where(maximize, -1.0 * grad_mult, grad_mult)
    max_grad_value = double(step, MAX_GRAD_VALUE).to(tl.float32)
    decay = decay_kind(double(group, 1), word(group, 4 if RULE == "sgd" else 5))
    momentum = maximize
    nesterov = maximize
    if RULE == "sgd":
        momentum = double(group, 2) != 0.0
        nesterov = word(group, 6) != 0
    return decay, grad_mult, max_grad_value, momentum, nesterov


@triton.jit
def update_chunk(
    step, options, grads, rows, chunks, c, row_steps,
    RULE: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    record = chunks + tl.cast(c, tl.int64) * CHUNK_WORDS * 8
    r = half_word(record, 0).to(tl.int64)
    index = half_word(record, 1)
    row = rows + r * ROW_WORDS * 8
    grad = grads + r * GRAD_WORDS * 8
    row_step = row_steps + r * ROW_STEP_FLOATS * 4
    group = options + half_word(row, 14).to(tl.int64) * OPTIONS_WORDS * 8
    n = tl.where(half_word(grad, 3) != 0, chunk_elements(word(row, 6), index), 0)
    streams, aligned = streams_of(row, grad, index.to(tl.int64) * CHUNK, RULE)
    settings = settings_of(step, group, RULE)
    whole = tl.where(aligned, n // BLOCK * BLOCK, 0)
    if RULE == "sgd" and not HALVES:
        # A load over another waits for it, and here the compiler would put the rest behind both.
        wide = tl.where(streams[2], whole, 0)
        for first in range(0, wide, BLOCK):
            update_block(streams, settings, row_step, first, n, RULE, HALVES, True, "wide", BLOCK)
        for first in range(wide, whole, BLOCK):
            update_block(streams, settings, row_step, first, n, RULE, HALVES, True, "narrow", BLOCK)
    else:
        for first in range(0, whole, BLOCK):
            update_block(streams, settings, row_step, first, n, RULE, HALVES, True, "either", BLOCK)
    for first in range(whole, n, BLOCK // 4):
        update_block(
            streams, settings, row_step, first, n, RULE, HALVES, False, "narrow", BLOCK // 4
        )
