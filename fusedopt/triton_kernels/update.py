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
def load_halves(address, at, there, ALIGNED: tl.constexpr):
    """Bits of 16-bit values. Where aligned, two to a word: else Triton gives every thread eight
    neighbours of each stream, and fp32 stores, of four, would go through shared memory."""
    if ALIGNED:
        pairs = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)
        words = tl.load(pairs + at, mask=there, other=0, eviction_policy="evict_first")
        bits = tl.join((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16))
        bits = tl.reshape(bits, [2 * words.shape[0]])
    else:
        bits = load_stream(address, at, there, tl.uint16, False)
    return bits


@triton.jit
def store_halves(address, at, there, bits, ALIGNED: tl.constexpr):
    if ALIGNED:
        low, high = tl.split(tl.reshape(bits, [bits.shape[0] // 2, 2]))
        words = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
        store_stream(address, at, there, words, tl.uint32, True)
    else:
        store_stream(address, at, there, bits, tl.uint16, False)


@triton.jit
def load_gradient(address, dtype, grad_aligned, at, half_at, there, half_there, HALVES: tl.constexpr, ALIGNED: tl.constexpr):
    """A misaligned gradient costs the wide loads of the gradient alone."""
    if not HALVES or dtype == FLOAT32:
        if ALIGNED and grad_aligned:
            grad = load_stream(address, at, there, tl.float32, True)
        else:
            grad = load_stream(address, at, there, tl.float32, False)
    else:
        if ALIGNED and grad_aligned:
            bits = load_halves(address, half_at, half_there, True)
        else:
            bits = load_halves(address, at, there, False)
        grad = widened(bits, dtype == FLOAT16)
    return grad


@triton.jit
def current_param(master, half, has_master, half_is_float16):
    """The param before this step. Where it is not its master's rounding, someone wrote to it."""
    written = widened(half, half_is_float16)
    if has_master:
        written = tl.where(narrowed(master, half_is_float16) == half, master, written)
    return written


@triton.jit
def update_block(
    streams, settings, hyper, at, half_at, there, half_there, RULE: tl.constexpr, HALVES: tl.constexpr, ALIGNED: tl.constexpr
):
    grad_address, grad_dtype, grad_aligned, primary, half, half_is_float16, state0, state1, state2 = streams
    decay, grad_mult, max_grad_value, momentum, nesterov = settings
    has_primary = there & (primary != 0)
    has_half = half_there & (half != 0)
    param = load_stream(primary, at, has_primary, tl.float32, ALIGNED)
    s0 = load_stream(state0, at, there & (state0 != 0), tl.float32, ALIGNED)
    if RULE != "sgd":
        s1 = load_stream(state1, at, there, tl.float32, ALIGNED)
    if RULE == "amsgrad":
        s2 = load_stream(state2, at, there & (state2 != 0), tl.float32, ALIGNED)
        s2 = tl.where(state2 != 0, s2, float("-inf"))
    if HALVES:
        bits = load_halves(half, half_at, has_half, ALIGNED)
    grad = load_gradient(grad_address, grad_dtype, grad_aligned, at, half_at, there, half_there, HALVES, ALIGNED)
    if HALVES:
        if half != 0:
            param = current_param(param, bits, primary != 0, half_is_float16)
    grad = clipped(grad, grad_mult, max_grad_value)
    h0 = single(hyper, 0)
    h1 = single(hyper, 1)
    h2 = single(hyper, 2)
    h3 = single(hyper, 3)
    h4 = single(hyper, 4)
    if RULE == "sgd":
        h = (h0, h1, h2, h3, h4)
        param, s0 = sgd_update(h, decay, momentum, nesterov, grad, param, s0)
    elif RULE == "amsgrad":
        h = (h0, h1, h2, h3, h4, single(hyper, 5), single(hyper, 6))
        param, s0, s1, s2 = adamw_update(h, decay, grad, param, s0, s1, s2, True)
    else:
        h = (h0, h1, h2, h3, h4, single(hyper, 5), single(hyper, 6))
        param, s0, s1, s2 = adamw_update(h, decay, grad, param, s0, s1, s1, False)
    store_stream(primary, at, has_primary, param, tl.float32, ALIGNED)
    store_stream(state0, at, there & (state0 != 0), s0, tl.float32, ALIGNED)
    if RULE != "sgd":
        store_stream(state1, at, there, s1, tl.float32, ALIGNED)
    if RULE == "amsgrad":
        store_stream(state2, at, there & (state2 != 0), s2, tl.float32, ALIGNED)
    if HALVES and half != 0:
        store_halves(half, half_at, has_half, narrowed(param, half_is_float16), ALIGNED)


@triton.jit
def update_chunk(
    step, options, grads, rows, chunks, c, row_steps, RULE: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr
):
    record = chunks + tl.cast(c, tl.int64) * CHUNK_WORDS * 8
    r = half_word(record, 0).to(tl.int64)
    index = half_word(record, 1)
    begin = index.to(tl.int64) * CHUNK
    row = rows + r * ROW_WORDS * 8
    grad = grads + r * GRAD_WORDS * 8
    hyper = row_steps + r * ROW_STEP_FLOATS * 4
    numel = word(row, 6)
    n = tl.where(half_word(grad, 3) != 0, chunk_elements(numel, index), 0)
    group = options + half_word(row, 14).to(tl.int64) * OPTIONS_WORDS * 8
    grad_dtype = half_word(grad, 2)
    dtype = half_word(row, 15)
    param = word(row, 0)
    master = word(row, 1)
    primary = tl.where(dtype == FLOAT32, param, master)
    primary = tl.where(primary != 0, primary + begin * 4, 0)
    half = tl.where(dtype == FLOAT32, 0, param + begin * 2)
    grad_data = word(grad, 0) + begin * tl.where(grad_dtype == FLOAT32, 4, 2)
    state0 = word(row, 2)
    state0 = tl.where(state0 != 0, state0 + begin * 4, 0)
    state1 = state0
    state2 = state0
    aligned = primary | half | state0
    if RULE != "sgd":
        state1 = word(row, 3) + begin * 4
        aligned = aligned | state1
    if RULE == "amsgrad":
        state2 = word(row, 4)
        state2 = tl.where(state2 != 0, state2 + begin * 4, 0)
        aligned = aligned | state2

    maximize = word(group, 5 if RULE == "sgd" else 6) != 0
    grad_mult = single(word(step, SCALARS), S_GRAD_MULT)
    grad_mult = tl.where(maximize, -grad_mult, grad_mult)
    max_grad_value = double(step, MAX_GRAD_VALUE).to(tl.float32)
    if RULE == "sgd":
        decay = decay_kind(double(group, 1), word(group, 4))
        momentum = double(group, 2) != 0.0
        nesterov = word(group, 6) != 0
    else:
        decay = decay_kind(double(group, 1), word(group, 5))
        momentum = maximize
        nesterov = maximize
    streams = (grad_data, grad_dtype, grad_data % 16 == 0, primary, half, dtype == FLOAT16, state0, state1, state2)
    settings = (decay, grad_mult, max_grad_value, momentum, nesterov)
    whole = tl.where(aligned % 16 == 0, n // BLOCK * BLOCK, 0)
    for first in range(0, whole, BLOCK):
        at = first + tl.arange(0, BLOCK)
        half_at = first // 2 + tl.arange(0, BLOCK // 2)
        there = tl.full([BLOCK], True, tl.int1)
        half_there = tl.full([BLOCK // 2], True, tl.int1)
        update_block(streams, settings, hyper, at, half_at, there, half_there, RULE, HALVES, True)
    for first in range(whole, n, BLOCK // 4):
        at = first + tl.arange(0, BLOCK // 4)
        update_block(streams, settings, hyper, at, at, at < n, at < n, RULE, HALVES, False)
