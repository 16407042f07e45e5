"""fp16 and bf16 as bit patterns: csrc/dtypes.h in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(bits, is_float16):
    """fp32 values of ``bits``, uint16; ``is_float16`` is the same for all of them."""
    if is_float16:
        x = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def narrowed(x, is_float16):
    """To the nearest, ties to even. bf16 by integer arithmetic, as some GPUs know no other."""
    if is_float16:
        half = x.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        f = x.to(tl.uint32, bitcast=True)
        rounded = (f + 0x7FFF + ((f >> 16) & 1)) >> 16
        quiet_nan = (f >> 16) | 0x40
        half = tl.where(x != x, quiet_nan, rounded).to(tl.uint16)
    return half
