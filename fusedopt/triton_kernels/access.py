"""Blocks of a chunk's streams in registers: csrc/cuda/access.cuh in Triton.

A codec is read from a table. So there is a load for fp32 and one for 16 bits, and the mask of one
of them is empty; where the codec is a constant, the compiler drops that load. A whole block of a
16-bit stream is accessed in words of two elements. With single elements, Triton would give a thread
eight neighbours of every stream, and fp32 stores, of four each, would need shared memory.

ALIGNED: all elements of the block exist, and the stream starts on a 16-byte boundary.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .codecs import FLOAT32, bytes_of, narrowed, widened
from .tables import CODEC_BITS, CODEC_MASK, load


class Stream(NamedTuple):
    """A stream from the chunk's first element on.

    ``there`` is computed from the address, which is in registers anyway: 0 if there is no stream.
    """

    address: tl.tensor
    codec: tl.tensor
    there: tl.tensor


class Block(NamedTuple):
    """Elements that are updated together."""

    at: tl.tensor
    pair: tl.tensor  # of 16-bit elements
    inside: tl.tensor


@triton.jit
def stream_at(data, codec, begin, IS_FLOAT: tl.constexpr):
    """IS_FLOAT: the stream is fp32, whatever ``codec`` says."""
    if IS_FLOAT:
        codec = tl.full([], FLOAT32, tl.int32)
    address = tl.where(data != 0, data + begin * bytes_of(codec), 0)
    return Stream(address, codec, address != 0)


@triton.jit
def stream_of(row, number, begin, IS_FLOAT: tl.constexpr):
    codec = (row.codecs >> (CODEC_BITS * number)) & CODEC_MASK
    return stream_at(load(row.data + 8 * number, tl.int64), codec, begin, IS_FLOAT)


@triton.jit
def load_elements(address, at, wanted, TYPE: tl.constexpr, ALIGNED: tl.constexpr, otherwise=0):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + at, mask=wanted, other=otherwise, eviction_policy="evict_first")


@triton.jit
def store_elements(address, at, wanted, value, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(value.dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + at, value, mask=wanted, eviction_policy="evict_first")


@triton.jit
def load_halves(address, block, wanted, ALIGNED: tl.constexpr):
    if ALIGNED:
        return load_elements(address, block.pair, wanted, tl.uint32, True)
    else:
        return load_elements(address, block.at, block.inside & wanted, tl.uint16, False)


@triton.jit
def unpacked(loaded, ALIGNED: tl.constexpr):
    """The result of ``load_halves`` as single elements."""
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
        store_elements(address, block.pair, wanted, words, True)
    else:
        store_elements(address, block.at, block.inside & wanted, bits, False)


@triton.jit
def load_values(stream, block, ALIGNED: tl.constexpr):
    """Loads elements as stored; ``values_of`` makes them fp32, after the loads of all streams."""
    is_float = stream.codec == FLOAT32
    wanted = block.inside & (stream.there & is_float)
    floats = load_elements(stream.address, block.at, wanted, tl.float32, ALIGNED)
    halves = load_halves(stream.address, block, stream.there & (is_float == 0), ALIGNED)
    return floats, halves


@triton.jit
def values_of(loaded, stream, ALIGNED: tl.constexpr):
    values, halves = loaded
    if stream.codec != FLOAT32:
        values = widened(unpacked(halves, ALIGNED), stream.codec)
    return values


@triton.jit
def or_absent(stream, values, ABSENT: tl.constexpr):
    """``ABSENT`` where there is no such stream."""
    return tl.where(stream[2], values, ABSENT)  # in a nested tuple, Triton 3.6 loses the names


@triton.jit
def store_values(stream, block, x, ALIGNED: tl.constexpr):
    if stream.codec == FLOAT32:
        wanted = block.inside & stream.there
        store_elements(stream.address, block.at, wanted, x, ALIGNED)
    else:
        store_halves(stream.address, block, stream.there, narrowed(x, stream.codec), ALIGNED)


@triton.jit
def load_gradient(grad, aligned, block, ALIGNED: tl.constexpr):
    """As ``load_values``; only ``aligned`` says whether the stream starts on a 16-byte boundary."""
    is_float = grad.codec == FLOAT32
    wanted = block.inside & is_float
    halves = load_halves(grad.address, block, aligned & (is_float == 0), ALIGNED)
    wide = load_elements(grad.address, block.at, wanted & aligned, tl.float32, True)
    narrow = wanted & (aligned == 0)
    return load_elements(grad.address, block.at, narrow, tl.float32, False, wide), halves


@triton.jit
def gradient_of(loaded, grad, aligned, block, ALIGNED: tl.constexpr):
    values, halves = loaded
    is_half = grad.codec != FLOAT32
    narrow = block.inside & (is_half & (aligned == 0))
    bits = unpacked(halves, ALIGNED)
    bits = load_elements(grad.address, block.at, narrow, tl.uint16, False, bits)
    if is_half:
        values = widened(bits, grad.codec)
    return values


@triton.jit
def current_param(master, half, has_master, codec):
    """The param before this step. If it is not its master's rounding, someone wrote to it."""
    written = widened(half, codec)
    if has_master:
        written = tl.where(narrowed(master, codec) == half, master, written)
    return written
