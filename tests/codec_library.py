"""The codecs of csrc/codecs.h over arrays and over all fp32 values, by ctypes."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from cpp_library import compiled
from models import codecs as model
from models.codecs import BLOCK, Floats, Log8

# Checks count what is wrong. They tell by whole numbers what a remainder has to be, or by the
# distance from the value in double, and not by the product's expressions.
TEXT = r"""
#include "codecs.h"
#include <cmath>
#include <cstdlib>
using namespace fusedopt;
using u64 = uint64_t;
constexpr u64 kAll = u64(1) << 32;

template <class Check>
static int64_t count(u64 first, u64 stride, const Check& is_wrong) {
  int64_t wrong = 0;
  for (u64 at = first; at < kAll; at += stride) wrong += is_wrong(static_cast<uint32_t>(at));
  return wrong;
}
static bool nan_bits(uint32_t b) { return (b << 1) > 0xff000000u; }
static bool inf_bits(uint32_t b) { return (b << 1) == 0xff000000u; }

extern "C" {
// Every fp32 value as a bf16 param with a remainder of 16 bits.
int64_t bf16_values(u64 first, u64 stride) {
  return count(first, stride, [](uint32_t bits) {
    BFloat16 p;
    const int r = Remainder16::split(float_of(bits), p);
    const uint32_t back = bits_of(Remainder16::joined(p, static_cast<int16_t>(r)));
    if (nan_bits(bits)) return !nan_bits(back) || !nan_bits(uint32_t(p.bits) << 16) || r != 0;
    const int low = static_cast<int>(bits % 65536), up = low >= 32768;
    return back != bits || p.bits != bits / 65536 + up || r != low - up * 65536;
  });
}
// How often the param is not nearest-even.
int64_t bf16_ties(u64 first, u64 stride) {
  return count(first, stride, [](uint32_t bits) {
    BFloat16 p;
    Remainder16::split(float_of(bits), p);
    return !nan_bits(bits) && p.bits != BFloat16::narrowed(float_of(bits));
  });
}
// Every pair of a param and a remainder: whatever was written to the param.
int64_t bf16_pairs(u64 first, u64 stride) {
  return count(first, stride, [](uint32_t pair) {
    const BFloat16 p = {static_cast<uint16_t>(pair >> 16)};
    const uint32_t own = uint32_t(p.bits) << 16;
    const uint32_t x = bits_of(Remainder16::joined(p, static_cast<int16_t>(pair)));
    if (nan_bits(own)) return !nan_bits(x);
    BFloat16 back;
    Remainder16::split(float_of(x), back);
    return nan_bits(x) || std::llabs(int64_t(x) - int64_t(own)) > 32768 || back.bits != p.bits;
  });
}
// Every fp32 value as an fp16 param with a remainder; not_back: those whose master rounds to
// another param than stands beside it.
int64_t fp16_values(u64 first, u64 stride, int64_t* not_back) {
  *not_back = 0;
  return count(first, stride, [=](uint32_t bits) {
    const float x = float_of(bits);
    Float16 p, again;
    const int r = Remainder16::split(x, p);
    const float back = Remainder16::joined(p, static_cast<int16_t>(r));
    if (nan_bits(bits)) return !nan_bits(bits_of(back)) || r != 0;
    const double size = std::fabs(static_cast<double>(x));
    const bool same_sign = std::signbit(back) == std::signbit(x);
    if (size >= 65520) return !inf_bits(bits_of(back)) || r != 0 || !same_sign;
    Remainder16::split(back, again);
    *not_back += again.bits != p.bits;
    if (size >= 0x1p-16) return bits_of(back) != bits;
    return !(std::fabs(static_cast<double>(back) - static_cast<double>(x)) <= 0x1p-40);
  });
}
// Every pair: a master within one step of the param, and never NaN.
int64_t fp16_pairs(u64 first, u64 stride) {
  return count(first, stride, [](uint32_t pair) {
    const Float16 p = {static_cast<uint16_t>(pair >> 16)};
    const int exponent = p.bits >> 10 & 31;
    const float own = Float16::widened(p.bits);
    const float x = Remainder16::joined(p, static_cast<int16_t>(pair));
    if (exponent == 31) return bits_of(x) != bits_of(own);
    const double step = std::ldexp(1.0, (exponent < 1 ? 1 : exponent) - 15 - 10);
    return !(std::fabs(static_cast<double>(x) - static_cast<double>(own)) <= step);
  });
}
// Every fp32 value as a bf16 param with a remainder of 8 bits, each with a dither of its own.
int64_t bf16_values8(u64 first, u64 stride) {
  return count(first, stride, [](uint32_t bits) {
    BFloat16 p;
    const uint32_t t = dither(dither_seed(0, 3.0f, 0), bits);
    const int8_t r = Remainder8::split(float_of(bits), t, p);
    const uint32_t back = bits_of(Remainder8::joined(p, r));
    if (nan_bits(bits)) return !nan_bits(back) || r != 0;
    const uint32_t low = bits % 256, floor = bits - low;
    const bool up = low + t / 16777216 >= 256 && !inf_bits(floor + 256);
    return back != floor + (up ? 256 : 0);
  });
}
int64_t bf16_pairs8() {
  return count(0, 257, [](uint32_t pair) {  // 24 bits are all pairs
    const BFloat16 p = {static_cast<uint16_t>(pair >> 16)};
    const uint32_t own = uint32_t(p.bits) << 16;
    const uint32_t x = bits_of(Remainder8::joined(p, static_cast<int8_t>(pair >> 8)));
    if (nan_bits(own)) return !nan_bits(x);
    return nan_bits(x) || std::llabs(int64_t(x) - int64_t(own)) > 32768;
  });
}

void dithers(uint32_t first, float step, uint32_t stream, int64_t n, uint32_t* t) {
  const uint32_t seed = dither_seed(first, step, stream);
  for (int64_t i = 0; i < n; ++i) t[i] = dither(seed, static_cast<uint32_t>(i));
}
void exponents(int64_t n, const float* x, uint8_t* e) {
  for (int64_t at = 0; at < n; at += kScaleBlock) {
    uint32_t largest = 0;
    for (int64_t i = at; i < n && i < at + kScaleBlock; ++i) {
      const uint32_t own = Log8<true>::magnitude(x[i]);
      largest = own > largest ? own : largest;
    }
    e[at / kScaleBlock] = static_cast<uint8_t>(Log8<true>::scale_of(largest));
  }
}
}
template <class C>
static void codes(int64_t n, const float* x, const uint8_t* e, const uint32_t* t, uint8_t* code) {
  for (int64_t i = 0; i < n; ++i) {
    code[i] = static_cast<uint8_t>(C::narrowed(x[i], C::up(e[i]), t[i]));
  }
}
template <class C>
static void values(int64_t n, const uint8_t* code, const uint8_t* e, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = C::widened(code[i], C::down(e[i]));
}
extern "C" {
void moment_codes(int64_t n, const float* x, const uint8_t* e, const uint32_t* t, uint8_t* code) {
  codes<Log8<true>>(n, x, e, t, code);
}
void squares_codes(int64_t n, const float* x, const uint8_t* e, const uint32_t* t, uint8_t* code) {
  codes<Log8<false>>(n, x, e, t, code);
}
void moment_values(int64_t n, const uint8_t* code, const uint8_t* e, float* x) {
  values<Log8<true>>(n, code, e, x);
}
void squares_values(int64_t n, const uint8_t* code, const uint8_t* e, float* x) {
  values<Log8<false>>(n, code, e, x);
}
void dithered(int64_t n, const float* x, const uint32_t* t, uint16_t* half) {
  for (int64_t i = 0; i < n; ++i) half[i] = Dithered::narrowed(x[i], t[i]);
}
void split16(int64_t n, const float* x, uint16_t* param, int16_t* rest) {
  for (int64_t i = 0; i < n; ++i) {
    BFloat16 p;
    rest[i] = Remainder16::split(x[i], p), param[i] = p.bits;
  }
}
void split16_fp16(int64_t n, const float* x, uint16_t* param, int16_t* rest) {
  for (int64_t i = 0; i < n; ++i) {
    Float16 p;
    rest[i] = Remainder16::split(x[i], p), param[i] = p.bits;
  }
}
void split8(int64_t n, const float* x, const uint32_t* t, uint16_t* param, int8_t* rest) {
  for (int64_t i = 0; i < n; ++i) {
    BFloat16 p;
    rest[i] = Remainder8::split(x[i], t[i], p), param[i] = p.bits;
  }
}
void join16(int64_t n, const uint16_t* param, const int16_t* rest, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = Remainder16::joined(BFloat16{param[i]}, rest[i]);
}
void join16_fp16(int64_t n, const uint16_t* param, const int16_t* rest, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = Remainder16::joined(Float16{param[i]}, rest[i]);
}
void join8(int64_t n, const uint16_t* param, const int8_t* rest, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = Remainder8::joined(BFloat16{param[i]}, rest[i]);
}
}
"""


@functools.cache
def library() -> ctypes.CDLL:
    return compiled(TEXT)


def wrong(check: str, first: int = 0, stride: int = 1) -> int:
    """How many of the values or pairs a check finds wrong."""
    function = getattr(library(), check)
    function.restype = ctypes.c_int64
    return int(function(ctypes.c_uint64(first), ctypes.c_uint64(stride)))


def wrong_fp16(first: int = 0, stride: int = 1) -> tuple[int, int]:
    """Likewise, and how many masters do not round to their param."""
    function, not_back = library().fp16_values, ctypes.c_int64()
    function.restype = ctypes.c_int64
    n = function(ctypes.c_uint64(first), ctypes.c_uint64(stride), ctypes.byref(not_back))
    return int(n), not_back.value


def run(name: str, n: int, *arrays: Any) -> None:
    """A function over arrays of C's types; the last ones are written."""
    for array in arrays:
        assert array.flags.c_contiguous
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in arrays)
    getattr(library(), name)(ctypes.c_int64(n), *pointers)


