"""Nobody waits, nothing is allocated; side streams and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import CHUNK, PLAIN_CASES, OptimizerCase, parametrize
from gpu_helpers import (
    by_speed,
    current_place,
    device,
    keep_busy,
    moved,
    n_allocations,
    new_stream,
    no_sync,
    on_gpu,
    on_stream,
    synchronize,
    wait_for,
)
from gpu_runs import OPTIONS, RULES, Run, assert_runs_agree, started
from gpu_twins import Twins, grads_like, values_of
from harness import randn, set_grad

runner = on_gpu()

SCALERS = [None, "torch", "ours"]
every_run = pytest.mark.parametrize(
    ("rule", "scaler"), [(rule, scaler) for rule in RULES for scaler in SCALERS], ids=str
)


# ---- no synchronisation -------------------------------------------------------------------------


@every_run
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nobody_waits_for_the_gpu(rule: str, scaler: str | None, options: dict[str, Any]) -> None:
    """Not even when gradients or hyper-parameters have moved, and not to look at the result."""
    run, other = (started(rule, scaler, **options) for _ in range(2))
    grads = [[g.to(device()) for g in grads_like(run.params, k, torch.float16)] for k in range(3)]
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
            twins.step()
    twins.check()


# ---- no allocation ------------------------------------------------------------------------------


@every_run
def test_no_allocation_after_the_first_step(rule: str, scaler: str | None) -> None:
    """torch's own scaler allocates; what counts is the step inside it. With hooks a scaler would
    unscale first, unless told that they know scaled gradients."""
    run, counts = started(rule, scaler, amp_scaling=True), []
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
        twins.step()
        assert step == 0 or n_allocations() == before
        twins.check()


# ---- streams, threads ---------------------------------------------------------------------------


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
        values = [moved(g, device()) for g in grads]
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
            torch.zeros(n, dtype=torch.uint8, device=device()) for n in 200 * [512, 4096, 16384]
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
