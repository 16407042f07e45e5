"""Nobody waits, nothing is allocated, two launches; side streams and threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_helpers
import pytest
import torch
from cases import CHUNK, PLAIN_CASES, OptimizerCase, parametrize
from gpu_helpers import (
    DEVICE,
    backend,
    by_speed,
    current_place,
    device_work,
    keep_busy,
    moved,
    n_allocations,
    new_stream,
    no_sync,
    on_stream,
    synchronize,
    wait_for,
)
from gpu_runs import RULES, Run, assert_runs_agree
from gpu_twins import Twins, grads_like, values_of
from harness import randn, set_grad

pytestmark = gpu_helpers.on_gpu
device = gpu_helpers.device_fixture()

SCALERS = [None, "torch", "ours"]
OPTIONS: list[dict[str, Any]] = [{}, {"max_grad_norm": None}, {"lr": 0.01, "skip_nonfinite": True}]
every_run = pytest.mark.parametrize(
    ("rule", "scaler"), [(rule, scaler) for rule in RULES for scaler in SCALERS], ids=str
)


def started(
    rule: str, scaler: str | None, dtype: torch.dtype = torch.float16, **options: Any
) -> Run:
    """A run with all its state, kernels and buffers in place."""
    run = Run(rule, scaler, dtype, **options)
    for step in range(2):
        run.feed(step)
        run.iteration(set_to_none=False)
    synchronize()
    return run


# No synchronisation


@every_run
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nobody_waits_for_the_gpu(rule: str, scaler: str | None, options: dict[str, Any]) -> None:
    """Not even when gradients or hyper-parameters have moved, and not to look at the result."""
    run, other = (started(rule, scaler, **options) for _ in range(2))
    grads = [[g.to(DEVICE) for g in grads_like(run.params, k, torch.float16)] for k in range(3)]
    grads[1][1] = grads[1][1].t().contiguous().t()  # to be copied into order

    def steps(run: Run) -> None:
        for step, own in enumerate(grads):
            for param, grad in zip(run.params, own, strict=True):
                param.grad = grad
            if "lr" in options:
                run.opt.param_groups[0]["lr"] = 0.02 * (step + 1)
            run.step()
            run.step()
            _ = run.opt.grad_norm, run.opt.clip_coef, run.opt.found_inf, run.opt.skipped_steps

    with no_sync():
        steps(run)
    steps(other)
    assert_runs_agree(run, other, "with and without a watch")


@pytest.mark.parametrize("n_steps", [3, 20])
def test_tables_on_their_way(n_steps: int) -> None:
    """The GPU is steps behind: the table of none of them is written over before it was read."""
    group = {"params": values_of([17, by_speed(CHUNK + 5, CHUNK + 5, 40)]), "lr": 0.01}
    twins = Twins("adamw", [group], max_grad_norm=1.0)
    twins.step(grads_like(twins.twin_params, 0))
    twins.check()
    with no_sync():
        for step in range(n_steps):
            twins.set(lr=0.01 * (1 + step % 7), weight_decay=0.02 * (step % 3))
            twins.opt.step()
            twins.twin.step()
    twins.check()


# No allocation


@every_run
def test_no_allocation_after_the_first_step(rule: str, scaler: str | None) -> None:
    """torch's own scaler allocates; what counts is the step inside it."""
    run, counts = started(rule, scaler), []
    run.opt.register_step_pre_hook(lambda *_: counts.append(-n_allocations()))
    run.opt.register_step_post_hook(lambda *_: counts.append(n_allocations()))
    for step in range(4):
        run.feed(step)
        run.opt.zero_grad(set_to_none=step % 2 == 0)  # new gradients in every second step
        run.backward()
        before = n_allocations()
        run.step()
        if scaler != "torch":
            assert n_allocations() == before, "scaler.step and scaler.update"
    assert len(counts) == 8 and sum(counts) == 0


def test_one_buffer_for_a_gradient_out_of_order() -> None:
    """The copy of a gradient with other strides is kept for the next step."""
    twins = Twins.of(PLAIN_CASES[0], [randn((37, 251), 1)], max_grad_norm=1.0)
    for step in range(4):
        twins.give([randn((251, 37), step + 2).t()])
        before = n_allocations()
        twins.opt.step()
        twins.twin.step()
        assert step == 0 or n_allocations() == before
        twins.check()


# Launches


