"""A program updates one chunk of a param and its states in place: csrc/cuda/update.cuh in Triton.

For one element::

    if scalars.skip: return                                  nothing moves: update_kernel()
    for each chunk, by one program:                          update_chunk()
      streams and numbers from the tables                    work_of()
      for BLOCK elements, all streams on 16 bytes:           update_block(), ALIGNED
        g = grad[i], p = master[i], s[k] = state[k][i]       all loads first
        if param[i] != narrowed(p): p = param[i]             no master, or someone wrote to param
        g = clip(g * grad_mult, max_grad_value)              unscale, clip, maximize: one factor
        p, s[k] = RULE.update(hyper, kind, g, p, s...)       the rule, in registers
        master[i] = p, param[i] = narrowed(p), state[k][i] = s[k]
      the elements that are left over, a quarter at a time:  update_block()

STREAMS says which streams may not be fp32: none ("float32"), only params and gradients ("any"), or
also masters and states ("coded"): then update_coded_block() does the same with what coded.py loads
and stores.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import access, coded
from .access import Block, Stream, current_param
from .codecs import FLOAT32, REMAINDER8, narrowed
from .rules.common import Kind, clipped, kind_of
from .tables import CHUNK, GRAD, MASTER, PARAM, ROW, STATES_FROM, STEP, STEP_SCALARS, read, span_of


class Streams(NamedTuple):
    """All but the gradient. Where rows are coded, a ``coded.Row`` takes its place."""

    primary: Stream  # the values to update: param or master
    half: Stream  # the param of 16 bits
    states: tl.tuple


class Work(NamedTuple):
    """A chunk's gradient and numbers."""

    grad: Stream
    row_steps: tl.tensor
    row: tl.tensor  # its number
    kind: Kind
    grad_mult: tl.tensor
    max_grad_value: tl.tensor
    n: tl.tensor


@triton.jit
def apply_rule(w, streams, grad, param, states, RULE: tl.constexpr, STATES: tl.constexpr):
    """The param and states after the step. The rule gets all states that it may have."""
    given = ()
    for k in tl.static_range(len(RULE.absent)):
        if k >= STATES:
            given = given + (param,)  # a stand-in that the rule does not read
        elif k >= RULE.n_always and RULE.absent[k] != 0.0:
            given = given + (access.or_absent(streams[k], states[k], RULE.absent[k]),)
        else:
            given = given + (states[k],)
    hyper = read(RULE.row_step, w.row_steps, w.row)  # in every block: registers are for data
    return RULE.update(hyper, w.kind, grad, param, *given, STATES)


