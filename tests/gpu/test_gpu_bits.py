"""GPU backends against the CPU backend, bit for bit: options, dtypes, lengths, layouts, groups."""

from __future__ import annotations

import functools
import math
from typing import Any

import gpu_helpers
import pytest
import torch
from cases import (
    ALL_CASES,
    CHUNK,
    DTYPE_PAIRS,
    FLOATS,
    FULL_CASES,
    HALVES,
    PLAIN_CASES,
    SHAPES,
    OptimizerCase,
    parametrize,
)
from gpu_helpers import MANY_LENGTHS, by_speed, moved
from gpu_twins import Twins, grads_like, values_of
from harness import make_param, randn
from torch import Tensor

pytestmark = gpu_helpers.on_gpu
device = gpu_helpers.device_fixture()

Shape = tuple[int, ...]


def shaped(shapes: list[Shape], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(shape, seed, dtype) for seed, shape in enumerate(shapes)]


@functools.cache
def all_lengths_and_pairs() -> tuple[list[Tensor], list[list[Tensor]]]:
    """Values of params, and scaled gradients of four steps; only read, so made once."""
    pairs = [(n, *pair) for n in MANY_LENGTHS for pair in DTYPE_PAIRS]
    pairs = pairs[:: by_speed(1, 1, 4)]  # of which 4 leaves each length and each pair in
    values = [randn(n, k, param_dtype) for k, (n, param_dtype, _) in enumerate(pairs)]
    grads = [
        [randn(n, 1000 * step + k, dtype, 128.0 * scale) for k, (n, _, dtype) in enumerate(pairs)]
        for step, scale in enumerate((1.0, 0.02, 5.0, 0.3))
    ]
    return values, grads


@pytest.mark.parametrize(
    ("case", "master_weights"),
    [*((case, None) for case in ALL_CASES), *((case, False) for case in FULL_CASES + PLAIN_CASES)],
    ids=str,
)
def test_every_option_length_and_dtype_pair(
    case: OptimizerCase, master_weights: bool | None
) -> None:
    """All in one optimizer: neighbours in the list differ in dtype, length and alignment."""
    values, grads = all_lengths_and_pairs()
    twins = Twins.of(case, values, master_weights=master_weights)
    for step, own in enumerate(grads):
        twins.set(lr=float(case.hyper.get("lr", 1e-3)) * (1.0, 0.5, 2.0, 1.25)[step])
        twins.step(own, grad_scale=128.0)
        twins.check()


@parametrize("case", FULL_CASES + PLAIN_CASES)
@parametrize("dtype", FLOATS)
def test_fifty_steps(case: OptimizerCase, dtype: torch.dtype) -> None:
    """Nothing is left behind that would show later: step counts, bias corrections, rounding."""
    twins = Twins.of(
        case, shaped(by_speed([*SHAPES, (CHUNK + 9,)], [*SHAPES, (CHUNK + 9,)], [(17,)]), dtype)
    )
    for step in range(50):
        twins.set(lr=0.01 * (1.0 + step % 5))
        twins.step(grads_like(twins.twin_params, step))
        if step in (0, 1, 2, 9, 49):
            twins.check()


@parametrize("case", PLAIN_CASES)
@pytest.mark.parametrize("n", by_speed(MANY_LENGTHS, [1, 17, CHUNK + 1], [17]))
def test_one_tensor_alone(case: OptimizerCase, n: int) -> None:
    twins = Twins.of(case, values_of([n], torch.float16), max_grad_norm=1.0)
    for step in range(2):
        twins.step(grads_like(twins.twin_params, step))
    twins.check()


# Which tensors take part


@parametrize("case", ALL_CASES)
def test_gradients_that_are_none_now_and_then(case: OptimizerCase) -> None:
    twins = Twins.of(case, shaped([(), (3, 5), (0,), (17,), (1500,)]))
    for step in range(7):
        grads: list[Tensor | None] = [*grads_like(twins.twin_params, step)]
        for index in {0: [4], 1: [], 2: [1, 4], 3: [0, 1, 2, 3, 4], 4: [3]}.get(step, []):
            grads[index] = None
        twins.step(grads)
        twins.check()


