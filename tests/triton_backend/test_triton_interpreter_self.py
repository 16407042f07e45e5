"""Whether the interpreter that the Triton kernels run in here can be trusted."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton_interpreter
from cases import FULL_CASES
from gpu_helpers import runners
from gpu_twins import Twins, shifted
from models import exact
from triton_interpreter import Interpreter
from triton_memory import Memory

interpreter = runners("interpreter")

f32 = np.float32
MOST = float(np.finfo(f32).max)
NASTY = [0.0, -0.0, 1.0, -1.0, 1 + 2.0**-23, 1 - 2.0**-24, 2.0**-149, -(2.0**-149), 2.0**-126,
         3 * 2.0**-149, 1 / 3, 2.0**-24, -(2.0**-24) * (1 - 2.0**-23), MOST, -MOST, 2.0**64, 3e-23,
         math.inf, -math.inf, math.nan]  # fmt: skip


def nearest(value: Fraction) -> float:
    """The float32 that is nearest to a rational, ties to even; written without floats."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    log2 = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()  # or one more
    exponent = max(log2 - 24, -149)
    while magnitude >= Fraction(2) ** (exponent + 24):
        exponent += 1
    quantum = Fraction(2) ** exponent
    rounded = round(magnitude / quantum) * quantum  # Python's rounds ties to even
    # the largest float32 and half of its last place
    result = math.inf if rounded >= Fraction(2) ** 128 else float(rounded)
    return math.copysign(result, value)


def exactly(a: float, b: float, c: float) -> float:
    product = a * b  # exact in float64, and signed as it should be where it is zero or infinite
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return product + c
    value = Fraction(a) * Fraction(b) + Fraction(c)
    return nearest(value) if value else product + c


def operands() -> np.ndarray:
    """Nasty triples; random ones; and random ones whose sum nearly cancels or is nearly a tie."""
    rng = np.random.default_rng(0)
    random = rng.normal(size=(3, 4000)) * 2.0 ** rng.integers(-60, 60, (3, 4000))
    a, b = rng.normal(size=(2, 4000)).astype(f32)
    cancelling = -(a * b) * (1 + rng.integers(-3, 4, 4000) * 2.0**-24)
    scale = 2.0 ** rng.integers(-50, -20, 4000)
    ties = [a, scale, np.float64(b).round(3) * 2.0**-5]
    denormal = rng.normal(size=(3, 1000)) * [[2.0**-80], [2.0**-66], [2.0**-146]]
    nasty = np.array(list(itertools.product(NASTY, repeat=3))).T
    table = [random, [a, b, cancelling], ties, denormal, nasty]
    with np.errstate(all="ignore"):
        return np.concatenate([np.array(t).astype(f32) for t in table], axis=1)


def bits(values: np.ndarray) -> np.ndarray:
    """With one NaN."""
    return np.where(np.isnan(values), f32(np.nan), values).view(np.int32)


def test_fma_rounds_once() -> None:
    """The one that kernels have in the interpreter, and the one it has in older Tritons."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

    a, b, c = operands()
    expected = np.array([exactly(*map(float, abc)) for abc in zip(a, b, c, strict=True)], f32)
    with np.errstate(all="ignore"):
        twice = (a * b + c).astype(f32)
        by_double = (a.astype(np.float64) * b + c).astype(f32)
        ours = exact.fma(a, b, c)
        with triton_interpreter.interpreting():
            handles = [TensorHandle(x, tl.float32) for x in (a, b, c)]
            used = InterpreterBuilder.create_fma(interpreter_builder, *handles).data
    for found in (ours, used):
        wrong = np.flatnonzero(bits(found) != bits(expected))
        assert not wrong.size, [(x[wrong[0]]) for x in (a, b, c, found, expected)]
    for naive in (twice, by_double):  # so that the table can tell
        assert (bits(naive) != bits(expected)).any()


@pytest.mark.parametrize("rounded", [np.float32, np.float64])
def test_an_fma_that_rounds_twice_is_found_out(
    monkeypatch: pytest.MonkeyPatch, rounded: type[np.floating]
) -> None:
    """The first as Triton 3.6 to 3.8 have it; the second as one could believe it to be enough."""
    from triton.runtime.interpreter import InterpreterBuilder

    def twice(builder: object, x: object, y: object, z: object) -> object:
        a, b, c = (handle.data.astype(rounded) for handle in (x, y, z))
        return SimpleNamespace(data=(a * b + c).astype(f32))

    triton_interpreter.rounds_once.cache_clear()
    monkeypatch.setattr(InterpreterBuilder, "create_fma", twice)
    try:
        assert not triton_interpreter.rounds_once()
        with triton_interpreter.interpreting():
            assert InterpreterBuilder.create_fma is not twice
    finally:
        triton_interpreter.rounds_once.cache_clear()


def test_a_false_alignment_is_found_out() -> None:
    """``tl.multiple_of`` is a promise to a GPU, which may read elsewhere if it is broken."""
    load = triton_interpreter.part("reduce").load_gradients
    for offset in (0, 4, 1):
        data = shifted(torch.arange(512.0), offset)
        begin, end = np.int32(0), np.int32(512)
        arguments = (np.int64(data.data_ptr()), np.int32(0), begin, end, 512, True)
        found = triton_interpreter.call(load, *arguments, length=512)
        assert (found.tolist() == data.tolist()) == (offset % 4 == 0)


def language() -> list[object]:
    """What the interpreter patches."""
    import triton.language as tl
    from triton.runtime import interpreter

    names = ("load", "store", "sum", "max", "reduce", "where", "arange", "range", "multiple_of")
    of_tensor = ("to", "__bool__", "__index__", "__add__", "T")
    found = [getattr(module, name, None) for module in (tl, tl.core) for name in names]
    return [*found, *(tl.tensor.__dict__.get(name) for name in of_tensor), interpreter._patch_lang]


def test_nothing_is_left_behind(interpreter: Interpreter) -> None:
    """After a launch, also a failed one, Triton's language is for its compiler again."""
    before = language()
    twins = Twins.of_lengths(FULL_CASES[0], [300])
    twins.run(steps=1)
    assert language() == before
    interpreter.memory = Memory(twins.params)
    with pytest.raises(Exception, match="not its own"):
        twins.opt.step()
    assert language() == before
    with triton_interpreter.interpreting():
        assert language() != before
