"""csrc/codecs.h and triton_kernels/codecs.py at work on the same numbers: the same bits."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import pytest
import triton_interpreter
from cpp_library import compiled
from numpy.typing import NDArray

Array = NDArray[Any]
u32, f32 = np.uint32, np.float32
PIECE = 1 << 19  # elements; Triton has a limit

HARNESS = """
#include "codecs.h"
using namespace fusedopt;

template <bool kSigned>
void to_log8(int64_t n, const float* x, const uint32_t* scale, const uint32_t* t, uint32_t* out) {
  using C = Log8<kSigned>;
  for (int64_t i = 0; i < n; ++i) out[i] = C::narrowed(x[i], C::up(scale[i]), t[i]);
}
template <bool kSigned>
void of_log8(int64_t n, const uint32_t* code, const uint32_t* scale, float* out) {
  using C = Log8<kSigned>;
  for (int64_t i = 0; i < n; ++i) out[i] = C::widened(code[i], C::down(scale[i]));
}
template <class C>
void joined16(int64_t n, const uint16_t* p, const int32_t* rest, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = Remainder16::joined(C{p[i]}, static_cast<int16_t>(rest[i]));
}
template <class C>
void split16(int64_t n, const float* x, uint16_t* p, uint16_t* rest) {
  for (int64_t i = 0; i < n; ++i) {
    C param;
    rest[i] = static_cast<uint16_t>(Remainder16::split(x[i], param));
    p[i] = param.bits;
  }
}

