"""Whole iterations as CUDA graphs: what a replay computes is what the eager run computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_helpers
import pytest
import torch
from cases import FLOATS, parametrize
from gpu_helpers import BACKEND, DEVICE, REAL, captured, new_stream, on_stream, real_gpu, wait_for
from gpu_runs import INIT_SCALE, RULES, SCALERS, Run, assert_runs_agree, make_scaler
from gpu_twins import assert_pairs_agree, copies, everything
from harness import FUSED, make_param, randn
from torch import Tensor

import fusedopt

pytestmark = gpu_helpers.on_gpu
device = pytest.fixture(autouse=True)(gpu_helpers.on_device)

N_REPLAYS = 100 if REAL else 36
WARMUP = 3
BAD_REPLAYS = {2: torch.inf, 3: torch.nan, 17: -torch.inf, 33: torch.inf, 34: torch.inf}


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("rule", RULES)
@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_hundred_replays(rule: str, scaler: str, dtype: torch.dtype, set_to_none: bool) -> None:
    """With back-off, growth, a learning rate that moves, and clipping on and off by the norm."""
    graphed, eager = Run(rule, scaler, dtype), Run(rule, scaler, dtype)
    for run in (graphed, eager):
        run.feed(0)
    replay = captured(lambda: graphed.iteration(set_to_none), WARMUP)
    for _ in range(WARMUP):
        eager.iteration(set_to_none)
    scales = set()
    for step in range(N_REPLAYS):
        for run in (graphed, eager):
            run.feed(step, BAD_REPLAYS.get(step))
            run.lr.fill_(0.01 / (1 + step % 7))
        replay()
        eager.iteration(set_to_none)
        if step < 10 or step % 10 == 0 or step in BAD_REPLAYS:
            assert_runs_agree(graphed, eager, f"replay {step}")
        scales.add(eager.scaler.get_scale())
    assert_runs_agree(graphed, eager, "the last replay")
    assert graphed.opt.skipped_steps.item() >= len(BAD_REPLAYS)
    assert min(scales) < INIT_SCALE < max(scales)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": None}, {"skip_nonfinite": True}], ids=str
)
def test_without_a_scaler(rule: str, options: dict[str, Any]) -> None:
    graphed, eager = (Run(rule, None, **options) for _ in range(2))
    replay = captured(graphed.iteration, WARMUP)
    for _ in range(WARMUP):
        eager.iteration()
    for step in range(20):
        for run in (graphed, eager):
            run.feed(step, torch.inf if step == 5 and "skip_nonfinite" in options else None)
        replay()
        eager.iteration()
        assert_runs_agree(graphed, eager, f"replay {step}")


def test_unscale_and_clip_by_hand() -> None:
    """torch's recipe, in one graph: the gradients are unscaled when the step sees them."""

    def iteration(run: Run) -> None:
        run.opt.zero_grad()
        run.backward()
        run.scaler.unscale_(run.opt)
        torch.nn.utils.clip_grad_norm_(run.params, 1.0, foreach=False)
        run.step()

    graphed, eager = (Run("adamw", "torch", max_grad_norm=None) for _ in range(2))
    replay = captured(lambda: iteration(graphed), WARMUP)
    for _ in range(WARMUP):
        iteration(eager)
    for step in range(20):
        for run in (graphed, eager):
            run.feed(step, BAD_REPLAYS.get(step))
        replay()
        iteration(eager)
        assert_runs_agree(graphed, eager, f"replay {step}")


# Eager steps and replays in one run: the plan's tables on the device are those of the last one


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


@pytest.mark.parametrize("n_tensors", [1, 1200 if REAL else 60])
def test_replay_of_many_tensors(n_tensors: int) -> None:
    """The table of gradients travels in the parameters of as many kernels as it takes."""
    values = [randn(1 + k % 13, k) for k in range(n_tensors)]
    grads = [
        [randn(1 + k % 13, 50 * s + k + 9).to(DEVICE) for k in range(n_tensors)] for s in (0, 1)
    ]
    params = [make_param(v.to(DEVICE)) for v in values]
    twins = list(copies(params))
    opts = [FUSED["adamw"](p, lr=0.1, max_grad_norm=1.0, backend=BACKEND) for p in (params, twins)]
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
    graphed.opt._drop_plan()
    # zeros: a table of them has no tensors in it rather than wild pointers
    others = [torch.zeros(n, dtype=torch.uint8, device=DEVICE) for n in 200 * [512, 4096, 16384]]
    for step in range(4):
        for run in (graphed, eager):
            run.feed(step)
        replay()
        eager.iteration()
        assert_runs_agree(graphed, eager, f"replay {step}")
    assert not any(bool(other.any()) for other in others), "a replay wrote into freed memory"