@triton.jit
def update_block(
    w, streams, grad_aligned, first,
    RULE: tl.constexpr, STATES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` elements from ``first``, all loads before the first use.

    ALIGNED: all of them exist, and every stream but the gradient starts on a 16-byte boundary. If
    the gradient does not, only its own loads are narrow.
    """
    at = first + tl.arange(0, BLOCK)
    inside = tl.full([BLOCK], True, tl.int1) if ALIGNED else at < w.n
    block = Block(at, first // 2 + tl.arange(0, BLOCK // 2), inside)
    half_loaded = access.load_halves(streams.half.address, block, streams.half.there, ALIGNED)
    param_loaded = access.load_values(streams.primary, block, ALIGNED)
    states_loaded = ()
    for k in tl.static_range(STATES):
        states_loaded = states_loaded + (access.load_values(streams.states[k], block, ALIGNED),)
    grad_loaded = access.load_gradient(w.grad, grad_aligned, block, ALIGNED)

    param = access.values_of(param_loaded, streams.primary, ALIGNED)
    half_bits = access.unpacked(half_loaded, ALIGNED)
    grad = access.gradient_of(grad_loaded, w.grad, grad_aligned, block, ALIGNED)
    if streams.half.there:
        param = current_param(param, half_bits, streams.primary.there, streams.half.codec)
    grad = clipped(grad, w.grad_mult, w.max_grad_value)
    states = ()
    for k in tl.static_range(STATES):
        states = states + (access.values_of(states_loaded[k], streams.states[k], ALIGNED),)
    new = apply_rule(w, streams.states, grad, param, states, RULE, STATES)

    access.store_values(streams.primary, block, new[0], ALIGNED)
    for k in tl.static_range(STATES):
        access.store_values(streams.states[k], block, new[1 + k], ALIGNED)
    if streams.half.there:
        bits = narrowed(new[0], streams.half.codec)
        access.store_halves(streams.half.address, block, True, bits, ALIGNED)


@triton.jit
def update_coded_block(
    w, row, first,
    RULE: tl.constexpr, STATES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``update_block``, where streams have any codec; ALIGNED counts the gradient in."""
    block = coded.block_of(row, first, w.n, ALIGNED, BLOCK)
    half_loaded = coded.load_coded(coded.half_of(row), block, 0, ALIGNED)
    param_loaded = coded.load_coded(coded.primary_of(row), block, REMAINDER8, ALIGNED)
    states_loaded = ()
    for k in tl.static_range(STATES):
        stream = coded.stream_of(row, STATES_FROM + k)
        loaded = coded.load_coded(stream, block, RULE.codes[k], ALIGNED)
        states_loaded = states_loaded + (loaded,)
    grad_loaded = coded.load_gradient(w.grad, block, ALIGNED)

    param = coded.param_of(param_loaded, half_loaded, row)
    grad = clipped(coded.gradient_of(grad_loaded, w.grad), w.grad_mult, w.max_grad_value)
    streams, states = (), ()
    for k in tl.static_range(STATES):
        streams = streams + (coded.stream_of(row, STATES_FROM + k),)
        state = coded.state_of(states_loaded[k], row, STATES_FROM + k, RULE.codes[k])
        states = states + (state,)
    new = apply_rule(w, streams, grad, param, states, RULE, STATES)

    coded.store_param(row, block, new[0], ALIGNED)
    for k in tl.static_range(STATES):
        stream = coded.stream_of(row, STATES_FROM + k)
        coded.store_state(stream, block, new[1 + k], RULE.codes[k], ALIGNED)


@triton.jit
def update_blocks(
    w, streams, grad_aligned, first, last,
    RULE: tl.constexpr, STATES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for at in range(first, last, BLOCK):
        update_block(w, streams, grad_aligned, at, RULE, STATES, ALIGNED, BLOCK)


@triton.jit
def update_coded_blocks(
    w, row, first, last,
    RULE: tl.constexpr, STATES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for at in range(first, last, BLOCK):
        update_coded_block(w, row, at, RULE, STATES, ALIGNED, BLOCK)


@triton.jit
def streams_of(row, begin, RULE: tl.constexpr, STATES: tl.constexpr, STREAMS: tl.constexpr):
    """And all their addresses in one."""
    param = access.stream_of(row, PARAM, begin, STREAMS == "float32")
    master = access.stream_of(row, MASTER, begin, True)
    is_float = param.codec == FLOAT32
    primary = tl.where(is_float, param.address, master.address)
    primary = Stream(primary, tl.where(is_float, FLOAT32, master.codec), primary != 0)
    half = tl.where(is_float, 0, param.address)
    half = Stream(half, param.codec, half != 0)
    addresses = primary.address | half.address
    states = ()
    for k in tl.static_range(STATES):
        state = access.stream_of(row, STATES_FROM + k, begin, True)
        there = state.there | (k < RULE.n_always)
        states = states + (Stream(state.address, state.codec, there),)
        addresses = addresses | state.address
    return Streams(primary, half, states), addresses


@triton.jit
def work_of(
    step, options, grads, rows, chunk, row_steps,
    RULE: tl.constexpr, STATES: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """Of a chunk, and whether all streams but the gradient start on 16 bytes."""
    r = chunk.row.to(tl.int64)
    grad, row = read(GRAD, grads, r), read(ROW, rows, r)
    begin, n = span_of(chunk, row, grad)
    grad = access.stream_at(grad.data, grad.codec, begin, STREAMS == "float32")
    if STREAMS == "coded":
        count = read(RULE.row_step, row_steps, r).count
        streams = coded.row_of(rows, r, begin, count)
        addresses = coded.addresses_of(streams, STATES)
    else:
        streams, addresses = streams_of(row, begin, RULE, STATES, STREAMS)

    own = read(RULE.options, options, row.group.to(tl.int64))
    kind = kind_of(own.weight_decay, own.decoupled, RULE.variant(*own))
    step = read(STEP, step)
    grad_mult = read(STEP_SCALARS, step.scalars).grad_mult
    grad_mult = tl.where(own.maximize != 0, -1.0 * grad_mult, grad_mult)
    max_grad_value = step.max_grad_value.to(tl.float32)
    work = Work(grad, row_steps, r, kind, grad_mult, max_grad_value, n)
    return work, streams, addresses % 16 == 0


@triton.jit
def update_chunk(
    step, options, grads, rows, chunks, c, row_steps,
    RULE: tl.constexpr, STATES: tl.constexpr, STREAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = read(CHUNK, chunks, tl.cast(c, tl.int64))
    w, streams, aligned = work_of(
        step, options, grads, rows, chunk, row_steps, RULE, STATES, STREAMS
    )
    yes, no = tl.full([], True, tl.int1), tl.full([], False, tl.int1)
    grad_aligned = w.grad.address % 16 == 0
    if STREAMS == "coded":
        aligned = aligned & grad_aligned  # more loads would take too many registers
    whole = tl.where(aligned, w.n // BLOCK * BLOCK, 0)
    if STREAMS == "coded":
        update_coded_blocks(w, streams, 0, whole, RULE, STATES, True, BLOCK)
        update_coded_blocks(w, streams, whole, w.n, RULE, STATES, False, BLOCK // 4)
    elif STREAMS == "float32" and STATES == 1:
        # A gradient of unknown alignment takes two loads, and the second waits for the first. With
        # few other loads, the compiler puts them all behind the second.
        wide = tl.where(grad_aligned, whole, 0)
        update_blocks(w, streams, yes, 0, wide, RULE, STATES, True, BLOCK)
        update_blocks(w, streams, no, wide, whole, RULE, STATES, True, BLOCK)
    else:
        update_blocks(w, streams, grad_aligned, 0, whole, RULE, STATES, True, BLOCK)
    if STREAMS != "coded":
        update_blocks(w, streams, no, whole, w.n, RULE, STATES, False, BLOCK // 4)
