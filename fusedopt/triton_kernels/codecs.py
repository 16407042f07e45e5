"""How the elements of a stream lie in memory: csrc/codecs.h in Triton.

From ``dither`` on statement for statement. Bits are uint32; ``narrowed`` and ``split`` return what
is cut to the width in memory when it is stored.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fusedopt import codecs

# enum class Codec
FLOAT32 = tl.constexpr(codecs.FLOAT32.number)
FLOAT16 = tl.constexpr(codecs.FLOAT16.number)
BFLOAT16 = tl.constexpr(codecs.BFLOAT16.number)
DITHERED = tl.constexpr(codecs.DITHERED.number)
LOG8 = tl.constexpr(codecs.LOG8.number)
LOG8_POSITIVE = tl.constexpr(codecs.LOG8_POSITIVE.number)
REMAINDER16 = tl.constexpr(codecs.REMAINDER16.number)
REMAINDER8 = tl.constexpr(codecs.REMAINDER8.number)

DITHER_OF_ELEMENT = tl.constexpr(0xC13FA9A9)
DITHER_OF_STREAM = tl.constexpr(0x68E31DA5)
SCALE_BLOCK = tl.constexpr(codecs.SCALE_BLOCK)


@triton.jit
def bytes_of(codec):
    """Of a param or a gradient."""
    return tl.where(codec == FLOAT32, 4, 2).to(tl.int64)


@triton.jit
def is_byte(codec):
    return (codec == LOG8) | (codec == LOG8_POSITIVE) | (codec == REMAINDER8)


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


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dither(seed, element):
    return element.to(tl.uint32) * DITHER_OF_ELEMENT + seed


@triton.jit
def dither_seed(first, step, stream):
    return (
        first.to(tl.uint32) * DITHER_OF_ELEMENT
        + step.to(tl.uint32) * 0x91E10DA5
        + tl.cast(stream, tl.uint32) * DITHER_OF_STREAM
    )


@triton.jit
def is_nan(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


# ---- Dithered -----------------------------------------------------------------------------------


@triton.jit
def dithered_narrowed(x, dither):
    f = bits_of(x)
    down = f >> 16
    rounded = (f + (dither >> 16)) >> 16
    finite = tl.where((rounded & 0x7FFF) == 0x7F80, down, rounded)
    return tl.where(is_nan(f), down | 0x40, finite)


# ---- Log8 ---------------------------------------------------------------------------------------


@triton.jit
def log8_zero(SIGNED: tl.constexpr):
    octaves: tl.constexpr = 9 if SIGNED else 20
    return tl.full([], (127 - octaves) << 23, tl.uint32)


@triton.jit
def log8_magnitude(x):
    a = bits_of(x) & 0x7FFFFFFF
    return tl.where(a < 0x7F800000, a, 0)


@triton.jit
def log8_scale_of(largest_magnitude):
    e = (largest_magnitude + 0xFFFFF) >> 23
    return tl.where(e < 7, 7, tl.where(e > 253, 253, e))


@triton.jit
def log8_up(scale):
    return float_of((254 - scale) << 23)


@triton.jit
def log8_down(scale):
    return float_of(scale << 23)


@triton.jit
def log8_narrowed(x, up, dither, SIGNED: tl.constexpr):
    zero = log8_zero(SIGNED)
    last: tl.constexpr = 127 if SIGNED else 254
    non_finite: tl.constexpr = 0x80 if SIGNED else 0xFF
    bits = bits_of(x)
    a = bits & 0x7FFFFFFF
    n = 3 * (bits_of(tl.fma(float_of(a), up, float_of(zero))) - zero)
    code = (n + (dither >> 11)) >> 21
    code = tl.where(code < last, code, last)
    is_none = a >= 0x7F800000
    if SIGNED:
        code = tl.where(n < (1 << 20), 0, code)
        code |= tl.where(code > 0, bits >> 24 & 0x80, 0)
    else:
        code = tl.where((code == 0) & (a > 0), 1, code)
        is_none = is_none | (bits > 0x80000000)
    return tl.where(is_none, non_finite, code)


@triton.jit
def log8_widened(code, down, SIGNED: tl.constexpr):
    zero = log8_zero(SIGNED)
    cell = code & 0x7F if SIGNED else code
    bits = zero + cell * 699050 + (cell * 683 >> 10)
    x = (float_of(bits) - float_of(zero)) * down
    if SIGNED:
        with_sign = bits_of(x) | (code & 0x80) << 24
        return float_of(tl.where(code == 0x80, 0x7FC00000, with_sign))
    else:
        return tl.where(code == 0xFF, float("inf"), x)


# ---- Remainder16 --------------------------------------------------------------------------------
# The param as its bits, the remainder as int32.


@triton.jit
def remainder16_joined_bfloat16(param, remainder):
    high = param.to(tl.uint32) << 16
    bits = high + remainder.to(tl.uint32, bitcast=True)
    return float_of(tl.where(is_nan(bits), high, bits))


@triton.jit
def remainder16_split_bfloat16(x):
    bits = bits_of(x)
    high = tl.where(is_nan(bits), bits >> 16 | 0x40, (bits + 0x8000) >> 16)
    return high, tl.where(is_nan(bits), 0, bits & 0xFFFF)


@triton.jit
def remainder16_unit(param):
    exponent = bits_of(param) >> 23 & 0xFF
    return float_of(tl.where(exponent < 113, 113 - 25, exponent - 25) << 23)


@triton.jit
def remainder16_joined_float16(param, remainder):
    p = float16_to_float(param)
    x = tl.fma(remainder.to(tl.float32), remainder16_unit(p), p)
    is_param = (remainder == 0) | ((param & 0x7C00) == 0x7C00)
    return tl.where(is_param, p, x)


@triton.jit
def remainder16_split_float16(x):
    param = float_to_float16(x)
    p = float16_to_float(param)
    per_unit = float_of((254 << 23) - bits_of(remainder16_unit(p)))
    rounder = tl.full([], 12582912.0, tl.float32)  # 0x1.8p23
    units = (x - p) * per_unit + rounder
    remainder = bits_of(units) - bits_of(rounder)
    return param.to(tl.uint32), tl.where((param & 0x7C00) == 0x7C00, 0, remainder)


# ---- Remainder8 ---------------------------------------------------------------------------------


@triton.jit
def remainder8_joined(param, remainder):
    high = param.to(tl.uint32) << 16
    low = remainder.to(tl.uint32, bitcast=True) << 8
    return float_of(tl.where(is_nan(high + low), high, high + low))


@triton.jit
def remainder8_split(x, dither):
    bits = bits_of(x)
    rounded = (bits + (dither >> 24)) >> 8
    is_inf = (rounded & 0x7FFFFF) == 0x7F8000
    c = tl.where(is_inf, bits >> 8, rounded)
    high = tl.where(is_nan(bits), bits >> 16 | 0x40, (c + 0x80) >> 8)
    return high, tl.where(is_nan(bits), 0, c & 0xFF)
