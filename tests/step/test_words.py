"""The norm as a sum of integers (csrc/words.h), against Python's fractions."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import require_cpu_backend
from cpp_library import compiled
from harness import randn
from models.exact import CHUNK, chunk_square_sum
from torch import Tensor

import fusedopt
from fusedopt.backends.records import WORDS

HARNESS = """
#include "words.h"
using namespace fusedopt;
extern "C" {
void add(int64_t n, const float* sums, const int* exponents, int64_t times, uint64_t* words) {
  for (int64_t i = 0; i < n; ++i) {
    const Addend addend = addend_of({sums[i], exponents[i]}, true);
    words[addend.at] += addend.low * times;
    words[addend.at + 1] += addend.high * times;
  }
}
double total(const uint64_t* words) { return sum_of_squares(words); }
}
"""
DIGITS, LOWEST = 20, -352
INF_CHUNKS, NAN_CHUNKS, LARGEST = DIGITS, DIGITS + 1, DIGITS + 2
MOST = np.float32(2.0**17)  # of a chunk that was summed again: 8,192 squares below 16


@functools.cache
def library() -> ctypes.CDLL:
    found = compiled(HARNESS)
    found.total.restype = ctypes.c_double
    return found


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def added(sums: np.ndarray, exponents: np.ndarray, times: int = 1) -> np.ndarray:
    words = np.zeros(WORDS, np.uint64)
    arrays = np.ascontiguousarray(sums, np.float32), np.ascontiguousarray(exponents, np.int32)
    library().add(
        ctypes.c_int64(len(sums)), *map(pointer, arrays), ctypes.c_int64(times), pointer(words)
    )
    return words


def value(words: np.ndarray) -> Fraction:
    digits = (int(word) * Fraction(2) ** (32 * d + LOWEST) for d, word in enumerate(words[:DIGITS]))
    return sum(digits, Fraction(0))


def exact(sums: np.ndarray, exponents: np.ndarray) -> Fraction:
    pairs = zip(sums.tolist(), exponents.tolist(), strict=True)
    return sum((Fraction(s) * Fraction(2) ** e for s, e in pairs), Fraction(0))


def partials(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every size that a chunk can have, those that were scaled by 2^-126 to 2^126 included."""
    random = np.random.default_rng(seed)
    sums = np.ldexp(random.uniform(1, 2, n), random.integers(-80, 128, n)).astype(np.float32)
    exponents = 2 * random.integers(-126, 127, n)
    plain = random.random(n) < 0.5
    rescued = np.ldexp(random.uniform(1, 2, n), random.integers(-46, 17, n)).astype(np.float32)
    return np.where(plain, sums, rescued), np.where(plain, 0, exponents)


def test_words_are_the_exact_sum() -> None:
    sums, exponents = partials(5000, seed=1)
    words = added(sums, exponents)
    assert value(words) == exact(sums, exponents)
    backwards = added(sums[::-1], exponents[::-1])
    halves = added(sums[::2], exponents[::2]) + added(sums[1::2], exponents[1::2])
    assert (words == backwards).all() and (words == halves).all()


@pytest.mark.parametrize(
    ("sum", "exponent"),
    [
        *((2.0**-80, 0), (float(np.finfo(np.float32).max), 0)),  # of chunks in range
        *itertools.product(
            (2.0**-46, 1.0, float(np.nextafter(MOST, np.float32(0))), float(MOST)), (-252, 0, 252)
        ),
    ],
)
def test_each_end_of_the_range(sum: float, exponent: int) -> None:
    one = np.array([sum], np.float32), np.array([exponent])
    assert value(added(*one)) == exact(*one)


def test_a_million_chunks_of_the_largest_partial() -> None:
    """2^20 of them are 2^33 elements; the digits below the top do not overflow, either."""
    for sum in (MOST, np.nextafter(MOST, np.float32(0))):
        one = np.array([sum], np.float32), np.array([252])
        words = added(*one, times=1 << 20)
        assert value(words) == exact(*one) * (1 << 20)
        assert max(map(int, words)) < 1 << 53


