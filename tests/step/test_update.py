"""The update rules against the float64 oracle: every option, length and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    ALL_CASES,
    DTYPE_PAIRS,
    FLOATS,
    FULL_CASES,
    HALVES,
    LENGTHS,
    PLAIN_CASES,
    OptimizerCase,
    parametrize,
)
from harness import Trio, check_together, make_param, randn
from models.reference import Oracle, TorchStep
from torch import Tensor

import fusedopt

RUN_SHAPES: list[tuple[int, ...]] = [(), (3, 5), (0,), (17,), (1500,)]


def run_params(dtype: torch.dtype, shapes: list[tuple[int, ...]] = RUN_SHAPES) -> list[Tensor]:
    return [make_param(randn(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def run_grads(params: list[Tensor], step: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Gradients whose magnitude changes from step to step, on both sides of the clip thresholds."""
    scale = (1.0, 0.02, 5.0, 0.3)[step % 4]
    return [
        randn(tuple(p.shape), 1000 * step + index + 100, dtype or p.dtype, scale)
        for index, p in enumerate(params)
    ]


def scheduled_lr(case: OptimizerCase, step: int) -> float:
    return float(case.hyper.get("lr", 1e-3)) * (1.0, 0.5, 2.0, 0.0, 1.25)[step % 5]


@parametrize("case", ALL_CASES)
@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_is_torch_in_float64(case: OptimizerCase, dtype: torch.dtype) -> None:
    params = [p.detach() for p in run_params(dtype)]
    groups = [{"params": params, **case.hyper}]
    oracle = Oracle(case.rule, groups, **case.common)
    in_torch = TorchStep(case.rule, groups, torch.float64, **case.common)
    for step in range(20):
        lr = scheduled_lr(case, step)
        oracle.groups[0]["lr"] = in_torch.groups[0]["lr"] = lr
        grads = [g * 512 for g in run_grads(params, step)]
        if step == 4:
            grads[3] = None
        oracle.step(grads, grad_scale=512.0)
        in_torch.step(grads, grad_scale=512.0)
    for index, slot in enumerate(oracle.slots):
        values = {"param": (in_torch.params[index].detach(), slot.master)}
        for kind, value in slot.state.items():
            values[kind] = (in_torch.state(index)[kind], value)
        for kind, (actual, expected) in values.items():
            error = (actual - expected).abs()
            assert bool((error <= 1e-13 * slot.scale[kind]).all()), f"{kind} of param {index}"


@parametrize("case", ALL_CASES)
def test_fifty_steps(case: OptimizerCase, backend: str) -> None:
    trio = Trio.of(case, run_params(torch.float32), backend)
    for step in range(50):
        trio.set(lr=scheduled_lr(case, step))
        trio.step(run_grads(trio.params, step))
        if step in (0, 1, 2, 9, 49):
            trio.check()


@parametrize("case", ALL_CASES)
@parametrize("dtype", HALVES)
@pytest.mark.parametrize("master_weights", [True, False])
def test_half_params(
    case: OptimizerCase, dtype: torch.dtype, master_weights: bool, backend: str
) -> None:
    trio = Trio.of(case, run_params(dtype), backend, master_weights=master_weights)
    for step in range(6):
        trio.set(lr=scheduled_lr(case, step))
        trio.step(run_grads(trio.params, step))
        trio.check()


@parametrize("dtype", HALVES)
@parametrize("case", PLAIN_CASES)
def test_masters_keep_what_half_params_lose(
    case: OptimizerCase, dtype: torch.dtype, backend: str
) -> None:
    """Updates far below a half ulp add up; rounded to half after each step they would vanish."""
    trio = Trio.of(case, run_params(dtype, [(400,)]), backend)
    before = trio.params[0].detach().clone()
    trio.set(lr=1e-5, weight_decay=0.0)
    grads = run_grads(trio.params, 0)
    for _ in range(50):
        trio.step(grads)
    trio.check()
    master = trio.opt.state[trio.params[0]]["master_param"]
    assert bool((master != before.float()).all()), "a master stood still"


