"""The interpreted Triton kernels against the CPU backend: norm, clipping, skipping, scalers."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter
from cases import (
    CHUNK,
    FLOATS,
    FULL_CASES,
    HALVES,
    KERNEL_CASES,
    NONFINITE,
    OptimizerCase,
    parametrize,
)
from conftest import require_cpu_backend
from gpu_twins import grads_like
from harness import randn
from triton_interpreter import BLOCK
from triton_twins import LENGTHS, MEASURE, TritonTwins, shifted, unlike

import fusedopt

_interpreter = pytest.fixture(triton_interpreter.fixture)
NORMS = (2.0, math.inf)
DIGITS, INF_CHUNKS, NAN_CHUNKS, SLOTS = 20, 20, 21, 32  # csrc/words.h; lanes of a block


@pytest.fixture(autouse=True)
def interpreter(_interpreter: triton_interpreter.Interpreter) -> triton_interpreter.Interpreter:
    require_cpu_backend()
    return _interpreter


@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm_type", NORMS)
def test_norm(dtype: torch.dtype, norm_type: float) -> None:
    """The order of lanes and of chunks: magnitudes that differ from one to the next show it."""
    some = LENGTHS if norm_type == 2.0 else LENGTHS[::4]
    for lengths in [[n] for n in some] + [[CHUNK - 1, 5, 0, 300], [2 * CHUNK + 1, BLOCK]]:
        twins = TritonTwins.of(MEASURE, [torch.zeros(n) for n in lengths], norm_type=norm_type)
        grads = [unlike(n, n + k, dtype, 3.0 ** (k % 7)) for k, n in enumerate(lengths)]
        if sum(lengths) % 2:  # rows of lanes are taken two at a time where the data is aligned
            grads = [shifted(grad, 3) for grad in grads]
        twins.step(grads, grad_scale=7.0)
        twins.check()


def in_words(function: str, *arguments: Any) -> Any:
    return triton_interpreter.call(getattr(triton_interpreter.part("words"), function), *arguments)


def value_of(words: list[int]) -> Fraction:
    """Digit d counts 2^(32 d - 352)."""
    return sum(word * Fraction(2) ** (32 * d - 352) for d, word in enumerate(words[:DIGITS]))


def some_words() -> list[list[int]]:
    """Single partials, ties of the rounding, chains of carries, and as many as fit into a word."""
    rng = random.Random(0)
    pieces = [1, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**62 + 1]
    found = []
    for _ in range(300):
        words = [0] * SLOTS
        for _ in range(rng.choice([1, 2, 5, 20])):
            piece = rng.choice([*pieces, rng.getrandbits(8), rng.getrandbits(40)])
            at = rng.randrange(DIGITS)
            words[at] = min(words[at] + piece, 2**63 - 1)
        for d in range(rng.choice([0, 0, 3, DIGITS])):
            words[d] = 2**32 - 1
        found.append(words)
    # The middle of two doubles, of which the lower is even or odd, and just above the middle.
    for odd, below, place, shift in itertools.product((0, 1), (0, 1), (0, 4, 5), (0, 7)):
        tie = [0] * SLOTS
        tie[6], tie[7] = ((odd << 11) | 2**10) >> shift, 2 ** (31 - shift)
        tie[place] += below
        found.append(tie)
    return [[0] * SLOTS, *found]


def test_the_sum_is_rounded_once() -> None:
    for words in some_words():
        block = np.array(words, np.int64)
        assert in_words("sum_of_squares", block).item() == float(value_of(words))
        for slot, expected in ((INF_CHUNKS, "inf"), (NAN_CHUNKS, "nan")):
            block[slot] = 1
            assert repr(in_words("sum_of_squares", block).item()) == expected


def test_a_partial_is_added_exactly() -> None:
    sums = [1.0, 2.0**-80, 1 + 2.0**-23, 3.4e38, 0.7, 2.0**-126]
    words = [0] * SLOTS
    exact = Fraction(0)
    for k, (sum, exponent) in enumerate(itertools.product(sums, range(-195, 142, 3))):
        block = np.array(words, np.int64)
        words = in_words("with_partial", block, np.float32(sum), np.int32(exponent)).tolist()
        exact += Fraction(float(np.float32(sum))) * Fraction(2) ** exponent
        assert value_of(words) == exact and words[DIGITS:] == [0] * (SLOTS - DIGITS), k
    block = np.array(words, np.int64)
    assert in_words("with_partial", block, np.float32(0), np.int32(0)).tolist() == words
    for value, slot in ((math.inf, INF_CHUNKS), (math.nan, NAN_CHUNKS), (-math.nan, NAN_CHUNKS)):
        added = in_words("with_partial", block, np.float32(value), np.int32(0)) - block
        assert added.tolist() == [int(s == slot) for s in range(SLOTS)]


def test_many_chunks() -> None:
    twins = TritonTwins.of(MEASURE, [torch.zeros(1) for _ in range(259)])
    twins.step(list(unlike(259, 3).split(1)))
    twins.check()


def hard_gradients() -> list[torch.Tensor]:
    """Squares that over- or underflow, denormals, and halves at the ends of their range."""
    n = BLOCK + 300
    scales = (1e38, 1e30, 1e19, 1e-12, 1e-30, 1e-41, 0.0)
    grads = [randn(n, k, scale=scale) for k, scale in enumerate(scales)]
    grads.append(torch.cat([grads[1][:77], grads[4]]))  # the rescan: large among small
    grads.append(torch.cat([randn(500, 1), torch.tensor([3e38]), randn(500, 2)]))
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in HALVES:
        every = halves.view(dtype)[::31]
        grads.append(torch.where(every.isfinite(), every, 1.0))
    grads.append(torch.full((n,), torch.finfo(torch.float32).max))
    grads.append(torch.full((600,), torch.finfo(torch.float32).smallest_normal * 2.0**-23))
    return grads


@pytest.mark.parametrize("norm_type", NORMS)
def test_hard_norms(norm_type: float) -> None:
    for grad in hard_gradients():
        for grad_scale in (65536.0, 3e-5) if norm_type == 2.0 else (3e-5,):
            twins = TritonTwins.of(MEASURE, [torch.zeros(grad.numel())], norm_type=norm_type)
            twins.step([grad], grad_scale)
            twins.check()


def test_hard_gradients_are_applied() -> None:
    """The same through the whole rules: infinities and NaN that come of finite gradients."""
    for case in [*FULL_CASES, KERNEL_CASES[3]]:
        grads = [grad[-BLOCK - 1 :] for grad in hard_gradients()]
        twins = TritonTwins.of_lengths(case, [grad.numel() for grad in grads])
        twins.step(grads)
        twins.check()


@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm_type", NORMS)
def test_every_place_of_a_nonfinite_gradient(dtype: torch.dtype, norm_type: float) -> None:
    """First, middle and last of each part of reduce: wide steps, tail rows, what is beyond."""
    n = 1500
    places = (0, 100, 255, 256, 400, 511, 512, 1023, 1024, 1100, 1279, 1280, 1400, n - 1)
    places = places if norm_type == 2.0 else places[1::4]
    for k, place in enumerate(places):
        twins = TritonTwins.of(MEASURE, [torch.zeros(n)], norm_type=norm_type)
        grad = randn(n, 1, dtype)
        grad[place] = NONFINITE[k % 3]
        twins.step([grad])
        twins.check()
        assert twins.opt.found_inf == 1


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("skip", [True, False])
def test_nonfinite_gradients(value: float, skip: bool) -> None:
    lengths = [3, CHUNK + 30]
    places = [(0, 0), (1, CHUNK - 1), (1, CHUNK)]
    for case, dtype in zip(FULL_CASES, FLOATS, strict=True):
        twins = TritonTwins.of_lengths(case, lengths, dtype, skip_nonfinite=skip)
        if value > 0:  # for the others the first step is a bad one
            twins.run(steps=1)
        for step, (tensor, element) in enumerate(places):
            grads = grads_like(twins.params, step)
            grads[tensor][element] = value
            twins.step(grads)
            twins.check()
        assert twins.opt.skipped_steps == (len(places) if skip else 0)
        if skip:
            twins.run(steps=2)  # the first that is applied


@parametrize("case", KERNEL_CASES[:4])
def test_what_a_scaler_sets(case: OptimizerCase) -> None:
    twins = TritonTwins.of_lengths(case, [300, 3], torch.float16)
    given = [*itertools.product((None, 7.0), (None, 0.0, 2.0, math.nan)), (0.25, 0.0), (1e3, 1.0)]
    given += [(0.0, None), (math.inf, 0.0), (math.nan, None), (1e-42, None), (0.0, 0.0)]
    for step, (grad_scale, found_inf) in enumerate(given):
        twins.step(grads_like(twins.params, step), grad_scale, found_inf)
        twins.check()


@pytest.mark.parametrize("scaler_class", [fusedopt.GradScaler, torch.amp.GradScaler])
def test_loss_scale_goes_up_and_down(scaler_class: type[torch.amp.GradScaler]) -> None:
    """Ours asks the optimizer for the flag, torch's looks through the gradients itself."""
    for case in FULL_CASES:
        twins = TritonTwins.of_lengths(case, [300, BLOCK + 1])
        scalers = [scaler_class("cpu", 512.0, growth_interval=2) for _ in range(2)]
        for step in range(6):
            grads = grads_like(twins.params, step)
            if step in (0, 3, 4):
                grads[step % 2][-1] = math.inf
            twins.give(grads)
            for scaler, optimizer in zip(scalers, (twins.opt, twins.twin), strict=True):
                scaler.scale(torch.ones(()))
                scaler.step(optimizer)
                scaler.update()
            twins.check()
            assert scalers[0].get_scale() == scalers[1].get_scale()


def test_counts_that_float32_no_longer_has() -> None:
    """A step count is fp32, as torch's: at 2^24 it stays, whatever the kernel counts in."""
    for case in FULL_CASES:
        twins = TritonTwins.of_lengths(case, [5, 30])
        twins.run(steps=1)
        for optimizer, params in ((twins.opt, twins.params), (twins.twin, twins.twin_params)):
            for param, count in zip(params, (2.0**24 - 2, 1e6), strict=True):
                optimizer.state[param]["step"].fill_(count)
        twins.run(steps=3)
        assert twins.opt.state[twins.params[0]]["step"] == 2.0**24