def test_the_total_is_rounded_once() -> None:
    """To nearest even, which is what Python does with a fraction."""
    for seed in range(300):
        sums, exponents = partials(1 + seed % 7, seed)
        words = added(sums, exponents)
        assert library().total(pointer(words)) == float(exact(sums, exponents))


@pytest.mark.parametrize("below", [0, -1, -32, -33, -64, -65, -200])
@pytest.mark.parametrize("position", range(52, 56))
def test_ties_and_what_is_just_beside_them(position: int, below: int) -> None:
    """A last bit at every place around the 53 that are kept, and a bit far below it or none."""
    top = 40
    parts = [(1.0, top), (1.0, top - 52), (1.0, top - position)]
    parts += [(1.0, top - position + below)] if below else []
    sums, exponents = map(np.array, zip(*parts, strict=True))
    words = added(sums, exponents)
    assert library().total(pointer(words)) == float(exact(sums, exponents))


def test_nothing_is_zero() -> None:
    assert library().total(pointer(np.zeros(WORDS, np.uint64))) == 0.0
    zero = np.array([0.0, 0.0], np.float32), np.array([0, -252])
    assert not added(*zero).any()


def test_inf_and_nan_are_counted_apart() -> None:
    sums = np.array([math.inf, math.nan, math.inf, 1.0], np.float32)
    words = added(sums, np.zeros(4))
    assert (words[INF_CHUNKS], words[NAN_CHUNKS]) == (2, 1)
    assert math.isnan(library().total(pointer(words)))
    words[NAN_CHUNKS] = 0
    assert library().total(pointer(words)) == math.inf


# ---- what the CPU's kernels leave ----------------------------------------------------------------


def words_of(grads: list[Tensor], **options: object) -> np.ndarray:
    require_cpu_backend()
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    opt = fusedopt.FusedSGD(params, lr=0.0, max_grad_norm=1.0, backend="cpu", **options)  # type: ignore[arg-type]
    opt.step()
    plan = opt._shared.plan
    assert plan is not None
    words: np.ndarray = plan._tables["words"].numpy().view(np.uint64).copy()  # type: ignore[attr-defined]
    return words


def test_the_kernels_words(restore_threads: None) -> None:
    grads = [randn(n, seed) for seed, n in enumerate([3 * CHUNK + 5, 1, 400, 9 * CHUNK])]
    chunks = [g.numpy()[at : at + CHUNK] for g in grads for at in range(0, g.numel(), CHUNK)]
    expected = sum((Fraction(float(chunk_square_sum(x))) for x in chunks), Fraction(0))
    found = []
    for threads, order in itertools.product((1, 2, 3), (1, -1)):
        torch.set_num_threads(threads)
        found.append(words_of(grads[::order]))
    assert value(found[0]) == expected
    assert all((words == found[0]).all() for words in found)


@pytest.mark.parametrize(
    "scale", [2.0**-149, 2.0**-140, 2.0**-126, 2.0**-63, 1.0, 2.0**63, 2.0**127]
)
def test_rescued_chunks(scale: float) -> None:
    """Of powers of two, whose squares and their sums are exact."""
    n = CHUNK + 3
    words = words_of([torch.full((n,), scale)])
    assert value(words) == n * Fraction(scale) ** 2


def test_the_kernels_count_inf_and_nan() -> None:
    grads = [torch.ones(3 * CHUNK), torch.ones(7), torch.ones(7)]
    grads[0][CHUNK], grads[1][3], grads[2][0], grads[2][1] = -math.inf, math.nan, math.inf, math.nan
    words = words_of(grads)
    assert (words[INF_CHUNKS], words[NAN_CHUNKS]) == (1, 2)
    assert value(words) == 2 * CHUNK
    grads[1][3], grads[2][1] = 1.0, 1.0
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    opt = fusedopt.FusedSGD(params, lr=0.1, max_grad_norm=math.inf, skip_nonfinite=True)
    opt.step()
    assert opt.grad_norm is not None and opt.grad_norm.item() == math.inf


def test_the_largest_magnitude_is_a_word() -> None:
    words = words_of([torch.tensor([1.0, -3.0]), torch.tensor([2.0])], norm_type=math.inf)
    assert words[LARGEST] == np.float32(3.0).view(np.uint32)
    assert not words[:LARGEST].any()
