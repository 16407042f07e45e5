"""States of 8 and 16 bits: every rule of their codecs, by a case of its own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import codec_library as cpp
import numpy as np
import pytest
from codec_library import decoded, encoded
from models import codecs as model
from models.codecs import BLOCK, EXPONENTS, HALF, MOMENT, SQUARES, Log8

KINDS = [pytest.param(MOMENT, id="moment"), pytest.param(SQUARES, id="squares")]
TINY, LARGEST = 2.0**-149, float(np.finfo(np.float32).max)
FAR_DOWN, FAR_UP = 0, 0xFFFFFFFF  # the smallest dither and the largest


def code(kind: Log8, x: float, t: int = HALF, beside: float = 1.0) -> int:
    """Of ``x`` in a block whose largest element is ``beside``."""
    return int(encoded(kind, np.array([x, beside], np.float32), t)[0][0])


def value(kind: Log8, code: int, exponent: int = 127) -> float:
    return float(decoded(kind, [code], [exponent])[0])


# ---- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_gives_every_code_back(kind: Log8) -> None:
    """With the block's own exponent, denormal values included."""
    every = np.resize(np.arange(256), 2 * BLOCK)
    for exponent in EXPONENTS:
        own = [exponent, exponent]
        values = decoded(kind, every, own)
        np.testing.assert_array_equal(encoded(kind, values, HALF, own)[0], every)
        assert np.unique(model.bits_of(values)).size == 256  # also of denormals


