"""Eager steps, replays and several graphs in one run: the plan's tables on the device are those of
the last one that wrote them."""

from __future__ import annotations

from pathlib import Path

import gpu_helpers
import pytest
import torch
from gpu_helpers import DEVICE, REAL, backend, by_speed, captured, device_work, real_gpu
from gpu_runs import Run, assert_runs_agree
from gpu_twins import assert_pairs_agree, copies, everything
from harness import FUSED, make_param, randn
from torch import Tensor

pytestmark = gpu_helpers.on_gpu
device = gpu_helpers.device_fixture()

WARMUP = 3


def test_eager_steps_between_replays() -> None:
    """A replay brings its own gradient addresses; the eager step after it must notice."""
    mixed, eager = Run("adamw", "ours"), Run("adamw", "ours")
    replay = captured(mixed.iteration, WARMUP)
    static = [p.grad for p in mixed.params]
    for _ in range(WARMUP):
        eager.iteration()
    # "kept": an eager step on the gradients of another eager step, with replays in between
    kept: list[Tensor | None] = [None] * len(static)
    for step, kind in enumerate(["eager", "replay", "kept", "kept", "replay", "replay", "kept"]):
        for run in (mixed, eager):
            run.feed(step)
        if kind == "replay":
            for param, grad in zip(mixed.params, static, strict=True):
                param.grad = grad
            replay()
        else:
            for param, grad in zip(mixed.params, kept, strict=True):
                param.grad = grad
            mixed.opt.zero_grad(set_to_none=kind == "eager")
            mixed.backward()
            mixed.step()
            kept = [p.grad for p in mixed.params]
        eager.iteration()
        assert_runs_agree(mixed, eager, f"step {step}, {kind}")


@pytest.mark.parametrize("lr_in_tensor", [True, False])
def test_eager_step_before_the_first_replay(lr_in_tensor: bool) -> None:
    """What was captured has not run: an eager step cannot count on it."""
    options = {} if lr_in_tensor else {"lr": 0.02}
    mixed, eager = (Run("adamw", "ours", **options) for _ in range(2))
    replay = captured(mixed.iteration, WARMUP)
    for _ in range(WARMUP):
        eager.iteration()
    for step in range(6):
        for run in (mixed, eager):
            run.feed(step)
        if step == 3:
            replay()
        else:
            # the static gradients of the capture, which an eager backward fills
            mixed.iteration(set_to_none=False)
        eager.iteration()
        assert_runs_agree(mixed, eager, f"step {step}")


def test_two_graphs_of_one_optimizer() -> None:
    """Say, with and without gradient accumulation: each replay uses its own gradients."""
    graphed, eager = Run("adamw", "ours"), Run("adamw", "ours")

    def accumulated(run: Run) -> None:
        run.opt.zero_grad()
        run.backward()
        run.backward()
        run.step()

    replays = [captured(graphed.iteration, WARMUP), captured(lambda: accumulated(graphed), WARMUP)]
    for iterate in (eager.iteration, lambda: accumulated(eager)):
        for _ in range(WARMUP):
            iterate()
    for step in range(12):
        for run in (graphed, eager):
            run.feed(step, torch.inf if step == 4 else None)
        which = step // 2 % 2
        replays[which]()
        accumulated(eager) if which else eager.iteration()
        assert_runs_agree(graphed, eager, f"step {step}, graph {which}")


@pytest.mark.parametrize("n_tensors", [1, by_speed(1200, 60, 20)])
def test_replay_of_many_tensors(n_tensors: int) -> None:
    """The table of gradients travels in the parameters of as many kernels as it takes."""
    values = [randn(1 + k % 13, k) for k in range(n_tensors)]
    grads = [
        [randn(1 + k % 13, 50 * s + k + 9).to(DEVICE) for k in range(n_tensors)] for s in (0, 1)
    ]
    params = [make_param(v.to(DEVICE)) for v in values]
    twins = list(copies(params))
    opts = [
        FUSED["adamw"](p, lr=0.1, max_grad_norm=1.0, backend=backend()) for p in (params, twins)
    ]
    static = [g.clone() for g in grads[0]]
    for param, grad in zip(params, static, strict=True):
        param.grad = grad
    replay = captured(opts[0].step, 2)
    for step in range(6):
        if step >= 2:
            torch._foreach_copy_(static, grads[step % 2])
            replay()
        for param, grad in zip(twins, grads[step % 2 if step >= 2 else 0], strict=True):
            param.grad = grad
        opts[1].step()
    assert_pairs_agree(everything(opts[0], params, opts[1], twins))


def test_a_graph_outlives_the_plan_it_was_captured_with() -> None:
    """The plan is made anew, say for another param group; its memory is not handed out."""
    graphed, eager = Run("adamw", "ours"), Run("adamw", "ours")
    replay = captured(graphed.iteration, WARMUP)
    for _ in range(WARMUP):
        eager.iteration()
    graphed.opt._shared.drop_plans()
    # zeros: a table of them has no tensors in it rather than wild pointers
    others = [torch.zeros(n, dtype=torch.uint8, device=DEVICE) for n in 200 * [512, 4096, 16384]]
    for step in range(4):
        for run in (graphed, eager):
            run.feed(step)
        replay()
        eager.iteration()
        assert_runs_agree(graphed, eager, f"replay {step}")
    assert not any(bool(other.any()) for other in others), "a replay wrote into freed memory"


@pytest.mark.parametrize("n_graphs", [2, 5])
def test_captures_in_a_row(n_graphs: int) -> None:
    """No step between them, and each with a table of its own; then replays and eager steps."""
    graphed, eager = Run("adamw", "ours"), Run("adamw", "ours")
    for run in (graphed, eager):
        for _ in range(WARMUP):
            run.iteration()

    def decay(run: Run, which: int) -> None:
        run.opt.param_groups[0]["weight_decay"] = 0.1 * (which + 1)

    replays = []
    for which in range(n_graphs):
        decay(graphed, which)
        replays.append(captured(graphed.iteration, 0))
    last = n_graphs - 1
    for step, (which, kind) in enumerate(
        [(0, "replay"), (last, "replay"), (0, "eager"), (0, "replay"), (1, "eager"),
         (1, "eager"), (last, "replay"), (1, "replay"), (0, "replay")]
    ):  # fmt: skip
        for run in (graphed, eager):
            run.feed(step, torch.inf if step == 6 else None)
            decay(run, which)
        if kind == "replay":
            decay(graphed, 50 if REAL else which)  # the graph has its own
            replays[which]()
        else:
            graphed.iteration()
        eager.iteration()
        assert_runs_agree(graphed, eager, f"step {step}, {kind} of {which}")


@real_gpu
def test_a_replay_writes_its_table(tmp_path: Path) -> None:
    """CUDA's in a kernel; Triton's is a copy from pinned memory, a node of the graph."""
    run = Run("adamw", None)
    run.feed(0)
    run.iteration()
    names = device_work(captured(run.opt.step, 1), tmp_path)
    assert names is not None and len(names) == 3, names
    is_copy = ["Memcpy HtoD" in name and "Pinned" in name for name in names]
    assert is_copy == [backend() == "triton", False, False], names