def assert_launches(call: Callable[[], Any], count: int, tmp_path: Path) -> None:
    """Of which Triton's third is no kernel: the copy of the table, from pinned memory."""
    names = device_work(call, tmp_path)
    if names is None:
        return
    copies = [name for name in names if name.startswith("Memcpy")]
    assert len(names) == count and len(copies) == (count > 2 and backend() == "triton"), names
    assert all("HtoD" in name and "Pinned" in name for name in copies), copies


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_launches(rule: str, options: dict[str, Any], tmp_path: Path) -> None:
    run = started(rule, None, **options)
    assert_launches(run.opt.step, 2, tmp_path)


def test_two_launches_whatever_the_number_of_tensors_and_groups(tmp_path: Path) -> None:
    groups = [
        {"params": [randn(n % 50, n) for n in range(g, by_speed(1200, 40, 40), 12)], "lr": 0.01 * g}
        for g in range(1, 13)
    ]
    twins = Twins("adamw", groups, max_grad_norm=1.0)
    for step in range(2):
        twins.step(grads_like(twins.twin_params, step))
    twins.opt.step()
    assert_launches(twins.opt.step, 2, tmp_path)
    for _ in range(2):
        twins.twin.step()
    twins.check()


def test_two_launches_in_a_scaler_step(tmp_path: Path) -> None:
    run = started("adamw", "ours")
    assert_launches(lambda: run.scaler.step(run.opt), 2, tmp_path)
    run.scaler.update()


@pytest.mark.parametrize("what", ["gradient", "hyper-parameter"])
def test_what_has_moved_costs_one_launch_once(what: str, tmp_path: Path) -> None:
    run = started("adamw", None)
    old = [p.grad for p in run.params]  # lest new gradients get their addresses
    for param in run.params:
        param.grad = param.grad.clone()
    if what == "hyper-parameter":
        run.opt.step()
        run.opt.param_groups[0]["weight_decay"] = 0.25
    assert_launches(run.opt.step, 3, tmp_path)
    assert_launches(run.opt.step, 2, tmp_path)
    assert len(old) == len(run.params)


# Streams, threads


@parametrize("case", PLAIN_CASES)
@pytest.mark.parametrize("first_step_on", ["default", "side"])
def test_step_on_a_side_stream(case: OptimizerCase, first_step_on: str) -> None:
    """Gradients are written late on the side stream: a step anywhere else reads the old ones."""
    side = new_stream()
    twins = Twins.of(case, values_of([17, CHUNK + 5, 300]), max_grad_norm=1.0)
    if first_step_on == "default":
        twins.step(grads_like(twins.twin_params, 0))
    for step in range(1, 4):
        grads = grads_like(twins.twin_params, step)
        twins.give([torch.zeros_like(g) for g in grads])
        values = [moved(g, DEVICE) for g in grads]
        synchronize()
        with on_stream(side):
            place = current_place()
            keep_busy(0.05)
            for param, value in zip(twins.params, values, strict=True):
                param.grad.copy_(value)
            twins.opt.step()
            assert current_place() == place, "another stream or device is current after the step"
        wait_for(side)
        for param, grad in zip(twins.twin_params, grads, strict=True):
            set_grad(param, grad)
        twins.twin.step()
        twins.check()


def test_tables_outlive_the_steps_that_read_them() -> None:
    """A plan made on one stream, used on another, dropped: its memory is not handed out early."""
    side = new_stream()
    twins = Twins.of(
        PLAIN_CASES[0],
        values_of([n % 90 for n in range(by_speed(200, 200, 30))]),
        max_grad_norm=1.0,
    )
    grads = grads_like(twins.twin_params, 0)
    with on_stream(side):
        twins.give(grads)
        twins.opt.step()
    synchronize()
    keep_busy()
    twins.opt.step()  # on the default stream, not begun yet
    twins.opt._shared.drop_plans()
    with on_stream(side):  # zeros: a table read too late has no tensors rather than wild pointers
        others = [
            torch.zeros(n, dtype=torch.uint8, device=DEVICE) for n in 200 * [512, 4096, 16384]
        ]
    synchronize()
    assert not any(bool(other.any()) for other in others), "a step wrote into freed memory"
    for _ in range(2):
        twins.twin.step()
    twins.check()


def test_step_in_another_thread() -> None:
    """Where no device was ever made current."""
    twins = Twins.of(PLAIN_CASES[0], values_of([17, CHUNK + 5]), max_grad_norm=1.0)
    for step in range(3):
        twins.give(grads_like(twins.twin_params, step))
        synchronize()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(twins.opt.step).result()
        twins.twin.step()
        synchronize()
        twins.check()
