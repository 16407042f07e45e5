"""One chunk of a param and its states, updated in place: csrc/cuda/update.cuh in Triton.

STREAMS says what is not fp32: nothing ("float32"), params and gradients at most ("any"), or masters
and states, too ("any-states").
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .codecs import FLOAT32, bytes_of, narrowed, widened
from .rules.common import clipped, kind_of
from .tables import (
    CHUNK,
    CHUNK_BYTES,
    CHUNK_INDEX,
    CHUNK_ROW,
    CODEC_BITS,
    CODEC_MASK,
    GRAD_BYTES,
    GRAD_CODEC,
    GRAD_DATA,
    GRAD_PRESENT,
    MASTER,
    MAX_GRAD_VALUE,
    OPTIONS_BYTES,
    PARAM,
    ROW_BYTES,
    ROW_CODECS,
    ROW_DATA,
    ROW_GROUP,
    ROW_NUMEL,
    S_GRAD_MULT,
    SCALARS,
    STATES_FROM,
    chunk_elements,
    load,
    options_of,
)


class Block(NamedTuple):
    """Elements that are updated together."""

    at: tl.tensor
    there: tl.tensor
    pair: tl.tensor  # of 16-bit elements
    pairs: tl.tensor


class Streams(NamedTuple):
    """Where a chunk starts in each stream; 0: there is none."""

    grad: tl.tensor
    grad_codec: tl.tensor
    grad_aligned: tl.tensor
    primary: tl.tensor  # the master, or a param of fp32
    half: tl.tensor  # a param of 16 bits
    states: tl.tuple
    codecs: tl.tensor  # of the row


@triton.jit
def codec_of(codecs, stream, STREAMS: tl.constexpr):
    """Of a stream of the row."""
    if STREAMS == "any-states" or stream == PARAM:
        return (codecs >> (CODEC_BITS * stream)) & CODEC_MASK
    else:
        return tl.full([], FLOAT32, tl.int32)


@triton.jit
def load_stream(address, at, there, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + at, mask=there, other=0, eviction_policy="evict_first")


@triton.jit
def store_stream(address, at, there, value, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(value.dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + at, value, mask=there, eviction_policy="evict_first")


@triton.jit
def load_over(address, at, there, otherwise):
    """Whatever the alignment; ``otherwise`` where nothing is loaded."""
    pointer = address.to(tl.pointer_type(otherwise.dtype))
    return tl.load(pointer + at, mask=there, other=otherwise, eviction_policy="evict_first")


@triton.jit
def load_halves(address, block, wanted, ALIGNED: tl.constexpr):
    """16-bit values. Those of a whole block come as words of two: loaded one by one, Triton would
    give a thread eight neighbours of every stream, and fp32 stores, which are of four, would need
    shared memory."""
    if ALIGNED:
        return load_stream(address, block.pair, block.pairs & wanted, tl.uint32, True)
    else:
        return load_stream(address, block.at, block.there & wanted, tl.uint16, False)


@triton.jit
def unpacked(loaded, ALIGNED: tl.constexpr):
    """What ``load_halves`` has loaded, one by one."""
    if ALIGNED:
        low, high = (loaded & 0xFFFF).to(tl.uint16), (loaded >> 16).to(tl.uint16)
        return tl.reshape(tl.join(low, high), [2 * loaded.shape[0]])
    else:
        return loaded


@triton.jit
def store_halves(address, block, wanted, bits, ALIGNED: tl.constexpr):
    if ALIGNED:
        low, high = tl.split(tl.reshape(bits, [bits.shape[0] // 2, 2]))
        words = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
        store_stream(address, block.pair, block.pairs & wanted, words, True)
    else:
        store_stream(address, block.at, block.there & wanted, bits, False)


@triton.jit
def load_values(
    address, codec, block, wanted, ALIGNED: tl.constexpr, STREAMS: tl.constexpr
):  # fmt: skip
    """A master or state as it lies in memory: both ways to load it, of which one loads nothing."""
    if STREAMS == "any-states":
        is_float = codec == FLOAT32
        floats = load_stream(
            address, block.at, block.there & wanted & is_float, tl.float32, ALIGNED
        )
        return floats, load_halves(address, block, wanted & (is_float == 0), ALIGNED)
    else:
        floats = load_stream(address, block.at, block.there & wanted, tl.float32, ALIGNED)
        return floats, floats


@triton.jit
def values_of(loaded, codec, ALIGNED: tl.constexpr, STREAMS: tl.constexpr):
    """fp32 values of what ``load_values`` has loaded; zeros where nothing was wanted."""
    values, halves = loaded
    if STREAMS == "any-states":
        if codec != FLOAT32:
            values = widened(unpacked(halves, ALIGNED), codec)
    return values


@triton.jit
def store_values(address, codec, block, wanted, x, ALIGNED: tl.constexpr, STREAMS: tl.constexpr):
    if STREAMS == "any-states":
        if codec == FLOAT32:
            store_stream(address, block.at, block.there & wanted, x, ALIGNED)
        else:
            store_halves(address, block, wanted, narrowed(x, codec), ALIGNED)
    else:
        store_stream(address, block.at, block.there & wanted, x, ALIGNED)


@triton.jit
def load_states(streams, block, RULE: tl.constexpr, STATES: tl.constexpr, ALIGNED: tl.constexpr,
                STREAMS: tl.constexpr):  # fmt: skip
    states = ()
    for k in tl.static_range(STATES):
        address = streams.states[k]
        codec = codec_of(streams.codecs, STATES_FROM + k, STREAMS)
        wanted = k < RULE.n_always or address != 0
        states = states + (load_values(address, codec, block, wanted, ALIGNED, STREAMS),)
    return states


@triton.jit
def current_param(master, half, has_master, codec):
    """The param before this step. Where it is not its master's rounding, someone wrote to it."""
    written = widened(half, codec)
    if has_master:
        written = tl.where(narrowed(master, codec) == half, master, written)
    return written


