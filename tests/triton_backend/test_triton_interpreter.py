"""The interpreted Triton kernels against the CPU backend: the same bits. Rules, layouts, states."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import (
    ALL_CASES,
    CHUNK,
    DTYPE_PAIRS,
    FLOATS,
    FULL_CASES,
    HALVES,
    KERNEL_CASES,
    LAYOUT_SHAPE,
    LAYOUTS,
    PLAIN_CASES,
    OptimizerCase,
    dtype_name,
    parametrize,
)
from conftest import require_cpu_backend
from gpu_twins import grads_like, values_of
from harness import FUSED, randn
from triton_twins import (
    LENGTHS,
    LONG_LENGTHS,
    TritonTwins,
    shifted,
)

import fusedopt

_interpreter = pytest.fixture(triton_interpreter.fixture)
Pair = tuple[torch.dtype, torch.dtype]
BLOCK_AND_TAIL = triton_interpreter.BLOCK + 300


@pytest.fixture(autouse=True)
def _installed(_interpreter: triton_interpreter.Interpreter) -> None:
    require_cpu_backend()


# ---- the rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("master_weights", [None, False])
@parametrize("case", ALL_CASES)
def test_options(case: OptimizerCase, master_weights: bool | None) -> None:
    for dtype in FLOATS if master_weights is None else HALVES:
        TritonTwins.of_lengths(case, [260, 0], dtype, master_weights=master_weights).run()


@pytest.mark.parametrize("master_weights", [None, False])
@parametrize("pair", DTYPE_PAIRS)
def test_dtypes(pair: Pair, master_weights: bool | None) -> None:
    """Whole blocks, tail steps, and two chunks of one tensor."""
    for case in KERNEL_CASES:
        twins = TritonTwins.of_lengths(case, [1, 1300], pair[0], master_weights=master_weights)
        twins.run(pair[1], steps=2)


@parametrize("pair", DTYPE_PAIRS)
def test_lengths(pair: Pair) -> None:
    for case in FULL_CASES if pair[0] == pair[1] else FULL_CASES[:1]:
        TritonTwins.of_lengths(case, LENGTHS, pair[0]).run(pair[1], steps=2)


@parametrize("dtype", FLOATS)
@parametrize("case", FULL_CASES)
def test_lengths_around_a_chunk(case: OptimizerCase, dtype: torch.dtype) -> None:
    TritonTwins.of_lengths(case, LONG_LENGTHS, dtype).run(steps=2)


def test_a_gradient_changes_its_dtype() -> None:
    for case, dtype in itertools.product(FULL_CASES, FLOATS):
        twins = TritonTwins.of_lengths(case, [5, BLOCK_AND_TAIL], dtype)
        for step, of_grads in enumerate([(1, 0), (1, 2), (0, 0)]):
            grads = grads_like(twins.params, step)
            twins.step([g.to(FLOATS[k]) for g, k in zip(grads, of_grads, strict=True)])
            twins.check()


def test_groups_have_their_own_options() -> None:
    """One launch for groups of every kind."""
    hypers: dict[str, list[dict[str, Any]]] = {
        rule: [case.hyper for case in ALL_CASES if case.rule == rule and not case.common]
        for rule in FUSED
    }
    for (rule, own), dtype in itertools.product(hypers.items(), FLOATS):
        groups = [{**hyper, "params": [randn(30 + k, k, dtype)]} for k, hyper in enumerate(own)]
        twins = TritonTwins(rule, groups, max_grad_norm=5.0)
        twins.run(steps=1)
        twins.set(1, lr=0.5, weight_decay=0.01)
        twins.run(steps=1)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_options_change_between_steps(rule: str) -> None:
    """Also to and from values that switch a term of the rule off, whose states then wait."""
    hypers: dict[str, list[dict[str, Any]]] = {
        "adamw": [
            {"weight_decay": 0.0},
            {"weight_decay": 0.3, "decoupled_weight_decay": False},
            {"betas": (0.0, 0.5), "maximize": True},
            {"betas": (0.99, 0.0), "decoupled_weight_decay": True, "lr": 0.0},
        ],
        "sgd": [
            {"momentum": 0.0, "weight_decay": 0.0},
            {"momentum": 0.9, "nesterov": True, "maximize": True},
            {"momentum": 0.0, "nesterov": False, "weight_decay": 0.2},
            {"momentum": 0.5, "dampening": 0.25, "decoupled_weight_decay": False},
        ],
    }
    first = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.7} if rule == "sgd" else {})}
    for dtype in FLOATS:
        twins = TritonTwins(rule, [{"params": values_of([30], dtype), **first}])
        twins.run(steps=1)
        for hyper in hypers[rule]:
            twins.set(**hyper)
            twins.run(steps=2)


# ---- where tensors lie --------------------------------------------------------------------------


@parametrize("pair", [p for p in DTYPE_PAIRS if torch.float32 in p or p[0] == p[1]])
@parametrize("case", FULL_CASES)
def test_alignment(case: OptimizerCase, pair: Pair) -> None:
    """Params and gradients at storage offsets 0 to 8, moving against each other."""
    of_params, of_grads = (0, 1, 4, 8), (0, 3, 4, 8)
    offsets = [(p, g) for p, g in itertools.product(of_params, of_grads) if p % 8 == 0 or g == 3]
    lengths = [(3, 1100, 517)[k % 3] for k in range(len(offsets))]
    values = [shifted(randn(n, n, pair[0]), p) for n, (p, _) in zip(lengths, offsets, strict=True)]
    twins = TritonTwins.of(case, values)
    assert [p.data_ptr() % 16 == 0 for p in twins.params] == [p % 8 == 0 or (
        p == 4 and pair[0] == torch.float32) for p, _ in offsets]  # fmt: skip
    for step in range(2):
        grads = grads_like(twins.params, step, pair[1])
        twins.step([shifted(g, at) for g, (_, at) in zip(grads, offsets, strict=True)])
        twins.check()


def test_misaligned_states() -> None:
    """Of our own making they are aligned; a user may put others in their place, one at a time."""
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.float16)):
        twins = TritonTwins.of_lengths(case, [1300, 1100], dtype)
        twins.run(steps=1)
        own = twins.opt.state[twins.params[0]]
        for name in [name for name in own if name != "step"]:
            own[name] = shifted(own[name], 1)
            assert own[name].data_ptr() % 16
            twins.run(steps=1)
            own[name] = own[name].clone()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Of the param, of the gradient, and of both: each is staged on its own."""
    plain, other = LAYOUTS["contiguous"], LAYOUTS[layout]
    pairs = [(plain, other), (other, plain), (other, other)]
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.bfloat16)):
        values = [of_param(randn(LAYOUT_SHAPE, k, dtype)) for k, (of_param, _) in enumerate(pairs)]
        twins = TritonTwins.of(case, values)
        for step in range(2):
            grads = grads_like(twins.params, step)
            twins.step([of_grad(g) for g, (_, of_grad) in zip(grads, pairs, strict=True)])
            twins.check()


