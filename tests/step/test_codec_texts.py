"""The codecs in C++, in torch and in the model are the same functions, bit for bit."""

from __future__ import annotations

from typing import Any

import codec_library as cpp
import numpy as np
import pytest
import torch
from codec_library import decoded, encoded
from models import codecs as model
from models.codecs import BLOCK, EXPONENTS, HALF, MOMENT, SQUARES, Floats, Log8

import fusedopt.codecs as in_torch

KINDS = [pytest.param(MOMENT, id="moment"), pytest.param(SQUARES, id="squares")]
FAR_DOWN, FAR_UP = 0, 0xFFFFFFFF  # the smallest dither and the largest
# Fractions around every border: of a binade, of thirds, of what is rounded away, of the largest.
FRACTIONS = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x2AAAAA, 0x555555, 0x6FFFFF, 0x700000, 0x7F0000,
             0x7F7FFF, 0x7F8000, 0x7FFFFE, 0x7FFFFF]  # fmt: skip
EDGES = np.array(
    [sign << 31 | exponent << 23 | fraction for sign in (0, 1) for exponent in range(256)
     for fraction in FRACTIONS], np.uint32,
).view(np.float32)  # fmt: skip


def table() -> tuple[Floats, Any]:
    """Edges and random bits in whole blocks of one size each, and their dithers."""
    generator = np.random.default_rng(0)
    wild = generator.integers(0, 1 << 32, 64 * BLOCK, np.uint32).view(np.float32)
    near = generator.standard_normal(64 * BLOCK).astype(np.float32)
    sizes = np.repeat(np.exp2(generator.integers(-140, 120, 64)), BLOCK).astype(np.float32)
    spread = np.exp2(generator.uniform(-24, 0, near.size)).astype(np.float32)
    with np.errstate(under="ignore", over="ignore"):
        x = np.concatenate([EDGES, wild, near * sizes, near * sizes * spread, EDGES[:77]])
    t = generator.integers(0, 1 << 32, x.size, np.int64)
    t[::7], t[1::7] = FAR_DOWN, FAR_UP
    return x, t


def same(left: Any, right: Any) -> None:
    """In every bit, payloads of NaN apart."""
    left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
    np.testing.assert_array_equal(left, right)
    number = ~np.isnan(left)
    np.testing.assert_array_equal(model.bits_of(left)[number], model.bits_of(right)[number])


@pytest.mark.parametrize("kind", KINDS)
def test_log8_of_all_texts(kind: Log8) -> None:
    x, dithers = table()
    codec = in_torch.LOG8 if kind.signed else in_torch.LOG8_POSITIVE
    for t, given in ((dithers, torch.from_numpy(dithers)), (np.full(x.size, HALF), None)):
        codes, exponents = model.log8_encoded(kind, x, t)
        mine, own = encoded(kind, x, t)
        np.testing.assert_array_equal(own, exponents)
        np.testing.assert_array_equal(mine, codes)
        data = torch.zeros(x.size, dtype=torch.uint8)
        scales = torch.zeros(len(exponents), dtype=torch.uint8)
        in_torch.encode(codec, torch.from_numpy(x), data, scales, dither=given)
        np.testing.assert_array_equal(scales, exponents)
        np.testing.assert_array_equal(data, codes)
        values = model.log8_values(kind, codes, model.per_element(exponents, x.size))
        same(decoded(kind, codes, own), values)
        same(in_torch.decode(codec, data, scales, None), values)


@pytest.mark.parametrize("kind", KINDS)
def test_log8_values_of_all_texts(kind: Log8) -> None:
    codec = in_torch.LOG8 if kind.signed else in_torch.LOG8_POSITIVE
    codes, exponents = np.tile(np.arange(256), len(EXPONENTS)), np.repeat(list(EXPONENTS), 2)
    values = model.log8_values(kind, codes, model.per_element(exponents, codes.size))
    same(decoded(kind, codes, exponents), values)
    data, scales = (torch.from_numpy(a.astype(np.uint8)) for a in (codes, exponents))
    same(in_torch.decode(codec, data, scales, None), values)


def test_bf16_of_all_texts() -> None:
    x, t = table()
    codes = model.bf16_dithered(x, t)
    mine = np.zeros(x.size, np.uint16)
    cpp.run("dithered", x.size, x, t.astype(np.uint32), mine)
    np.testing.assert_array_equal(mine, codes)
    data = torch.zeros(x.size, dtype=torch.bfloat16)
    in_torch.encode(in_torch.DITHERED, torch.from_numpy(x), data, dither=torch.from_numpy(t))
    np.testing.assert_array_equal(data.view(torch.int16).numpy().view(np.uint16), codes)


MASTERS = {
    "split16": (torch.bfloat16, in_torch.REMAINDER16, np.int16),
    "split16_fp16": (torch.float16, in_torch.REMAINDER16, np.int16),
    "split8": (torch.bfloat16, in_torch.REMAINDER8, np.int8),
}


@pytest.mark.parametrize("name", MASTERS)
def test_remainders_of_all_texts(name: str) -> None:
    (x, t), (half, codec, kind) = table(), MASTERS[name]
    splits = {
        "split16": lambda: model.bf16_split(x),
        "split16_fp16": lambda: model.fp16_split(x),
        "split8": lambda: model.bf16_split8(x, t),
    }
    param, rest = splits[name]()
    bits = param.view(np.uint16) if half == torch.float16 else param
    number = ~np.isnan(x)
    mine, own = np.zeros(x.size, np.uint16), np.zeros(x.size, kind)
    cpp.run(name, x.size, x, *((t.astype(np.uint32),) if name == "split8" else ()), mine, own)
    np.testing.assert_array_equal(mine[number], bits[number])
    np.testing.assert_array_equal(own, rest)
    written = torch.zeros(x.size, dtype=half)
    data = torch.zeros(x.size, dtype=codec.dtype)
    values, dithers = torch.from_numpy(x), torch.from_numpy(t)
    in_torch.encode(codec, values, data, param=written, dither=dithers)
    np.testing.assert_array_equal(data, rest)
    words = written.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(words[number], bits[number])


@pytest.mark.parametrize("name", MASTERS)
def test_masters_of_all_texts(name: str) -> None:
    """Of every parameter with remainders that are not its own."""
    half, codec, kind = MASTERS[name]
    limits = np.iinfo(kind)
    some = [limits.min, limits.min + 1, -77, -1, 0, 1, 99, limits.max]
    bits = np.repeat(np.arange(1 << 16, dtype=np.uint16), len(some))
    rest = np.tile(np.array(some, kind), 1 << 16)
    joins = {
        "split16": lambda: model.bf16_joined(bits, rest),
        "split16_fp16": lambda: model.fp16_joined(bits.view(np.float16), rest),
        "split8": lambda: model.bf16_joined8(bits, rest),
    }
    values, mine = joins[name](), np.zeros(bits.size, np.float32)
    cpp.run(name.replace("split", "join"), bits.size, bits, rest, mine)
    same(mine, values)
    param = torch.from_numpy(bits.view(np.int16)).view(half)
    same(in_torch.decode(codec, torch.from_numpy(rest), None, param), values)


def test_dithers_of_all_texts() -> None:
    for n, first, step, stream in ((300, 0, 1, 0), (300, (1 << 32) - 9, 77, 1), (9, 1 << 40, 9, 2)):
        expected = model.dither(range(first, first + n), step, stream)
        np.testing.assert_array_equal(cpp.dithers(n, first, step, stream), expected)
        in_plain = in_torch.dither(n, torch.device("cpu"), first, step, stream)
        np.testing.assert_array_equal(in_plain, expected)
