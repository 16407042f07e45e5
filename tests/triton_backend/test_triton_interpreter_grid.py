"""The interpreted Triton kernels: launches, grids, several devices, and whose memory is touched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import CHUNK, FULL_CASES, adamw
from conftest import require_cpu_backend
from gpu_twins import grads_like
from harness import randn
from triton_interpreter import BLOCK, Interpreter
from triton_memory import Memory
from triton_twins import TritonTwins, shifted

import fusedopt
from fusedopt.backends.device import DevicePlan

_interpreter = pytest.fixture(triton_interpreter.fixture)
DEVICES = (torch.device("cpu"), torch.device("cpu", 0))


@pytest.fixture(autouse=True)
def interpreter(_interpreter: Interpreter) -> Interpreter:
    require_cpu_backend()
    return _interpreter


def verbs(interpreter: Interpreter) -> list[str]:
    """Launched since the last look."""
    names = [name.partition("-")[0] for name, _ in interpreter.launched]
    interpreter.launched.clear()
    return names


@pytest.mark.parametrize("lengths", [[5], [0] * 70 + [1], [0], [1, CHUNK + 1]], ids=len)
def test_two_launches_a_step(interpreter: Interpreter, lengths: list[int]) -> None:
    for case in FULL_CASES:
        twins = TritonTwins.of_lengths(case, lengths)
        interpreter.launched.clear()
        twins.run(steps=2)
        assert verbs(interpreter) == ["reduce", "update"] * 2


def test_launches_when_nobody_asks_for_a_norm(interpreter: Interpreter) -> None:
    twins = TritonTwins.of_lengths(adamw("default"), [300, 5])
    twins.run(steps=2)
    assert verbs(interpreter) == ["finalize", "update"] * 2


def backwards(n: int) -> Sequence[int]:
    return range(n)[::-1]


def from_the_middle(n: int) -> Sequence[int]:
    return [*range(n // 2, n), *range(n // 2)]


GRIDS = [(1, backwards), (2, range), (7, from_the_middle)]


@pytest.mark.parametrize(("programs", "order"), GRIDS)
def test_grid_and_order_leave_no_trace(
    interpreter: Interpreter, programs: int, order: Callable[[int], Sequence[int]]
) -> None:
    interpreter.programs, interpreter.order = programs, order
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.bfloat16)):
        lengths = [0, 1, 300, BLOCK + 9, CHUNK + 1, 26, 3]  # seven chunks
        twins = TritonTwins.of_lengths(case, lengths, dtype)
        interpreter.launched.clear()
        twins.run(steps=2)
        assert [n for _, n in interpreter.launched] == [programs, 7] * 2


@pytest.mark.parametrize("offset", [0, 3])
def test_memory_of_others(interpreter: Interpreter, offset: int) -> None:
    """Neither read nor written, also by elements that a mask should have excluded."""
    lengths = [1, 255, BLOCK + 257, 0, 511]
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.float16)):
        twins = TritonTwins.of(case, [shifted(randn(n, n, dtype), offset) for n in lengths])
        for step in range(2):
            grads = [shifted(grad, offset) for grad in grads_like(twins.params, step)]
            twins.give([*grads[:-1], grads[-1] if step == 0 else None])
            interpreter.memory = Memory(twins.tensors()) if step else None
            twins.opt.step()
            interpreter.memory = None
            twins.twin.step()
            twins.check()


def test_the_watch_over_memory_sees(interpreter: Interpreter) -> None:
    twins = TritonTwins.of_lengths(FULL_CASES[0], [5, 300])
    twins.run(steps=1)
    for hidden in (twins.params[1], twins.opt.state[twins.params[0]]["exp_avg"]):
        tensors = [t for t in twins.tensors() if t.data_ptr() != hidden.data_ptr()]
        interpreter.memory = Memory([*tensors, hidden.detach()[:-1]])
        with pytest.raises(Exception, match="touches what is not its own"):
            twins.opt.step()


# ---- several devices, which are two names of the CPU ---------------------------------------------


def by_position(plan: DevicePlan, row: Any) -> torch.device:
    return DEVICES[plan.rows.index(row) % 2]


@pytest.mark.parametrize(
    ("norm_type", "bad_row"), [(2.0, None), (2.0, 1), (float("inf"), 0), (float("inf"), 1)]
)
def test_two_devices_share_norm_and_decision(
    interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch, norm_type: float, bad_row: int | None
) -> None:
    """Three launches on each. The gradients are whole numbers: any order sums the same."""
    monkeypatch.setattr(DevicePlan, "device_of", by_position)
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float16)
    lengths = (300, BLOCK + 9, 35, 0, 3)
    for case in FULL_CASES:
        values = [randn(n, n, dtype) for n, dtype in zip(lengths, dtypes, strict=True)]
        common = {**case.common, "norm_type": norm_type}
        groups = [{"params": values[:2], **case.hyper}, {"params": values[2:], "lr": 0.5}]
        twins = TritonTwins(case.rule, groups, **common)
        for step in range(3):
            grads = [g.sign() * (1 + k) for k, g in enumerate(grads_like(twins.params, step))]
            if step == 1 and bad_row is not None:
                grads[bad_row][-1] = float("inf")
            twins.step(grads, grad_scale=4.0)
            twins.check()
            steady = ["reduce"] * 2 + ["finalize"] * 2 + ["update"] * 2
            assert verbs(interpreter) == steady
        assert len(twins.opt._shared.plan.parts) == 2
        assert twins.opt.skipped_steps == (bad_row is not None)


def test_options_in_tensors_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    stays = fusedopt.optimizer.FusedOptimizer._stays_on_device
    monkeypatch.setattr(
        fusedopt.optimizer.FusedOptimizer,
        "_stays_on_device",
        lambda self, value: self is twins.opt or stays(self, value),
    )
    monkeypatch.setattr(DevicePlan, "device_of", by_position)
    lr = torch.tensor(0.25)
    twins = TritonTwins("sgd", [{"params": [randn(300, 1), randn(7, 2)], "lr": lr}], momentum=0.9)
    twins.run(steps=2)
    for optimizer in (twins.opt, twins.twin):
        optimizer.param_groups[0]["lr"].mul_(0.5)
    twins.run(steps=1)


def test_a_captured_plan_outlives_its_replacement() -> None:
    twins = TritonTwins.of_lengths(FULL_CASES[0], [30])
    twins.run(steps=1)
    plan = twins.opt._shared.plan
    plan.capture()  # as begin() notes while a graph is being captured
    twins.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    twins.opt.param_groups[-1]["params"][0].grad = torch.ones(3)
    twins.opt.step()
    assert twins.opt._shared.plan is not plan
    assert plan in twins.opt._shared.captured_plans