@triton.jit
def load_hyper(row_step, RULE: tl.constexpr):
    """Anew for every block, out of the L1 cache: registers are for the data."""
    hyper = ()
    for k in tl.static_range(len(RULE.Hyper._fields)):
        hyper = hyper + (load(row_step + 4 * k, tl.float32),)
    return RULE.Hyper(*hyper)


@triton.jit
def apply_rule(kind, row_step, grad, param, states, streams, RULE: tl.constexpr,
               STATES: tl.constexpr):  # fmt: skip
    """The param and states after the step. The rule gets all states that it may have."""
    given = ()
    for k in tl.static_range(len(RULE.absent)):
        if k >= STATES:
            given = given + (param,)  # which the rule does not look at
        elif k >= RULE.n_always and RULE.absent[k] != 0.0:
            given = given + (tl.where(streams.states[k] != 0, states[k], RULE.absent[k]),)
        else:
            given = given + (states[k],)
    return RULE.update(load_hyper(row_step, RULE), kind, grad, param, *given, STATES)


@triton.jit
def update_block(
    streams, kind, grad_mult, max_grad_value, row_step, first, n,
    RULE: tl.constexpr, STATES: tl.constexpr, STREAMS: tl.constexpr, ALIGNED: tl.constexpr,
    GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` elements from ``first``, all loads before the first use.

    ALIGNED: all of them are there, and every stream but the gradient starts on a 16-byte boundary;
    a gradient that does not costs the wide loads of the gradient alone.
    """
    at = first + tl.arange(0, BLOCK)
    there = tl.full([BLOCK], True, tl.int1) if ALIGNED else at < n
    pair = first // 2 + tl.arange(0, BLOCK // 2)
    block = Block(at, there, pair, tl.full([BLOCK // 2], True, tl.int1))
    primary, half, grad_at = streams.primary, streams.half, streams.grad
    grad_aligned = streams.grad_aligned
    float_grad = there
    if STREAMS != "float32":
        is_float = streams.grad_codec == FLOAT32
        float_grad = there & is_float
        half_grad = there & (is_float == 0)
        half_loaded = load_halves(half, block, half != 0, ALIGNED)
        wide = (is_float == 0) & grad_aligned if GRAD == "either" else is_float == 0
        grad_loaded = load_halves(grad_at, block, wide, ALIGNED)
    half_codec = codec_of(streams.codecs, PARAM, STREAMS)
    primary_codec = tl.where(half == 0, FLOAT32, codec_of(streams.codecs, MASTER, STREAMS))
    param_loaded = load_values(primary, primary_codec, block, primary != 0, ALIGNED, STREAMS)
    states_loaded = load_states(streams, block, RULE, STATES, ALIGNED, STREAMS)
    if GRAD == "either":
        grad = load_stream(grad_at, at, float_grad & grad_aligned, tl.float32, True)
        grad = load_over(grad_at, at, float_grad & (grad_aligned == 0), grad)
    else:
        grad = load_stream(grad_at, at, float_grad, tl.float32, GRAD == "wide")

    param = values_of(param_loaded, primary_codec, ALIGNED, STREAMS)
    if STREAMS != "float32":
        half_bits = unpacked(half_loaded, ALIGNED)
        grad_bits = unpacked(grad_loaded, ALIGNED)
        if GRAD == "either":
            grad_bits = load_over(grad_at, at, half_grad & (grad_aligned == 0), grad_bits)
        if is_float == 0:
            grad = widened(grad_bits, streams.grad_codec)
        if half != 0:
            param = current_param(param, half_bits, primary != 0, half_codec)
    grad = clipped(grad, grad_mult, max_grad_value)
    states = ()
    for k in tl.static_range(STATES):
        codec = codec_of(streams.codecs, STATES_FROM + k, STREAMS)
        states = states + (values_of(states_loaded[k], codec, ALIGNED, STREAMS),)
    new = apply_rule(kind, row_step, grad, param, states, streams, RULE, STATES)

    store_values(primary, primary_codec, block, primary != 0, new[0], ALIGNED, STREAMS)
    for k in tl.static_range(STATES):
        state = streams.states[k]
        codec = codec_of(streams.codecs, STATES_FROM + k, STREAMS)
        wanted = k < RULE.n_always or state != 0
        store_values(state, codec, block, wanted, new[1 + k], ALIGNED, STREAMS)
    if STREAMS != "float32":
        if half != 0:
            store_halves(half, block, True, narrowed(new[0], half_codec), ALIGNED)


@triton.jit
def moved(address, n_bytes):
    """``address + n_bytes``; what is absent stays absent."""
    return tl.where(address != 0, address + n_bytes, 0)


@triton.jit
def stream_of(row, codecs, stream, begin, STREAMS: tl.constexpr):
    """Where element ``begin`` of a row's stream lies."""
    address = load(row + ROW_DATA + 8 * stream, tl.int64)
    return moved(address, begin * bytes_of(codec_of(codecs, stream, STREAMS)))


@triton.jit
def streams_of(row, grad, begin, STATES: tl.constexpr, STREAMS: tl.constexpr):
    """The streams of a chunk, and whether all of the row's are aligned."""
    grad_codec = load(grad + GRAD_CODEC, tl.int32)
    grad_at = load(grad + GRAD_DATA, tl.int64) + begin * bytes_of(grad_codec)
    codecs = load(row + ROW_CODECS, tl.int32)
    param = stream_of(row, codecs, PARAM, begin, STREAMS)
    is_float = codec_of(codecs, PARAM, STREAMS) == FLOAT32
    primary = tl.where(is_float, param, stream_of(row, codecs, MASTER, begin, STREAMS))
    half = tl.where(is_float, 0, param)
    addresses = primary | half
    states = ()
    for k in tl.static_range(STATES):
        states = states + (stream_of(row, codecs, STATES_FROM + k, begin, STREAMS),)
        addresses = addresses | states[k]
    grad_aligned = grad_at % 16 == 0
    streams = Streams(grad_at, grad_codec, grad_aligned, primary, half, states, codecs)
    return streams, addresses % 16 == 0


@triton.jit
def settings_of(step, group, RULE: tl.constexpr):
    """What is the same for a whole tensor; ``group`` is the address of its Options."""
    own = options_of(group, True, RULE)
    weight_decay, decoupled, maximize = own[1], own[2], own[3]  # these come first in every rule
    grad_mult = load(load(step + SCALARS, tl.int64) + S_GRAD_MULT, tl.float32)
    grad_mult = tl.where(maximize != 0, -1.0 * grad_mult, grad_mult)
    max_grad_value = load(step + MAX_GRAD_VALUE, tl.float64).to(tl.float32)
    return kind_of(weight_decay, decoupled, RULE.variant(*own)), grad_mult, max_grad_value


@triton.jit
def update_chunk(
    step, options, grads, rows, chunks, c, row_steps,
    RULE: tl.constexpr, STATES: tl.constexpr, STREAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    record = chunks + tl.cast(c, tl.int64) * CHUNK_BYTES
    r = load(record + CHUNK_ROW, tl.int32).to(tl.int64)
    index = load(record + CHUNK_INDEX, tl.int32)
    row = rows + r * ROW_BYTES
    grad = grads + r * GRAD_BYTES
    row_step = row_steps + r * RULE.row_step_bytes
    group = options + load(row + ROW_GROUP, tl.int32).to(tl.int64) * OPTIONS_BYTES
    numel = load(row + ROW_NUMEL, tl.int64)
    n = tl.where(load(grad + GRAD_PRESENT, tl.int32) != 0, chunk_elements(numel, index), 0)
    streams, aligned = streams_of(row, grad, index.to(tl.int64) * CHUNK, STATES, STREAMS)
    kind, grad_mult, most = settings_of(step, group, RULE)
    GRAD: tl.constexpr = "wide" if STREAMS == "any-states" else "either"
    if STREAMS == "any-states":
        aligned = aligned & streams.grad_aligned  # AMD has no registers left for two more masks
    whole = tl.where(aligned, n // BLOCK * BLOCK, 0)
    if STATES == 1 and STREAMS == "float32":
        # With few loads the compiler puts all others behind a load that waits for another one, and
        # a gradient that may be of either kind is such a load.
        wide = tl.where(streams.grad_aligned, whole, 0)
        for first in range(0, wide, BLOCK):
            update_block(streams, kind, grad_mult, most, row_step, first, n,
                         RULE, STATES, STREAMS, True, "wide", BLOCK)  # fmt: skip
        for first in range(wide, whole, BLOCK):
            update_block(streams, kind, grad_mult, most, row_step, first, n,
                         RULE, STATES, STREAMS, True, "narrow", BLOCK)  # fmt: skip
    else:
        for first in range(0, whole, BLOCK):
            update_block(streams, kind, grad_mult, most, row_step, first, n,
                         RULE, STATES, STREAMS, True, GRAD, BLOCK)  # fmt: skip
    for first in range(whole, n, BLOCK // 4):
        update_block(streams, kind, grad_mult, most, row_step, first, n,
                     RULE, STATES, STREAMS, False, "narrow", BLOCK // 4)  # fmt: skip