# What a capture freezes, and what it needs


@real_gpu
def test_a_number_is_baked_in() -> None:
    """A float lr is read when the graph is captured; a tensor is read by every replay."""
    graphed, eager = (Run("sgd", None, lr=0.25, max_grad_norm=None) for _ in range(2))
    replay = captured(graphed.iteration, WARMUP)
    for _ in range(WARMUP):
        eager.iteration()
    graphed.opt.param_groups[0]["lr"] = 99.0
    for step in range(3):
        for run in (graphed, eager):
            run.feed(step)
        replay()
        eager.iteration()
        assert_runs_agree(graphed, eager, f"replay {step}")


@pytest.mark.parametrize("rule", RULES)
def test_init_state_takes_the_place_of_warm_up_steps(rule: str) -> None:
    """Then only backward() needs a warm-up; the first step of all is a replayed one."""
    graphed, eager = Run(rule, "ours"), Run(rule, "ours")
    graphed.opt.init_state()
    side = new_stream()
    with on_stream(side):
        for _ in range(WARMUP):
            graphed.opt.zero_grad()
            graphed.backward()
    wait_for(side)
    replay = captured(graphed.iteration, 0)
    for step in range(8):
        for run in (graphed, eager):
            run.feed(step, torch.inf if step == 2 else None)
        replay()
        eager.iteration()
        assert_runs_agree(graphed, eager, f"replay {step}")


def test_autocast_model() -> None:
    """fp16 autocast and a real model; the eager twin gets the gradients that each replay left."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(24, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    model.to(DEVICE)
    params, inputs = list(model.parameters()), torch.zeros(16, 24, device=DEVICE)
    twin = list(copies(params))
    opts = [FUSED["adamw"](p, lr=0.01, max_grad_norm=1.0, backend=BACKEND) for p in (params, twin)]
    scalers = [make_scaler("ours") for _ in range(2)]
    autocast = torch.autocast(
        DEVICE.type, dtype=torch.float16 if REAL else torch.bfloat16, cache_enabled=False
    )
    seen: list[list[Tensor]] = []

    def iteration() -> None:
        opts[0].zero_grad()
        with autocast:
            loss = model(inputs).float().square().mean()
        scalers[0].scale(loss).backward()
        scalers[0].step(opts[0])
        scalers[0].update()

    def follow() -> None:
        for param, ours in zip(twin, params, strict=True):
            param.grad = ours.grad.clone()
        scalers[1].step(opts[1])
        scalers[1].update()
        seen.append([p.grad for p in twin])

    def warm_up() -> None:
        iteration()
        follow()

    inputs.copy_(randn((16, 24), 1))
    side = new_stream()
    with on_stream(side):
        for _ in range(WARMUP):
            warm_up()
    wait_for(side)
    replay = captured(iteration, 0)
    for step in range(30):
        inputs.copy_(randn((16, 24), step + 2))
        if step in (4, 5, 21):
            inputs[3, 7] = torch.inf
        replay()
        follow()
        assert_pairs_agree(everything(opts[0], params, opts[1], twin))
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert opts[0].skipped_steps.item() >= 3
    assert any(bool(g.any()) for g in seen[-1]), "the model had no gradient"


def test_the_example_of_the_docs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "cuda.md").read_text()
    example = compile(text.split("```python\n")[1].split("```")[0], "docs/cuda.md", "exec")
    if not REAL:
        return
    model = torch.nn.Linear(24, 8).to(DEVICE)
    batch = randn((16, 24), 1).to(DEVICE), randn((16, 8), 2).to(DEVICE)
    names: dict[str, Any] = {
        "torch": torch, "fusedopt": fusedopt, "model": model, "next_batch": lambda: batch,
        "batches": [batch] * 5, "loss_fn": torch.nn.functional.mse_loss, "next_lr": lambda: 0.01,
    }  # fmt: skip
    exec(example, names)
    steps = [names["opt"].state[p]["step"].item() for p in model.parameters()]
    assert steps == [8.0 - names["opt"].skipped_steps.item()] * 2 and steps[0] > 0