extern "C" {
void dithers(int64_t n, const int64_t* first, const float* step, const int64_t* stream,
             const uint32_t* element, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = dither(dither_seed(static_cast<uint32_t>(first[i]), step[i],
                                static_cast<uint32_t>(stream[i])), element[i]);
}
void dithered(int64_t n, const float* x, const uint32_t* t, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Dithered::narrowed(x[i], t[i]);
}
void scales(int64_t n, const float* x, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Log8<true>::scale_of(Log8<true>::magnitude(x[i]));
}
void to_log8_1(int64_t n, const float* x, const uint32_t* s, const uint32_t* t, uint32_t* out) {
  to_log8<true>(n, x, s, t, out);
}
void to_log8_0(int64_t n, const float* x, const uint32_t* s, const uint32_t* t, uint32_t* out) {
  to_log8<false>(n, x, s, t, out);
}
void of_log8_1(int64_t n, const uint32_t* code, const uint32_t* scale, float* out) {
  of_log8<true>(n, code, scale, out);
}
void of_log8_0(int64_t n, const uint32_t* code, const uint32_t* scale, float* out) {
  of_log8<false>(n, code, scale, out);
}
void joined_bfloat16(int64_t n, const uint16_t* p, const int32_t* rest, float* out) {
  joined16<BFloat16>(n, p, rest, out);
}
void joined_float16(int64_t n, const uint16_t* p, const int32_t* rest, float* out) {
  joined16<Float16>(n, p, rest, out);
}
void split_bfloat16(int64_t n, const float* x, uint16_t* p, uint16_t* rest) {
  split16<BFloat16>(n, x, p, rest);
}
void split_float16(int64_t n, const float* x, uint16_t* p, uint16_t* rest) {
  split16<Float16>(n, x, p, rest);
}
void joined8(int64_t n, const uint16_t* p, const int32_t* rest, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = Remainder8::joined(BFloat16{p[i]}, static_cast<int8_t>(rest[i]));
}
void split8(int64_t n, const float* x, const uint32_t* t, uint16_t* p, uint8_t* rest) {
  for (int64_t i = 0; i < n; ++i) {
    BFloat16 param;
    rest[i] = static_cast<uint8_t>(Remainder8::split(x[i], t[i], param));
    p[i] = param.bits;
  }
}
}
"""
library = functools.cache(lambda: compiled(HARNESS))
rng = np.random.default_rng(0)


def in_cpp(function: str, *arrays: Array) -> None:
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    getattr(library(), function)(ctypes.c_int64(arrays[0].size), *pointers)


def in_triton(function: str, *arguments: Any) -> Any:
    pytest.importorskip("triton")
    text = getattr(triton_interpreter.part("codecs"), function)
    (n,) = {a.size for a in arguments if isinstance(a, np.ndarray)}
    pieces = []
    for at in range(0, n, PIECE):
        own = [a[at : at + PIECE] if isinstance(a, np.ndarray) else a for a in arguments]
        pieces.append(triton_interpreter.call(text, *own))
    if isinstance(pieces[0], tuple):
        return tuple(np.concatenate(column) for column in zip(*pieces, strict=True))
    return np.concatenate(pieces)


def assert_same(ours: Array, theirs: Array, *inputs: Array) -> None:
    """To the bit; any NaN for any other. Theirs is cut to the width in memory, as by a store."""
    if ours.dtype == f32:
        both_nan = np.isnan(ours) & np.isnan(theirs)
        ours, theirs = (np.where(both_nan, 0, values.view(u32)) for values in (ours, theirs))
    wrong = np.flatnonzero(ours != theirs.astype(ours.dtype))
    first = [column[wrong[:1]] for column in (*inputs, ours, theirs)]
    assert wrong.size == 0, (wrong.size, first)


@functools.cache
def floats() -> Array:
    """Of every exponent and both signs, with mantissas at the edges of what is cut off; others."""
    edges = [0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFF80, 0xFFFF, 0x10000, 0x17FFF, 0x18000, 0x7FFFFF]
    edges += [(0x7FFFFF >> k) ^ mask for k in range(0, 23, 2) for mask in (0, 0x7FFFFF)]
    grid = u32(np.arange(512)[:, None] << 23) | np.array(edges, u32)
    others = rng.integers(0, 1 << 32, 1 << 20, dtype=u32)
    return np.concatenate([np.repeat(grid.ravel(), 4), others]).view(f32)


def dithers_of(x: Array) -> Array:
    """The least and the most among them."""
    t = rng.integers(0, 1 << 32, x.size, dtype=u32)
    t[::4], t[1::4], t[2::8] = 0, 0xFFFFFFFF, 1 << 31
    return t


def test_dithers() -> None:
    n = 1 << 16
    first, stream = rng.integers(0, 1 << 62, n), rng.integers(0, 4, n)
    step = rng.integers(0, 1 << 24, n).astype(f32)
    element = rng.integers(0, 1 << 32, n, dtype=u32)
    ours = np.empty(n, u32)
    in_cpp("dithers", first, step, stream, element, ours)
    seeds = in_triton("dither_seed", first, step, stream)
    assert_same(ours, in_triton("dither", seeds, element), first, step, stream, element)


def test_dithered() -> None:
    x = floats()
    t = dithers_of(x)
    ours = np.empty(x.size, np.uint16)
    in_cpp("dithered", x, t, ours)
    theirs = in_triton("dithered_narrowed", x, t)
    nan = np.isnan(x)
    assert (theirs[nan] & 0x7FFF > 0x7F80).all()
    assert_same(ours[~nan], theirs[~nan], x[~nan], t[~nan])


def test_scales() -> None:
    x = floats()
    ours = np.empty(x.size, u32)
    in_cpp("scales", x, ours)
    assert_same(ours, in_triton("log8_scale_of", in_triton("log8_magnitude", x)), x)
    assert ours.min() == 7 and ours.max() == 253


@pytest.mark.parametrize("signed", [True, False])
def test_log8_narrowed(signed) -> None:
    """With the scale of a block whose largest it is, of one far larger, and any."""
    x = floats()
    t = dithers_of(x)
    own = np.empty(x.size, u32)
    in_cpp("scales", x, own)
    far = np.minimum(own + rng.integers(0, 24, x.size, dtype=u32), 253).astype(u32)
    found: set[int] = set()
    for scale in (own, far, rng.integers(7, 254, x.size, dtype=u32)):
        ours = np.empty(x.size, u32)
        in_cpp(f"to_log8_{signed:d}", x, scale, t, ours)
        theirs = in_triton("log8_narrowed", x, in_triton("log8_up", scale), t, signed)
        assert_same(ours, theirs, x, scale, t)
        found |= {*np.unique(theirs).tolist()}
    assert found == set(range(256))


@pytest.mark.parametrize("signed", [True, False])
def test_log8_widened(signed) -> None:
    """Every code with every scale."""
    code, scale = (column.ravel().astype(u32) for column in np.mgrid[:256, 7:254])
    ours = np.empty(code.size, f32)
    in_cpp(f"of_log8_{signed:d}", code, scale, ours)
    theirs = in_triton("log8_widened", code, in_triton("log8_down", scale), signed)
    assert_same(ours, theirs, code, scale)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_remainder16(name) -> None:
    x = floats()
    param, rest = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16)
    in_cpp(f"split_{name}", x, param, rest)
    theirs = in_triton(f"remainder16_split_{name}", x)
    there = ~np.isnan(x)
    assert_same(param[there], theirs[0][there], x[there])
    assert_same(rest, theirs[1], x)
    every = np.tile(np.arange(1 << 16, dtype=np.uint16), 12)
    rest32 = rng.integers(-(1 << 15), 1 << 15, every.size, dtype=np.int32)
    rest32[::5], rest32[1::5], rest32[2::5] = 0, -(1 << 15), (1 << 15) - 1
    ours = np.empty(every.size, f32)
    in_cpp(f"joined_{name}", every, rest32, ours)
    assert_same(ours, in_triton(f"remainder16_joined_{name}", every, rest32), every, rest32)


def test_remainder8() -> None:
    x = floats()
    t = dithers_of(x)
    param, rest = np.empty(x.size, np.uint16), np.empty(x.size, np.uint8)
    in_cpp("split8", x, t, param, rest)
    theirs = in_triton("remainder8_split", x, t)
    there = ~np.isnan(x)
    assert_same(param[there], theirs[0][there], x[there], t[there])
    assert_same(rest, theirs[1], x, t)
    every, rest32 = (column.ravel() for column in np.mgrid[: 1 << 16, -128:128:15])
    every, rest32 = every.astype(np.uint16), rest32.astype(np.int32)
    ours = np.empty(every.size, f32)
    in_cpp("joined8", every, rest32, ours)
    assert_same(ours, in_triton("remainder8_joined", every, rest32), every, rest32)