@pytest.mark.parametrize("t", [FAR_DOWN, HALF, FAR_UP])
@pytest.mark.parametrize("largest", [TINY, 1e-30, 1.0, LARGEST])
def test_what_is_more_than_zero_stays_so(largest: float, t: int) -> None:
    """A second moment of zero beside a first one of more would be divided by."""
    for x in (TINY, 1e-44, 1e-38, max(TINY, largest * 1e-9), largest):
        got = code(SQUARES, x, t, beside=largest)
        assert got >= 1 and decoded(SQUARES, [got], [127])[0] > 0
    assert code(SQUARES, 0.0, t, beside=largest) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_zero_under_every_dither(kind: Log8) -> None:
    for n, zero, t in itertools.product((1, 127, 128, 300), (0.0, -0.0), (FAR_DOWN, HALF, FAR_UP)):
        codes, exponents = encoded(kind, np.full(n, zero, np.float32), t)
        assert not codes.any() and set(exponents) == {7} and exponents.size == -(-n // BLOCK)
        back = decoded(kind, codes, exponents)
        assert not model.bits_of(back).any()  # positive zeros


def test_a_first_moment_below_half_a_cell_is_zero_under_every_dither() -> None:
    """Otherwise a parameter whose gradient stays away would move for good, or jump."""
    cell = value(MOMENT, 1)
    for share, t in itertools.product((0.01, 0.3, 0.49), (FAR_DOWN, HALF, FAR_UP)):
        assert code(MOMENT, share * cell, t) == code(MOMENT, -share * cell, t) == 0


def test_the_rest_of_the_first_cell_is_dithered() -> None:
    """Rounding to nearest there would never decay: 0.9 of a cell rounds back to the cell."""
    cell = value(MOMENT, 1)
    for share in (0.51, 0.75, 0.9):
        assert code(MOMENT, share * cell, FAR_DOWN) == 0
        assert code(MOMENT, share * cell, FAR_UP) == 1
        assert code(MOMENT, -share * cell, FAR_DOWN) == 0
        assert code(MOMENT, -share * cell, FAR_UP) == 0x81


def test_a_negative_moment_that_rounds_to_zero_is_plain_zero() -> None:
    """0x80 stands for NaN."""
    for x, t in itertools.product((-0.0, -1e-9, -TINY), (FAR_DOWN, HALF, FAR_UP)):
        assert code(MOMENT, x, t) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_codes_end_where_a_block_is_larger_than_any_exponent(kind: Log8) -> None:
    """Beyond 2^127 the formula alone would reach 132 and 264."""
    codes, exponents = encoded(kind, np.array([LARGEST, 3e38, 2.0**127], np.float32), HALF)
    assert exponents[0] == 253 and codes[0] == codes[1] == kind.last > codes[2]
    assert np.isfinite(decoded(kind, codes, exponents)).all()
    if kind.signed:
        assert code(kind, -LARGEST, FAR_UP) == 0x80 + kind.last


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_what_is_not_finite_spoils_only_itself(kind: Log8, bad: float) -> None:
    x = np.linspace(0.01, 3, 300, dtype=np.float32)
    clean, exponents = encoded(kind, x, HALF)
    x[[5, 299]] = bad
    codes, own = encoded(kind, x, HALF)
    assert set(codes[[5, 299]]) == {kind.nonfinite}
    back = decoded(kind, codes, own)[[5, 299]]
    assert np.isnan(back).all() if kind.signed else np.isposinf(back).all()
    kept = np.delete(np.arange(300), [5, 299])
    np.testing.assert_array_equal(codes[kept], clean[kept])
    np.testing.assert_array_equal(own[:2], exponents[:2])
    alone, of_none = encoded(kind, np.full(3, bad, np.float32), HALF)
    assert set(alone) == {kind.nonfinite} and of_none[0] == 7


def test_a_second_moment_below_zero_is_none() -> None:
    for x in (-TINY, -1.0, -LARGEST):
        assert code(SQUARES, x) == SQUARES.nonfinite


@pytest.mark.parametrize(("kind", "last"), [(MOMENT, 13), (SQUARES, 24)])
def test_denormals_are_kept(kind: Log8, last: int) -> None:
    """Codes stand for denormals up to some exponent; a flush would make them zero."""
    codes = range(1, kind.last + 1)
    found = {exponent: decoded(kind, codes, [exponent] * 2) for exponent in EXPONENTS}
    assert all((values > 0).all() for values in found.values())
    assert max(e for e, values in found.items() if values.min() < 2.0**-126) == last
    assert code(kind, value(kind, 1, 7), HALF, beside=1e-44) == 1


def test_the_exponent_is_that_of_the_largest_finite_magnitude() -> None:
    """One more from the next third of an octave's last cell on; 7 to 253."""
    for bits, exponent in (
        (127 << 23, 127), (127 << 23 | 1, 128 - 1), (128 << 23, 128),
        (126 << 23 | 0x700000, 126), (126 << 23 | 0x700001, 127), (1, 7), (7 << 23 | 0x7FFFFF, 8),
        (253 << 23, 253), (254 << 23, 253), (254 << 23 | 0x7FFFFF, 253),
    ):  # fmt: skip
        for sign, kind in ((0, SQUARES), (0, MOMENT), (1 << 31, MOMENT)):
            x = np.zeros(BLOCK, np.float32)
            x[77] = model.float_of(sign | bits)
            assert encoded(kind, x, HALF)[1].tolist() == [exponent], hex(bits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_octave_has_twelve_cells(kind: Log8) -> None:
    """So an element halfway through an octave's first cell is off by 1/24 of 25/24."""
    x = np.exp2(np.linspace(-3, 0, 3000)).astype(np.float32)
    errors = np.abs(decoded(kind, *encoded(kind, x, HALF)) - x) / (x + kind.offset)
    assert errors.max() == pytest.approx(1 / 25, rel=0.01)
    assert code(kind, 1.0) - code(kind, 0.25, HALF) == pytest.approx(24, abs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_log8_has_the_right_mean_over_the_lattice(kind: Log8) -> None:
    n = 1 << 16
    t = cpp.dithers(n, 0, 7, 1)
    for x in (0.0123, 0.3456, 0.98765):
        both = np.full(n, x, np.float32)
        codes, _ = encoded(kind, both, t, [127] * (n // BLOCK))
        lower, upper = value(kind, int(codes.min())), value(kind, int(codes.max()))
        assert lower <= x <= upper and codes.max() - codes.min() <= 1
        bits = [model.bits_of(np.float32(v) + kind.offset) for v in (lower, x, upper)]
        share = (bits[1] - bits[0]) / max(1, bits[2] - bits[0])
        assert abs((codes == codes.max()).mean() - share) < 1e-3


# ---- bf16 ----------------------------------------------------------------------------------------


def halves(x: Any, t: Any) -> Any:
    x = np.atleast_1d(np.asarray(x, np.float32))
    out = np.zeros(x.size, np.uint16)
    cpp.run("dithered", x.size, x, np.full(x.size, t, np.uint32), out)
    return out


@pytest.mark.parametrize("t", [FAR_DOWN, HALF, FAR_UP])
def test_bf16_of_what_is_no_number_and_of_the_largest(t: int) -> None:
    nan = model.float_of([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800001, 0x7FC00000])
    assert np.isnan(model.bf16_values(halves(nan, t))).all()
    assert halves([math.inf, -math.inf], t).tolist() == [0x7F80, 0xFF80]
    assert halves([LARGEST, -LARGEST], t).tolist() == [0x7F7F, 0xFF7F]
    assert halves([0.0, -0.0], t).tolist() == [0, 0x8000]


def test_bf16_has_the_right_mean_over_the_lattice() -> None:
    """A dithered average does not stall, where nearest rounding would leave it where it is."""
    n = 1 << 16
    for x in (1.001, -3.14159, 1e-40, 7e30):
        codes = np.zeros(n, np.uint16)
        cpp.run("dithered", n, np.full(n, x, np.float32), cpp.dithers(n, 5, 11, 2), codes)
        values = model.bf16_values(codes).astype(np.float64)
        step = np.ptp(values)
        assert step > 0 and abs(values.mean() - np.float32(x)) < 1e-3 * step
