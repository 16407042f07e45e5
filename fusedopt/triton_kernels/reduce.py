"""A warp turns chunks of gradients into words: csrc/cuda/reduce.cuh in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .codecs import FLOAT32, bytes_of, widened
from .scalars import in_range, rescale_for
from .tables import CHUNK, GRAD, LANES, NORM_IS_TWO, ROW, UNCOUNTED, read, span_of
from .words import with_magnitude, with_partial


@triton.jit
def add_pairs(x):
    """Neighbours together: [n] -> [n / 2]."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), 1)


@triton.jit
def sum_of_lanes(lane):
    """The tree of adjacent pairs over LANES lanes."""
    x = add_pairs(add_pairs(add_pairs(add_pairs(lane))))
    x = add_pairs(add_pairs(add_pairs(x)))
    return tl.sum(x, 0)  # of two


@triton.jit
def load_elements(data, at, n, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointer = data.to(tl.pointer_type(TYPE))
    if WHOLE:
        return tl.load(tl.multiple_of(pointer, 16) + at)
    else:
        return tl.load(pointer + at, mask=at < n, other=0)


@triton.jit
def load_gradients(data, codec, begin, n, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """fp32 values of ``SIZE`` elements from ``begin``; zeros from ``n`` on."""
    at = begin + tl.arange(0, SIZE)
    if codec == FLOAT32:
        x = load_elements(data, at, n, tl.float32, WHOLE)
    else:
        x = widened(load_elements(data, at, n, tl.uint16, WHOLE), codec)
    return x


@triton.jit
def accumulate(lane, largest, grad, mult1, mult2):
    x = grad * mult1
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered, with NaN above infinity
    return tl.fma(x * mult2, x * mult2, lane), tl.maximum(largest, magnitude)


@triton.jit
def scan(data, codec, n, mult1, mult2):
    """Sum of (grad * mult1 * mult2)^2, and the largest |grad * mult1|; NaN if there is one."""
    lane = tl.full([LANES], 0.0, tl.float32)
    largest = tl.full([LANES], 0, tl.int32)
    whole = tl.where(data % 16 == 0, n // (2 * LANES) * (2 * LANES), 0)
    for begin in range(0, whole, 2 * LANES):
        # two rows of lanes, so that a thread of a 64-wide wavefront loads 16 bytes of halves
        both = load_gradients(data, codec, begin, n, 2 * LANES, True)
        first, second = tl.split(tl.trans(tl.reshape(both, [2, LANES])))
        lane, largest = accumulate(lane, largest, first, mult1, mult2)
        lane, largest = accumulate(lane, largest, second, mult1, mult2)
    for begin in range(whole, n, LANES):
        x = load_gradients(data, codec, begin, n, LANES, False)
        inside = begin + tl.arange(0, LANES) < n  # 0 * inf is not 0
        new_lane, new_largest = accumulate(lane, largest, x, mult1, mult2)
        lane = tl.where(inside, new_lane, lane)
        largest = tl.where(inside, new_largest, largest)
    return sum_of_lanes(lane), tl.max(largest, 0).to(tl.float32, bitcast=True)


@triton.jit
def reduce_chunk(chunks, c, rows, grads, inv_scale, flags, words):
    """``words`` with the chunk added."""
    chunk = read(CHUNK, chunks, tl.cast(c, tl.int64))
    r = chunk.row.to(tl.int64)
    grad, row = read(GRAD, grads, r), read(ROW, rows, r)
    begin, n = span_of(chunk, row, grad)
    data = grad.data + begin * bytes_of(grad.codec)
    one = tl.full([], 1.0, tl.float32)
    sum, largest = scan(data, grad.codec, n, inv_scale, one)
    if (flags & NORM_IS_TWO) == 0:
        words = with_magnitude(words, largest)
    else:
        exponent = tl.full([], 0, tl.int32)
        if (in_range(sum) == 0) & (n != 0):
            if (largest == 0.0) | (largest - largest != 0.0):
                sum = largest
            else:
                scale, exponent = rescale_for(largest)
                sum, _ = scan(data, grad.codec, n, inv_scale, scale)
        counted = ((flags & UNCOUNTED) == 0) | (row.uncounted == 0)
        words = with_partial(words, sum, exponent, counted)
    return words
