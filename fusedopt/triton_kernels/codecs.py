"""How the elements of a stream lie in memory: csrc/codecs.h in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedopt.backends.records import CODECS

# enum class Codec
FLOAT32 = tl.constexpr(CODECS[torch.float32])
FLOAT16 = tl.constexpr(CODECS[torch.float16])
BFLOAT16 = tl.constexpr(CODECS[torch.bfloat16])


@triton.jit
def bytes_of(codec):
    return tl.where(codec == FLOAT32, 4, 2).to(tl.int64)


@triton.jit
def float16_to_float(bits):
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def float_to_float16(x):
    return x.to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def bfloat16_to_float(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def float_to_bfloat16(x):
    """By integer arithmetic: some GPUs have no instruction for it."""
    f = x.to(tl.uint32, bitcast=True)
    rounded = (f + 0x7FFF + ((f >> 16) & 1)) >> 16
    quiet_nan = (f >> 16) | 0x40
    return tl.where(x != x, quiet_nan, rounded).to(tl.uint16)


@triton.jit
def widened(bits, codec):
    """For 16-bit codecs; ``codec`` is the same for a whole block."""
    if codec == FLOAT16:
        x = float16_to_float(bits)
    else:
        x = bfloat16_to_float(bits)
    return x


@triton.jit
def narrowed(x, codec):
    """Rounds to nearest, ties to even."""
    if codec == FLOAT16:
        bits = float_to_float16(x)
    else:
        bits = float_to_bfloat16(x)
    return bits
