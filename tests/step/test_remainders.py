"""Masters beside half parameters: what the remainder keeps of an fp32 value.

A sample of all 2^32 values is taken in every run, with strides that are odd, so that all exponents
and signs occur. All of them, in about a minute and a half:

    pytest -m exhaustive tests/step/test_remainders.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import codec_library as cpp
import numpy as np
import pytest
import torch
from harness import FUSED
from models import codecs as model

STRIDE = 251
TIES = 32_640  # values halfway between two bf16 whose nearest-even is the smaller one
NOT_BACK = 2 * 1_280  # masters below 2^-16 that do not round to their fp16 parameter
WHOLE = pytest.mark.exhaustive
SAMPLES = [
    pytest.param(STRIDE, id="sample"),
    pytest.param(1, id="exhaustive", marks=WHOLE),
]


@pytest.mark.parametrize("stride", SAMPLES)
def test_bf16_keeps_every_value(stride: int) -> None:
    """And the remainder is the low half of the value's bits."""
    assert cpp.wrong("bf16_values", 0, stride) == 0


@pytest.mark.parametrize("stride", SAMPLES)
def test_bf16_pairs_round_back_to_the_parameter(stride: int) -> None:
    """Whatever somebody writes to the parameter: no NaN, and within half a step of it."""
    assert cpp.wrong("bf16_pairs", 0, stride) == 0


def test_bf16_parameters_differ_from_nearest_even_at_ties_alone() -> None:
    """A tie is one value of 65,536, and its neighbours are none."""
    assert cpp.wrong("bf16_ties", 0x8000, 0x10000) == TIES
    assert cpp.wrong("bf16_ties", 0x7FFF, 0x10000) == cpp.wrong("bf16_ties", 0x8001, 0x10000) == 0


@pytest.mark.exhaustive
def test_bf16_ties_exhaustive() -> None:
    assert cpp.wrong("bf16_ties") == TIES


@pytest.mark.parametrize("stride", SAMPLES)
def test_fp16_is_exact_above_2_to_the_minus_16_and_close_below(stride: int) -> None:
    """inf from 65,520 on, with its sign and no remainder; NaN stays NaN."""
    wrong, not_back = cpp.wrong_fp16(0, stride)
    assert wrong == 0
    if stride == 1:
        assert not_back == NOT_BACK


@pytest.mark.parametrize("stride", SAMPLES)
def test_fp16_masters_lie_within_a_step_of_what_was_written(stride: int) -> None:
    assert cpp.wrong("fp16_pairs", 0, stride) == 0


@pytest.mark.parametrize("stride", SAMPLES)
def test_remainder8_is_a_master_of_24_bits(stride: int) -> None:
    """Dithered between its neighbours; a finite value does not become inf, NaN and inf stay."""
    assert cpp.wrong("bf16_values8", 0, stride) == 0


def test_remainder8_follows_what_was_written() -> None:
    assert cpp.wrong("bf16_pairs8") == 0


def test_remainder8_has_the_right_mean() -> None:
    """Over all dithers each value is met to the bit: the sum of what is lost is zero."""
    dithers = np.arange(256) << 24
    for bits in (0x3F800001, 0x3F8000FF, 0x00000080, 0xC2F7AB37, 0x7F7FFE81):
        x = np.full(256, model.float_of(bits))
        param, rest = np.zeros(256, np.uint16), np.zeros(256, np.int8)
        back = np.zeros(256, np.float32)
        cpp.run("split8", 256, x, dithers.astype(np.uint32), param, rest)
        cpp.run("join8", 256, param, rest, back)
        assert int((model.bits_of(back) - bits).sum()) == 0


def test_inf_and_nan_have_no_remainder() -> None:
    x = np.array([math.inf, -math.inf, math.nan, -math.nan], np.float32)
    t = np.full(4, 0xFFFFFFFF, np.uint32)
    for name, rest_type in (("split16", np.int16), ("split16_fp16", np.int16), ("split8", np.int8)):
        param, rest = np.zeros(4, np.uint16), np.full(4, 77, rest_type)
        own: Iterable[Any] = (t,) if name == "split8" else ()
        cpp.run(name, 4, x, *own, param, rest)
        as_half = param.view(np.float16) if name == "split16_fp16" else model.bf16_values(param)
        np.testing.assert_array_equal(as_half, x)
        assert not rest.any(), name


def test_an_inf_written_over_a_negative_remainder_is_a_finite_master() -> None:
    """The price of exactness at the top, as documented; it still rounds to the inf."""
    back = np.zeros(1, np.float32)
    cpp.run("join16", 1, np.array([0x7F80], np.uint16), np.array([-1], np.int16), back)
    assert back[0] == np.finfo(np.float32).max


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rule", sorted(FUSED))
def test_masters_are_those_of_fp32_masters(rule: str, dtype: torch.dtype, backend: str) -> None:
    """Over 50 steps to the bit, where the remainder is exact; parameters differ only at ties."""
    runs = {}
    for form in (True, "remainder"):
        generator = torch.Generator().manual_seed(5)
        param = torch.nn.Parameter(torch.randn(3001, generator=generator).to(dtype))
        opt = FUSED[rule]([param], lr=1e-2, master_weights=form, backend=backend)
        for _ in range(50):
            param.grad = torch.randn(3001, generator=generator).to(dtype)
            opt.step()
        runs[form] = param.detach().clone(), opt.state[param]
    (wide, wide_state), (half, half_state) = runs[True], runs["remainder"]
    master, rest = wide_state["master_param"], half_state["master_remainder"].numpy()
    bits = half.view(torch.int16).numpy().view(np.uint16)
    if dtype == torch.bfloat16:
        joined = model.bf16_joined(bits, rest)
        tie = master.view(torch.int32) & 0xFFFF == 0x8000
        assert torch.equal(wide[~tie], half[~tie])
        same = np.ones(len(rest), bool)
    else:
        joined = model.fp16_joined(bits.view(np.float16), rest)
        same = np.abs(master.numpy()) >= 2.0**-16
        assert torch.equal(wide, half)
    assert same.mean() > 0.99
    np.testing.assert_array_equal(joined[same], master.numpy()[same])
