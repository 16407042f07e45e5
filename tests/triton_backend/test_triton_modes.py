"""The Triton backend's host side where something unusual is on, or goes wrong on the way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import FULL_CASES
from conftest import require_cpu_backend
from gpu_twins import grads_like
from harness import randn
from triton_twins import TritonTwins

from fusedopt.backends import triton as backend

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[triton_interpreter.Interpreter]:
    require_cpu_backend()
    yield from triton_interpreter.fixture()


@pytest.fixture
def twins() -> Any:
    return TritonTwins.of_lengths(FULL_CASES[0], [300, 5])


def test_a_default_device_changes_nothing(twins: Any) -> None:
    """ "meta" stands in for the "cuda" of torch.set_default_device, where nothing can be pinned."""
    for step in range(2):
        twins.give(grads_like(twins.params, step))
        with torch.device("meta"):
            twins.opt.step()
        twins.twin.step()
        twins.check()


@pytest.mark.parametrize("prepared", [True, False])
def test_a_plan_made_in_inference_mode_serves_outside(twins: Any, prepared: bool) -> None:
    with torch.inference_mode():
        if prepared:
            twins.opt.init_state()
        else:
            twins.step(grads_like(twins.params, 0))
    for step in range(1, 3):
        twins.step(grads_like(twins.params, step))
        twins.check()


@pytest.mark.parametrize("spare", [0, backend.BUFFERS + 1], ids=["before", "behind"])
def test_a_table_and_the_kernel_that_reads_it_change_together(
    twins: Any, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """Also where pinning memory fails, before the copy or behind it."""

    def no_memory(*_: Any) -> None:
        raise RuntimeError("no memory to pin")

    def give_ours(grads: Any) -> None:
        for param, grad in zip(twins.params, grads, strict=True):
            param.grad = grad

    def fail(grads: Any) -> None:
        give_ours(grads)
        upload = twins.opt._shared.plan.parts[0].launches._upload
        with monkeypatch.context() as patch:
            patch.setattr(backend, "SPARE", spare)
            patch.setattr(upload, "_new_buffer", no_memory)
            if not spare:
                patch.setattr(upload, "_free", [])
                patch.setattr(upload, "_busy", [])
            with pytest.raises(RuntimeError, match="no memory"):
                twins.opt.step()

    full = grads_like(twins.params, 1)
    twins.step(grads_like(twins.params, 0, torch.bfloat16))
    halves = [p.grad for p in twins.params]  # the very tensors whose addresses are in the table
    twins.check()
    fail(full)
    give_ours(halves)
    twins.opt.step(), twins.twin.step()
    twins.check()
    twins.step(full)
    fail(halves)  # from a kernel that reads fp32 alone
    for twin, grad in zip(twins.twin_params, halves, strict=True):
        twin.grad = grad.clone()
    twins.opt.step(), twins.twin.step()
    twins.check()


def test_negative_counts_end() -> None:
    """As a strange checkpoint has them, in every row of a batch."""

    def stuck(*_: Any) -> None:
        raise AssertionError("the kernel does not end")

    twins = TritonTwins.of_lengths(FULL_CASES[0], [1] * 64)
    for optimizer in (twins.opt, twins.twin):
        optimizer.init_state()
        for state in optimizer.state.values():
            state["step"].fill_(-5.0)
    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(60)
    try:
        twins.step(grads_like(twins.params, 1))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    for ours, other in zip(twins.params, twins.twin_params, strict=True):
        steps = twins.opt.state[ours]["step"], twins.twin.state[other]["step"]
        assert steps[0] == steps[1] == -4.0


def test_an_absent_state_is_never_the_larger_one() -> None:
    """Not even than a negative second moment, as a strange checkpoint has it. Beside a tensor that
    has the state, for else the kernel is one that does not look."""
    groups = [{"params": [randn(300, k)], "amsgrad": k == 1} for k in range(2)]
    twins = TritonTwins("adamw", groups)
    for optimizer in (twins.opt, twins.twin):
        optimizer.init_state()
        for state in optimizer.state.values():
            state["exp_avg_sq"].fill_(-1.0)
    twins.run(steps=1)
