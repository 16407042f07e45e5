"""How states and masters of fewer bits are stored, to the bit, in numpy: the model of the codecs.

Written from the contract of the codecs and not from the product. A conversion is arithmetic on
whole numbers in int64, the bits of fp32 values among them; the only operations on floats are
those that the contract names, each rounded once.

A log8 code counts thirds of octaves: with o = 2^-E0 a value x of a block with exponent e is stored
as the distance of o + x * 2^(127 - e) from o on the logarithmic scale that a float's bits are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .exact import Floats, fma

Ints = NDArray[np.int64]
BLOCK = 128
EXPONENTS = range(7, 254)  # of a block
HALF = 1 << 31  # in place of a dither: to nearest
INF, QUIET, MOST = 0x7F800000, 0x40, 1 << 32


class Log8(NamedTuple):
    """The two kinds: of a moment with a sign, and of one that is a mean of squares."""

    octaves: int
    last: int  # largest code of a magnitude
    nonfinite: int
    signed: bool

    @property
    def offset(self) -> np.float32:
        return np.float32(2.0**-self.octaves)


MOMENT = Log8(9, 127, 0x80, True)
SQUARES = Log8(20, 254, 0xFF, False)


def bits_of(x: Any) -> Ints:
    return np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64)


def float_of(bits: Any) -> Floats:
    return (np.asarray(bits, np.int64) % MOST).astype(np.uint32).view(np.float32)


def is_nan(bits: Ints) -> NDArray[np.bool_]:
    return bits % (1 << 31) > INF


def dither(elements: Any, step: int, stream: int) -> Ints:
    """The lattice; ``elements`` are places in the whole tensor."""
    terms = [
        int(i) * 0xC13FA9A9 + step * 0x91E10DA5 + stream * 0x68E31DA5 for i in np.asarray(elements)
    ]
    return np.array([term % MOST for term in terms], np.int64)


# ---- log8 ----------------------------------------------------------------------------------------


def block_exponents(x: Floats) -> Ints:
    """One for each block: of its largest finite magnitude, brought to the next third."""
    found = []
    for at in range(0, x.size, BLOCK):
        magnitudes = bits_of(np.abs(x[at : at + BLOCK]))
        largest = max((int(m) for m in magnitudes if m < INF), default=0)
        found.append(min(max((largest + 0xFFFFF) // (1 << 23), 7), 253))
    return np.array(found, np.int64)


def log8_codes(kind: Log8, x: Floats, exponents: Any, t: Any) -> Ints:
    """``exponents`` one for each element."""
    up = np.ldexp(np.float64(1), 127 - np.asarray(exponents, np.int64)).astype(np.float32)
    sums = fma(np.where(np.isfinite(x), np.abs(x), 0).astype(np.float32), up, kind.offset)
    n = 3 * (bits_of(sums) - bits_of(kind.offset))
    code = np.minimum((n + (np.asarray(t, np.int64) >> 11)) >> 21, kind.last)
    if kind.signed:
        code = np.where(n < 1 << 20, 0, code)
        code = np.where((code > 0) & (x < 0), code + 128, code)
        return np.where(np.isfinite(x), code, kind.nonfinite)
    code = np.where((x > 0) & (code == 0), 1, code)
    return np.where(np.isfinite(x) & (x >= 0), code, kind.nonfinite)


def log8_values(kind: Log8, codes: Any, exponents: Any) -> Floats:
    codes = np.asarray(codes, np.int64)
    cell = codes % 128 if kind.signed else codes
    above = float_of(bits_of(kind.offset) + (cell << 21) // 3) - kind.offset
    down = np.ldexp(np.float64(1), np.asarray(exponents, np.int64) - 127)
    x = (above.astype(np.float64) * down).astype(np.float32)  # exact before its one rounding
    x = np.where(kind.signed & (codes > 128), -x, x)
    beyond = np.float32(np.nan if kind.signed else np.inf)
    return np.where(codes == kind.nonfinite, beyond, x).astype(np.float32)


def log8_encoded(kind: Log8, x: Floats, t: Any) -> tuple[Ints, Ints]:
    """The codes, and the exponents of the blocks."""
    exponents = block_exponents(x)
    return log8_codes(kind, x, per_element(exponents, x.size), t), exponents


def per_element(exponents: Any, n: int) -> Ints:
    return np.repeat(np.asarray(exponents, np.int64), BLOCK)[:n]


# ---- bf16 ----------------------------------------------------------------------------------------


def bf16_dithered(x: Floats, t: Any) -> Ints:
    bits = bits_of(x)
    rounded = (bits + (np.asarray(t, np.int64) >> 16)) // 65536 % 65536
    becomes_inf = np.isfinite(x) & (rounded % 32768 == INF >> 16)
    rounded = np.where(becomes_inf, bits // 65536, rounded)
    return np.where(np.isnan(x), bits // 65536 | QUIET, rounded)


def bf16_values(codes: Any) -> Floats:
    return float_of(np.asarray(codes, np.int64) << 16)


# ---- remainders ----------------------------------------------------------------------------------


def low_signed(bits: Ints, width: int) -> Ints:
    low = bits % (1 << width)
    return np.where(low < 1 << (width - 1), low, low - (1 << width))


def bf16_split(x: Floats) -> tuple[Ints, Ints]:
    """The parameter's bits and the remainder of 16 bits."""
    bits = bits_of(x)
    nearest = (bits + 0x8000) // 65536 % 65536
    nan = np.isnan(x)
    return np.where(nan, bits // 65536 | QUIET, nearest), np.where(nan, 0, low_signed(bits, 16))


def bf16_joined(param: Any, remainder: Any) -> Floats:
    param = np.asarray(param, np.int64)
    bits = ((param << 16) + remainder) % MOST
    return float_of(np.where(is_nan(bits), param << 16, bits))


def bf16_split8(x: Floats, t: Any) -> tuple[Ints, Ints]:
    """The parameter's bits and the remainder of 8 bits: a master of 24 bits."""
    bits = bits_of(x)
    c = (bits + (np.asarray(t, np.int64) >> 24)) // 256
    becomes_inf = np.isfinite(x) & (c % (1 << 23) == INF >> 8)
    c = np.where(becomes_inf, bits // 256, c)
    nan = np.isnan(x)
    nearest = (c + 0x80) // 256 % 65536
    return np.where(nan, bits // 65536 | QUIET, nearest), np.where(nan, 0, low_signed(c, 8))


def bf16_joined8(param: Any, remainder: Any) -> Floats:
    return bf16_joined(param, np.asarray(remainder, np.int64) * 256)


def fp16_quantum(param: NDArray[np.float16]) -> NDArray[np.float64]:
    """Of a remainder beside fp16."""
    _, exponent = np.frexp(param.astype(np.float64))
    exponent = np.where(param == 0, -14, exponent - 1)  # frexp's fraction is below 1
    return np.ldexp(1.0, np.maximum(exponent, -14) - 25)


def fp16_split(x: Floats) -> tuple[NDArray[np.float16], Ints]:
    """The parameter and its remainder."""
    with np.errstate(over="ignore"):
        param = x.astype(np.float16)
    finite = np.isfinite(param)
    whole = np.where(finite, param, 0).astype(np.float16)
    rest = np.where(finite, x, 0).astype(np.float64) - whole.astype(np.float64)
    return param, np.rint(rest / fp16_quantum(whole)).astype(np.int64)


def fp16_joined(param: NDArray[np.float16], remainder: Any) -> Floats:
    finite = np.isfinite(param)
    whole = np.where(finite, param, 0).astype(np.float16)
    quantum = fp16_quantum(whole).astype(np.float32)
    x = fma(np.asarray(remainder).astype(np.float32), quantum, whole.astype(np.float32))
    keeps = ~finite | (np.asarray(remainder) == 0)
    return np.where(keeps, param.astype(np.float32), x).astype(np.float32)