@parametrize("pair", DTYPE_PAIRS)
@pytest.mark.parametrize("master_weights", [None, False])
@parametrize("case", FULL_CASES)
def test_dtype_pairs(
    case: OptimizerCase,
    pair: tuple[torch.dtype, torch.dtype],
    master_weights: bool | None,
    backend: str,
) -> None:
    param_dtype, grad_dtype = pair
    params = run_params(param_dtype, [(), (5,), (67,), (2, 130)])
    trio = Trio.of(case, params, backend, master_weights=master_weights)
    for step in range(4):
        trio.step([g * 256 for g in run_grads(params, step, grad_dtype)], grad_scale=256.0)
        trio.check()


@parametrize("case", FULL_CASES)
def test_all_dtypes_in_one_optimizer(case: OptimizerCase, backend: str) -> None:
    params = [
        make_param(randn(40 + index, index, param_dtype))
        for index, (param_dtype, _) in enumerate(DTYPE_PAIRS)
    ]
    trio = Trio.of(case, params, backend)
    for step in range(3):
        trio.step(
            [
                randn(40 + index, 50 * step + index + 9, grad_dtype)
                for index, (_, grad_dtype) in enumerate(DTYPE_PAIRS)
            ]
        )
        trio.check()


@parametrize("case", [case for case in ALL_CASES if "max_grad_norm" not in case.common])
@pytest.mark.parametrize("backend", [None, "auto", "reference"])
def test_float64_params(case: OptimizerCase, backend: str | None) -> None:
    trio = Trio.of(case, run_params(torch.float64), backend)
    for step in range(10):
        trio.set(lr=scheduled_lr(case, step))
        trio.step(run_grads(trio.params, step))
        trio.check()


@parametrize("case", FULL_CASES)
@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_length_in_one_list(case: OptimizerCase, dtype: torch.dtype, backend: str) -> None:
    trio = Trio.of(case, run_params(dtype, [(n,) for n in LENGTHS]), backend)
    for step in range(3):
        trio.step(run_grads(trio.params, step))
        trio.check()


@parametrize("case, dtype", [*zip(PLAIN_CASES, [torch.float32, torch.float16], strict=True)])
def test_every_length_alone(case: OptimizerCase, dtype: torch.dtype, backend: str) -> None:
    trios = [
        Trio.of(case, run_params(dtype, [(length,)]), backend, max_grad_norm=1.0)
        for length in LENGTHS
    ]
    for trio in trios:
        for step in range(2):
            trio.step(run_grads(trio.params, step))
    check_together(trios)


def test_two_thousand_tiny_tensors(backend: str) -> None:
    trio = Trio.of(
        FULL_CASES[0], run_params(torch.float32, [(n % 9,) for n in range(2000)]), backend
    )
    trio.step(run_grads(trio.params, 0))
    trio.check()


OWN_GROUPS = {
    "adamw": [
        {"lr": 0.1, "weight_decay": 0.5, "betas": (0.5, 0.6)},
        {"eps": 0.2, "amsgrad": True, "maximize": True},
        {"lr": 0.02, "weight_decay": 0.3, "decoupled_weight_decay": False},
    ],
    "sgd": [
        {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.9, "nesterov": True},
        {"maximize": True},
        {"momentum": 0.5, "dampening": 0.3, "decoupled_weight_decay": False},
    ],
}
# What changes in a group, besides lr and weight_decay, after some steps.
EDITS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{"betas": (0.8, 0.9)}, {"eps": 0.1}, {"maximize": True}],
    "sgd": [{"momentum": 0.8}, {"momentum": 0.7, "dampening": 0.4}, {"maximize": True}],
}