@parametrize("case", FULL_CASES + PLAIN_CASES)
def test_frozen_and_thawed(case: OptimizerCase) -> None:
    twins = Twins.of(case, shaped([(5,), (17,), (33, 3), (300,), (0,)], torch.bfloat16))
    for step in range(6):
        frozen = {3} if step < 2 else ({1, 4} if step < 4 else set())
        for params in (twins.params, twins.twin_params):
            for index, param in enumerate(params):
                param.requires_grad_(index not in frozen)
        grads = grads_like(twins.twin_params, step)
        twins.step([None if index in frozen else g for index, g in enumerate(grads)])
        twins.check()


def test_groups_added_between_steps() -> None:
    twins = Twins.of(PLAIN_CASES[0], values_of([17, 300]), max_grad_norm=1.0)
    for step in range(4):
        if step:
            value = randn(50 * step, step)
            for optimizer, params, where in (
                (twins.opt, twins.params, gpu_helpers.DEVICE),
                (twins.twin, twins.twin_params, torch.device("cpu")),
            ):
                param = make_param(moved(value, where))
                optimizer.add_param_group({"params": [param], "lr": 0.1 * step})
                params.append(param)
        twins.step(grads_like(twins.twin_params, step))
        twins.check()


def test_groups_without_params() -> None:
    groups: list[dict[str, Any]] = [{"params": []}, {"params": shaped([(17,)])}, {"params": []}]
    twins = Twins("adamw", groups, max_grad_norm=1.0)
    for step in range(2):
        twins.step(grads_like(twins.twin_params, step))
        twins.check()


@parametrize("dtype", HALVES)
def test_masters_follow_external_writes(dtype: torch.dtype) -> None:
    twins = Twins.of(PLAIN_CASES[0], values_of([5, 99, 300], dtype))
    for step in range(5):
        if step == 3:
            with torch.no_grad():
                for params in (twins.params, twins.twin_params):
                    params[1].view(-1)[1::3] *= 1.5
                    params[2].data.copy_(moved(randn(300, 77, dtype), params[2].device))
        twins.step(grads_like(twins.twin_params, step))
        twins.check()


# Hyper-parameters


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_groups_have_their_own_hyper_parameters(max_grad_norm: float | None) -> None:
    first, second, third = (shaped([(20 + n,), (3, 9)]) for n in range(3))
    groups: list[dict[str, Any]] = [
        {"params": first, "lr": 0.1, "weight_decay": 0.5, "betas": (0.5, 0.6)},
        {"params": second, "eps": 0.2, "amsgrad": True, "maximize": True},
        {"params": third, "lr": 0.02, "weight_decay": 0.3, "decoupled_weight_decay": False},
    ]
    twins = Twins("adamw", groups, max_grad_norm=max_grad_norm)
    for step in range(5):
        twins.set(step % 3, lr=0.01 * (step + 1), weight_decay=0.1 * step, betas=(0.8, 0.9))
        twins.step(grads_like(twins.twin_params, step))
        twins.check()


def test_hundreds_of_groups() -> None:
    """More hyper-parameters than the parameters of a kernel can hold."""
    groups = [
        {"params": shaped([(n % 40,)]), "lr": 1e-3 * (n + 1), "weight_decay": 0.01 * (n % 7)}
        for n in range(by_speed(700, 200, 90))
    ]
    twins = Twins("adamw", groups, max_grad_norm=1.0)
    for step in range(3):
        for index in range(0, len(groups), 3):
            twins.set(index, lr=0.02 * (step + 1))
        twins.step(grads_like(twins.twin_params, step))
        twins.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_lr_in_a_tensor(rule: str, shape: Shape, dtype: torch.dtype) -> None:
    """On the device for ours; a scheduler fills it in place."""
    groups = [
        {
            "params": shaped([(n + 17,), (3, 5)]),
            "lr": torch.full(shape, 0.03 * (n + 1), dtype=dtype),
        }
        for n in range(3)
    ]
    twins = Twins(rule, groups, weight_decay=0.1)
    rates = [[g["lr"] for g in optimizer.param_groups] for optimizer in (twins.opt, twins.twin)]
    for step in range(4):
        for rate in (*rates[0], *rates[1]):
            rate.mul_(1.0 + 0.3 * step)
        twins.step(grads_like(twins.twin_params, step))
        twins.check()
    assert all(g["lr"] is rate for g, rate in zip(twins.opt.param_groups, rates[0], strict=True))
    assert all(rate.device.type == gpu_helpers.DEVICE.type for rate in rates[0])


