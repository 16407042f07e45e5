"""A warp adds up the squares of a chunk's elements as integers: csrc/cuda/exact.cuh in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .codecs import bytes_of
from .reduce import load_gradients
from .tables import CHUNK, GRAD, ROW, UNCOUNTED, read, span_of
from .words import DIGITS, INF_CHUNKS, LOWEST, NAN_CHUNKS, SLOTS

SIZE = tl.constexpr(128)  # elements added at once; with more, a thread has too many registers
WINDOW = tl.constexpr(32)  # exponents
HIGHEST_FIELD = tl.constexpr(254)  # of the exponents of finite numbers
MARGIN = tl.constexpr(4)  # exponents that a chunk may lie above the one before
INF = tl.constexpr(0x7F800000)
FIRST_GUESS = tl.constexpr(127)


@triton.jit
def field_of(magnitude):
    """The exponent field; denormals have that of the smallest normals."""
    return tl.maximum(magnitude >> 23, 1)


@triton.jit
def accumulate(low, high, largest, below, magnitude, top):
    whole = ((magnitude & 0x7FFFFF) | tl.where(magnitude < 0x800000, 0, 0x800000)).to(tl.uint64)
    down = top - field_of(magnitude)
    inside = (down >= 0) & (down < WINDOW)
    square = tl.where(inside, whole * whole, 0).to(tl.uint64)
    shift = tl.where(inside, 2 * (WINDOW - 1 - down), 0).to(tl.uint64)
    addend = square << shift
    low = low + addend
    carry = (low < addend).to(tl.uint64)
    high = high + ((square >> 1) >> (63 - shift)) + carry
    below = tl.maximum(below, tl.where(down >= WINDOW, magnitude, 0))
    return low, high, tl.maximum(largest, magnitude), below


@triton.jit
def squares(data, codec, n, inv_scale, top):
    """The sum of the squares in the window whose highest exponent is ``top``, as two halves of 64
    bits; the largest magnitude of all elements, and below the window."""
    low = tl.full([SIZE], 0, tl.uint64)
    high = tl.full([SIZE], 0, tl.uint64)
    largest = tl.full([SIZE], 0, tl.int32)
    below = tl.full([SIZE], 0, tl.int32)
    whole = tl.where(data % 16 == 0, n // SIZE * SIZE, 0)
    for begin in range(0, whole, SIZE):
        x = load_gradients(data, codec, begin, n, SIZE, True) * inv_scale
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        low, high, largest, below = accumulate(low, high, largest, below, magnitude, top)
    for begin in range(whole, n, SIZE):
        x = load_gradients(data, codec, begin, n, SIZE, False) * inv_scale
        inside = begin + tl.arange(0, SIZE) < n  # 0 * inf is not 0
        magnitude = tl.where(inside, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        low, high, largest, below = accumulate(low, high, largest, below, magnitude, top)
    low, high = sum_of_lanes(low, high)
    return low, high, tl.max(largest, 0), tl.max(below, 0)


@triton.jit
def sum_of_lanes(low, high):
    """By digits of 32 bits, whose sums have room for carries."""
    first = tl.sum(low & 0xFFFFFFFF, 0)
    second = tl.sum(low >> 32, 0) + (first >> 32)
    third = tl.sum(high & 0xFFFFFFFF, 0) + (second >> 32)
    fourth = tl.sum(high >> 32, 0) + (third >> 32)
    return (first & 0xFFFFFFFF) | (second << 32), (third & 0xFFFFFFFF) | (fourth << 32)


@triton.jit
def clamped(shift):
    return tl.minimum(tl.maximum(shift, 0), 63).to(tl.uint64)


@triton.jit
def digits_of(low, high, top):
    """The digits of a window's sum, each in its slot."""
    slot = tl.arange(0, SLOTS)
    offset = 32 * slot - (2 * (top - (WINDOW - 1) - 150) - LOWEST)
    at = clamped(offset)
    digit = (low >> at) | ((high << 1) << (63 - at))
    digit = tl.where(offset < 0, low << clamped(-offset), digit)
    digit = tl.where(offset >= 64, high >> clamped(offset - 64), digit)
    wanted = (offset > -32) & (offset < 128) & (slot < DIGITS)
    return tl.where(wanted, digit & 0xFFFFFFFF, 0).to(tl.int64)


@triton.jit
def reduce_chunk_exactly(chunks, c, rows, grads, inv_scale, flags, words, guess):
    """``words`` with the chunk added, and the highest exponent to look for first in the next."""
    chunk = read(CHUNK, chunks, tl.cast(c, tl.int64))
    r = chunk.row.to(tl.int64)
    grad, row = read(GRAD, grads, r), read(ROW, rows, r)
    begin, n = span_of(chunk, row, grad)
    data = grad.data + begin * bytes_of(grad.codec)
    counted = ((flags & UNCOUNTED) == 0) | (row.uncounted == 0)
    slot = tl.arange(0, SLOTS)
    top = guess
    looks = tl.full([], 0, tl.int32)
    due = tl.full([], 1, tl.int32)
    while due != 0:
        low, high, largest, below = squares(data, grad.codec, n, inv_scale, top)
        highest = field_of(largest)
        if largest >= INF:
            words += tl.where(slot == tl.where(largest > INF, NAN_CHUNKS, INF_CHUNKS), 1, 0)
            due = due * 0
        elif (looks == 0) & (highest > top):
            top = highest
        else:
            words += tl.where(counted, digits_of(low, high, top), 0)
            guess = tl.where(largest != 0, tl.minimum(highest + MARGIN, HIGHEST_FIELD), guess)
            due = below
            top = field_of(below)
        looks += 1
    return words, guess