@pytest.mark.parametrize("rule", OWN_GROUPS)
def test_groups_have_their_own_hyper_parameters(rule: str, backend: str) -> None:
    """Read at every step; a group that comes later begins then."""
    lists = [run_params(torch.float32, [(20 + n,), (3, 9)]) for n in range(4)]
    groups = [{"params": p, **own} for p, own in zip(lists, OWN_GROUPS[rule], strict=False)]
    trio = Trio(rule, groups, backend, max_grad_norm=1.0)
    for step in range(6):
        trio.set(step % 3, lr=0.01 * (step + 1), weight_decay=0.1 * step, **EDITS[rule][step % 3])
        if step == 3:
            trio.add_param_group({"params": lists[3], "lr": 0.01, "weight_decay": 0.0})
        trio.step(run_grads(trio.params, step))
        trio.check()


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_tensor_hyper_parameters(rule: str, shape: tuple[int, ...], backend: str) -> None:
    lr, betas = torch.full(shape, 0.03), (torch.tensor(0.8), torch.tensor(0.95))
    hyper = {"lr": lr, "betas": betas} if rule == "adamw" else {"lr": lr}
    trio = Trio(rule, [{"params": run_params(torch.float32), **hyper}], backend)
    for step in range(4):
        lr.fill_(0.03 * (step + 1))  # as a scheduler does, in place
        betas[0].fill_(0.8 + 0.02 * step)
        trio.step(run_grads(trio.params, step))
        trio.check()
    assert trio.opt.param_groups[0]["lr"] is lr and lr == torch.tensor(0.03 * 4)  # nobody wrote


@parametrize("case", ALL_CASES)
@parametrize("dtype", FLOATS)
def test_zero_lr_moves_no_param(case: OptimizerCase, dtype: torch.dtype, backend: str) -> None:
    trio = Trio.of(case, run_params(dtype), backend)
    trio.set(lr=0.0)
    before = [p.detach().clone() for p in trio.params]
    trio.step(run_grads(trio.params, 0))
    trio.check()
    assert all(torch.equal(p, old) for p, old in zip(trio.params, before, strict=True))


@parametrize("case", ALL_CASES)
def test_grad_that_is_none_this_step_only(case: OptimizerCase, backend: str) -> None:
    trio = Trio.of(case, run_params(torch.float32), backend)
    for step in range(7):
        grads: list[Tensor | None] = [*run_grads(trio.params, step)]
        for index in {0: [4], 1: [], 2: [1, 4], 3: [0, 1, 2, 3, 4], 4: [3]}.get(step, []):
            grads[index] = None
        before = [p.detach().clone() for p in trio.params]
        trio.step(grads)
        trio.check()
        for param, grad, old in zip(trio.params, grads, before, strict=True):
            assert grad is not None or torch.equal(param, old)


@parametrize("case", FULL_CASES + PLAIN_CASES)
def test_frozen_and_thawed_params(case: OptimizerCase, backend: str) -> None:
    trio = Trio.of(case, run_params(torch.bfloat16), backend)
    trio.params[3].requires_grad_(False)
    for step in range(6):
        frozen = {3} if step < 2 else ({1, 4} if step < 4 else set())
        for index, param in enumerate(trio.params):
            param.requires_grad_(index not in frozen)
        grads = run_grads(trio.params, step)
        trio.step([None if index in frozen else g for index, g in enumerate(grads)])
        trio.check()


def test_momentum_switched_on_later(backend: str) -> None:
    """The first step with momentum starts the buffer with the gradient, undamped."""
    group = {"params": run_params(torch.float32), "lr": 0.1, "dampening": 0.5}
    trio = Trio("sgd", [group], backend)
    for step in range(5):
        trio.set(momentum=0.9 if step >= 2 else 0.0)
        trio.step(run_grads(trio.params, step))
        trio.check()


def test_no_gradient_at_all(backend: str) -> None:
    trio = Trio("adamw", [{"params": run_params(torch.float32)}], backend, max_grad_norm=1.0)
    before = trio.snapshot()
    trio.step([None] * len(trio.params))
    trio.assert_unmoved(before)
    assert trio.opt.grad_norm.item() == 0.0 and not trio.opt.state
    trio.step(run_grads(trio.params, 0))
    trio.check()


@pytest.mark.parametrize("numel", [1, 17, 8197])
def test_lion_does_not_move_where_the_sign_is_zero(numel: int, backend: str) -> None:
    start = randn(numel, 0)
    param = make_param(start.clone())
    opt = fusedopt.FusedLion([param], lr=0.1, backend=backend)
    for zero in (0.0, -0.0):
        param.grad = torch.full_like(param, zero)
        opt.step()
    assert torch.equal(param, start)