# ---- states -------------------------------------------------------------------------------------


@parametrize("dtype", HALVES)
def test_masters_follow_external_writes(dtype: torch.dtype) -> None:
    for case in FULL_CASES:
        twins = TritonTwins.of_lengths(case, [1, 300, BLOCK_AND_TAIL], dtype)
        twins.run(steps=1)
        for step in range(1, 4):
            for params in (twins.params, twins.twin_params):
                for index, param in enumerate(params):
                    with torch.no_grad():
                        param[:: 1 + 2 * step].mul_(1.5)
                        param[-1] = float(index + step)
            twins.step(grads_like(twins.params, step))
            twins.check()


@parametrize("dtype", HALVES)
def test_masters_edited_from_outside(dtype: torch.dtype) -> None:
    """Below and above half an ulp of the param, which decides who is believed."""
    for case in FULL_CASES:
        twins = TritonTwins.of_lengths(case, [7, BLOCK_AND_TAIL], dtype)
        twins.run(steps=1)
        for optimizer, params in ((twins.opt, twins.params), (twins.twin, twins.twin_params)):
            for param in params:
                master = optimizer.state[param]["master_param"]
                master[::3] *= 1 + 2.0**-20
                master[1::3] *= 1.25
        twins.run(steps=2)


def test_absent_gradients() -> None:
    """Step counts drift apart; states come into being at different steps."""
    for case in [*FULL_CASES, KERNEL_CASES[3]]:
        twins = TritonTwins.of_lengths(case, [5, CHUNK + 5, 30, 0, 1])
        for step, present in enumerate(["034", "134", "", "0", "01234", "2"]):
            grads = grads_like(twins.params, step)
            twins.step([g if str(k) in present else None for k, g in enumerate(grads)])
            twins.check()


