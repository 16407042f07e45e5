"""The tables of a plan as kernels see them (csrc/plan.h, csrc/cuda/step.h), and loads from them.

Addresses are int64 words in device memory. Every record is a whole number of words.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(8192)  # kChunk
LANES = tl.constexpr(256)  # kLanes

# enum class DType
FLOAT32 = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)

# Words of a record.
ROW_WORDS = tl.constexpr(8)  # param, master, state[3], step; numel; group, dtype
GRAD_WORDS = tl.constexpr(2)  # data; dtype, present
CHUNK_WORDS = tl.constexpr(2)  # row, index; position
OPTIONS_WORDS = tl.constexpr(8)  # a group's, of either rule
NUMBER_WORDS = tl.constexpr(2)  # data; field, is_double
ROW_STEP_FLOATS = tl.constexpr(8)  # the rule's Hyper in the order of rules.py; last, the count
COUNT = tl.constexpr(7)

# StepHeader (fusedopt/backends/triton.py): what the CUDA kernels get by value.
MAX_GRAD_NORM = tl.constexpr(0)  # fp64; negative: no clipping
MAX_GRAD_VALUE = tl.constexpr(1)  # fp64
GRAD_SCALE = tl.constexpr(2)  # addresses, 0 for none
FOUND_INF = tl.constexpr(3)
INF_FLAG = tl.constexpr(4)
SCALARS = tl.constexpr(5)
N_NUMBERS = tl.constexpr(6)
FLAGS = tl.constexpr(7)
NORM_IS_TWO = tl.constexpr(1)  # bits of FLAGS
MEASURED = tl.constexpr(2)
SKIP_NONFINITE = tl.constexpr(4)


@triton.jit
def word(address, index):
    return tl.load(address.to(tl.pointer_type(tl.int64)) + index)


@triton.jit
def half_word(address, index):
    return tl.load(address.to(tl.pointer_type(tl.int32)) + index)


@triton.jit
def double(address, index):
    return tl.load(address.to(tl.pointer_type(tl.float64)) + index)


@triton.jit
def single(address, index):
    return tl.load(address.to(tl.pointer_type(tl.float32)) + index)


@triton.jit
def set_single(address, index, value):
    tl.store(address.to(tl.pointer_type(tl.float32)) + index, value)


@triton.jit
def chunk_elements(numel, index):
    """Elements of a row's chunk, at most CHUNK."""
    left = numel - index.to(tl.int64) * CHUNK
    return tl.where(left < CHUNK, left, CHUNK).to(tl.int32)
