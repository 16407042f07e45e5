"""A warp turns one chunk of gradients into its partial: csrc/cuda/reduce.cuh in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .dtypes import widened
from .scalars import in_range, rescale_for
from .tables import (
    CHUNK,
    CHUNK_WORDS,
    FLOAT16,
    FLOAT32,
    GRAD_WORDS,
    LANES,
    NORM_IS_TWO,
    ROW_WORDS,
    chunk_elements,
    half_word,
    word,
)


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
def load_gradients(data, dtype, begin, n, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """fp32 values of ``SIZE`` elements from ``begin``; zeros from ``n`` on."""
    at = begin + tl.arange(0, SIZE)
    if dtype == FLOAT32:
        floats = data.to(tl.pointer_type(tl.float32))
        if WHOLE:
            x = tl.load(tl.multiple_of(floats, 16) + at)
        else:
            x = tl.load(floats + at, mask=at < n, other=0.0)
    else:
        halves = data.to(tl.pointer_type(tl.uint16))
        if WHOLE:
            bits = tl.load(tl.multiple_of(halves, 16) + at)
        else:
            bits = tl.load(halves + at, mask=at < n, other=0)
        x = widened(bits, dtype == FLOAT16)
    return x


@triton.jit
def accumulate(lane, largest, grad, mult1, mult2):
    x = grad * mult1
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered, with NaN above infinity
    return tl.fma(x * mult2, x * mult2, lane), tl.maximum(largest, magnitude)


@triton.jit
def scan(data, dtype, n, mult1, mult2):
    """Sum of (grad * mult1 * mult2)^2, and the largest |grad * mult1|; NaN if there is one."""
    lane = tl.full([LANES], 0.0, tl.float32)
    largest = tl.full([LANES], 0, tl.int32)
    whole = tl.where(data % 16 == 0, n // (2 * LANES) * (2 * LANES), 0)
    for begin in range(0, whole, 2 * LANES):
        # two rows of lanes at once, so that a wavefront of 64 has 16 bytes of halves a thread
        both = load_gradients(data, dtype, begin, n, 2 * LANES, True)
        first, second = tl.split(tl.trans(tl.reshape(both, [2, LANES])))
        lane, largest = accumulate(lane, largest, first, mult1, mult2)
        lane, largest = accumulate(lane, largest, second, mult1, mult2)
    for begin in range(whole, n, LANES):
        x = load_gradients(data, dtype, begin, n, LANES, False)
        inside = begin + tl.arange(0, LANES) < n  # 0 * inf is not 0
        new_lane, new_largest = accumulate(lane, largest, x, mult1, mult2)
        lane = tl.where(inside, new_lane, lane)
        largest = tl.where(inside, new_largest, largest)
    return sum_of_lanes(lane), tl.max(largest, 0).to(tl.float32, bitcast=True)


@triton.jit
def reduce_chunk(chunks, c, rows, grads, inv_scale, flags):
    """The chunk's partial, fp64. A finite chunk has a finite one."""
    record = chunks + tl.cast(c, tl.int64) * CHUNK_WORDS * 8
    row = half_word(record, 0).to(tl.int64)
    index = half_word(record, 1)
    grad = grads + row * GRAD_WORDS * 8
    data = word(grad, 0)
    dtype = half_word(grad, 2)
    numel = word(rows + row * ROW_WORDS * 8, 6)
    n = tl.where(half_word(grad, 3) != 0, chunk_elements(numel, index), 0)
    size = tl.where(dtype == FLOAT32, 4, 2).to(tl.int64)
    data += index.to(tl.int64) * CHUNK * size
    one = tl.full([], 1.0, tl.float32)
    sum, largest = scan(data, dtype, n, inv_scale, one)
    partial = sum.to(tl.float64)
    if (flags & NORM_IS_TWO) == 0:
        partial = largest.to(tl.float64)
    elif (in_range(sum) == 0) & (n != 0):
        if (largest == 0.0) | (largest - largest != 0.0):
            partial = largest.to(tl.float64)
        else:
            scale = rescale_for(largest)
            unscale = 1.0 / scale.to(tl.float64)
            sum, _ = scan(data, dtype, n, inv_scale, scale)
            partial = sum.to(tl.float64) * unscale * unscale
    return partial