def test_frozen_and_thawed() -> None:
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.bfloat16)):
        twins = TritonTwins.of_lengths(case, [5, 300, 2], dtype)
        for step, frozen in enumerate([(1,), (1,), (), (0, 1, 2), (0,), ()]):
            for k, both in enumerate(zip(twins.params, twins.twin_params, strict=True)):
                for param in both:
                    param.requires_grad_(k not in frozen)
            grads = grads_like(twins.params, step)
            twins.step([None if k in frozen else g for k, g in enumerate(grads)])
            twins.check()


def test_more_tensors_than_are_prepared_at_once() -> None:
    """finalize and the step counts take 64 rows at a time; the counts differ between them."""
    for case in PLAIN_CASES:
        lengths = [int(k % 64 in (0, 1, 63)) for k in range(150)]
        twins = TritonTwins.of_lengths(case, lengths, max_grad_norm=1.0)
        for step in range(3):
            grads = grads_like(twins.params, step)
            twins.step([g if k % 3 or step else None for k, g in enumerate(grads)])
            twins.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_options_in_tensors(rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the kernels, when they run: as on a GPU, where the host does not look at them."""
    stays = fusedopt.optimizer.FusedOptimizer._stays_on_device
    left = []

    def on_device(self: Any, value: torch.Tensor) -> bool:
        if self is not twins.opt:
            return stays(self, value)
        left.append(value)
        return True

    def hyper(k: int) -> dict[str, Any]:
        own: dict[str, Any] = {"lr": 0.1 / k, "weight_decay": 0.3 / k}
        if rule == "adamw":
            own["betas"] = (torch.tensor(0.7, dtype=dtype), torch.tensor(0.8, dtype=dtype))
        return {n: v if n == "betas" else torch.tensor(v, dtype=dtype) for n, v in own.items()}

    n_groups = {"adamw": 9, "sgd": 17}[rule]  # more numbers than are fetched at once
    groups = [{"params": [randn(3, k)], **hyper(k)} for k in range(1, n_groups + 1)]
    groups.append({"params": [randn(7, 1)], "lr": 0.01, "weight_decay": 0.1})
    twins = TritonTwins(rule, groups, max_grad_norm=1.0)
    monkeypatch.setattr(fusedopt.optimizer.FusedOptimizer, "_stays_on_device", on_device)
    twins.run(steps=2)
    for optimizer in (twins.opt, twins.twin):
        for group in optimizer.param_groups[:-1]:
            group["lr"].mul_(0.5)
    twins.run(steps=1)
    assert left


def test_state_moves_between_backends() -> None:
    for case in FULL_CASES:
        twins = TritonTwins.of_lengths(case, [0, 1, 300], torch.bfloat16)
        twins.run(steps=2)
        saved, other = twins.opt.state_dict(), twins.twin.state_dict()
        twins.opt.load_state_dict(other)
        twins.twin.load_state_dict(saved)
        twins.run(steps=2)


@pytest.mark.parametrize("amsgrad", [(False, True, False), (True, False, True)])
def test_amsgrad_in_some_groups(amsgrad: tuple[bool, ...]) -> None:
    for dtype in FLOATS:
        values = values_of([100, 700, 9], dtype)
        groups = [{"params": [v], "amsgrad": a} for v, a in zip(values, amsgrad, strict=True)]
        TritonTwins("adamw", groups, max_grad_norm=1.0).run()