def dithers(n: int, first: int, step: int, stream: int) -> Any:
    out = np.zeros(n, np.uint32)
    library().dithers(
        ctypes.c_uint32(first % 2**32), ctypes.c_float(step), ctypes.c_uint32(stream),
        ctypes.c_int64(n), out.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    return out


def _name(kind: Log8) -> str:
    return "moment" if kind.signed else "squares"


def encoded(kind: Log8, x: Floats, t: Any, exponents: Any = None) -> tuple[Any, Any]:
    """The product's codes, and the exponents of the blocks: derived, or as given."""
    x = np.ascontiguousarray(x, np.float32)
    t = np.ascontiguousarray(np.broadcast_to(np.asarray(t), x.shape), np.uint32)
    if exponents is None:
        exponents = np.zeros(-(-x.size // BLOCK), np.uint8)
        run("exponents", x.size, x, exponents)
    each = model.per_element(exponents, x.size).astype(np.uint8)
    codes = np.zeros(x.size, np.uint8)
    run(f"{_name(kind)}_codes", x.size, x, each, t, codes)
    return codes, exponents


def decoded(kind: Log8, codes: Any, exponents: Any) -> Floats:
    codes = np.ascontiguousarray(codes, np.uint8)
    x = np.zeros(codes.size, np.float32)
    each = model.per_element(exponents, codes.size).astype(np.uint8)
    run(f"{_name(kind)}_values", codes.size, codes, each, x)
    return x