def test_betas_in_tensors() -> None:
    betas = (torch.tensor(0.8), torch.tensor(0.95))
    twins = Twins("adamw", [{"params": shaped([(17,), (3, 5)])}])
    twins.opt.param_groups[0]["betas"] = tuple(b.to(gpu_helpers.DEVICE) for b in betas)
    twins.twin.param_groups[0]["betas"] = betas
    for step in range(4):
        for optimizer in (twins.opt, twins.twin):
            optimizer.param_groups[0]["betas"][0].fill_(0.8 + 0.02 * step)
        twins.step(grads_like(twins.twin_params, step))
        twins.check()


def test_a_tensor_takes_the_place_of_a_number_and_back() -> None:
    """The number that comes back may be the one that stood there before the tensor, or zero.

    Gradients stay where they are: nothing but the hyper-parameter gives a reason to look.
    """
    twins = Twins.of(PLAIN_CASES[0], values_of([17, CHUNK + 1]))
    twins.give(grads_like(twins.twin_params, 0))
    rates = [0.01, 0.01, (0.5,), 0.01, (0.25,), (0.0,), 0.0, (0.125,), 0.0, 0.03]
    for rate in rates:
        value = rate[0] if isinstance(rate, tuple) else rate
        twins.set(lr=value)
        if isinstance(rate, tuple):
            tensor = torch.tensor(value, dtype=torch.float64).to(gpu_helpers.DEVICE)
            twins.opt.param_groups[0]["lr"] = tensor
        twins.opt.step()
        twins.twin.step()
        twins.check()


def test_everything_that_may_change_with_the_gradients_in_place() -> None:
    """Each option by itself, both ways: none is taken from the step before."""
    group = {"params": values_of([17, CHUNK + 1]), "lr": 0.1, "weight_decay": 0.2}
    twins = Twins("adamw", [group], max_grad_norm=1.0)
    twins.give(grads_like(twins.twin_params, 2))
    changes: list[dict[str, Any]] = [
        {"lr": 0.05}, {"betas": (0.5, 0.9)}, {"eps": 1e-2}, {"weight_decay": 0.0},
        {"maximize": True}, {"decoupled_weight_decay": False}, {"weight_decay": 0.3},
        {"amsgrad": True}, {"maximize": False}, {"amsgrad": False},
    ]  # fmt: skip
    common: list[dict[str, Any]] = [
        {"max_grad_norm": 0.1}, {"max_grad_norm": None}, {"max_grad_value": 0.01},
        {"skip_nonfinite": True}, {"max_grad_norm": 5.0}, {"norm_type": math.inf},
        {"max_grad_value": None},
    ]  # fmt: skip
    for change in changes:
        twins.set(**change)
        for optimizer in (twins.opt, twins.twin):
            optimizer.step()
        twins.check()
    for change in common:
        for optimizer in (twins.opt, twins.twin):
            for name, value in change.items():
                setattr(optimizer, name, value)
            optimizer.step()
        twins.check()


def test_extreme_step_counts() -> None:
    """The count is a float32 on the device; a checkpoint may bring any."""
    for count in (1.0, 999.0, 1e6, 2.0**24 - 2):
        twins = Twins.of(PLAIN_CASES[0], values_of([33]))
        twins.step(grads_like(twins.twin_params, 0))
        for optimizer, params in ((twins.opt, twins.params), (twins.twin, twins.twin_params)):
            optimizer.state[params[0]]["step"].fill_(count)
        twins.step(grads_like(twins.twin_params, 1))
        twins.check()
        assert twins.opt.state[twins.params[0]]["step"].item() == count + 1
        assert math.isfinite(twins.params[0].sum().item())
