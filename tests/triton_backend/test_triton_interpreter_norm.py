"""The interpreted Triton kernels against the CPU backend: norm, clipping, skipping, scalers."""

from __future__ import annotations

import itertools
import math

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
    LANES,
    NONFINITE,
    OptimizerCase,
    parametrize,
)
from conftest import require_cpu_backend
from gpu_twins import grads_like
from harness import randn
from models import exact
from triton_interpreter import BLOCK
from triton_twins import LENGTHS, MEASURE, TritonTwins, shifted, unlike

import fusedopt

_interpreter = pytest.fixture(triton_interpreter.fixture)
NORMS = (2.0, math.inf)


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


def total(partials: np.ndarray, norm_type: float) -> float:
    """By the kernel's own function; 16-byte aligned, as the table of partials is."""
    kernel = triton_interpreter.part("finalize").total_of_partials
    table = torch.from_numpy(np.append(partials, 1e300))  # what comes after is not looked at
    address, n = np.int64(table.data_ptr()), np.int32(len(partials))
    return triton_interpreter.call(kernel, address, n, np.int64(norm_type == 2.0)).item()


@pytest.mark.parametrize("n", [0, 1, 2, 255, 256, 257, 511, 512, 513, 767, 769, 1024, 1536, 1800])
def test_total_of_partials(n: int) -> None:
    """Lanes by chunk index, then pairs; more chunks than a test can have the kernels sum up."""
    partials = unlike(n, n).abs().double().numpy() * (1 + 2.0**-40)
    index = np.arange(n)
    for part in range(9):  # of all lanes; of eight of them, which round less of the order away
        own = partials if part == 0 else np.where(index % LANES // 8 == part, partials, 0.0)
        lanes = np.zeros(LANES)
        for i, partial in enumerate(own):
            lanes[i % LANES] += partial
        assert total(own, 2.0) == exact.pair_tree(lanes)
    assert total(partials, math.inf) == max(partials, default=0.0)
    for place in {0, n // 3, n - 1} if n else ():
        for value in (math.nan, math.inf):
            bad = partials.copy()
            bad[place] = value
            bad[n - 1 - place] += 1e30
            for norm_type in NORMS:
                assert repr(total(bad, norm_type)) == repr(value)


def test_more_chunks_than_lanes() -> None:
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
    for case, dtype in zip(FULL_CASES, (torch.float16, torch.float32), strict=True):
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
