"""Whole iterations as CUDA graphs: what a replay computes is what the eager run computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_helpers
import pytest
import torch
from cases import FLOATS, parametrize
from gpu_helpers import (
    DEVICE,
    REAL,
    backend,
    by_speed,
    captured,
    new_stream,
    on_stream,
    real_gpu,
    wait_for,
)
from gpu_runs import INIT_SCALE, RULES, SCALERS, Run, assert_runs_agree, make_scaler
from gpu_twins import assert_pairs_agree, copies, everything
from harness import FUSED, randn
from torch import Tensor

import fusedopt

pytestmark = gpu_helpers.on_gpu
device = gpu_helpers.device_fixture()

WARMUP = 3
N_REPLAYS = by_speed(100, 36, 6)
BAD_REPLAYS = {2: torch.inf, 3: torch.nan, 17: -torch.inf, 33: torch.inf, 34: torch.inf}
BAD_REPLAYS = by_speed(BAD_REPLAYS, BAD_REPLAYS, {3: torch.inf, 4: torch.nan})


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
    for step in range(by_speed(20, 20, 7)):
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
    for step in range(by_speed(20, 20, 6)):
        for run in (graphed, eager):
            run.feed(step, BAD_REPLAYS.get(step))
        replay()
        iteration(eager)
        assert_runs_agree(graphed, eager, f"replay {step}")


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
    opts = [
        FUSED["adamw"](p, lr=0.01, max_grad_norm=1.0, backend=backend()) for p in (params, twin)
    ]
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
    n_replays, bad = by_speed((30, (4, 5, 21)), (30, (4, 5, 21)), (8, (2, 3, 5)))
    for step in range(n_replays):
        inputs.copy_(randn((16, 24), step + 2))
        if step in bad:
            inputs[3, 7] = torch.inf
        replay()
        follow()
        assert_pairs_agree(everything(opts[0], params, opts[1], twin))
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert opts[0].skipped_steps.item() >= 3
    assert any(bool(g.any()) for g in seen[-1]), "the model had no gradient"


def test_the_example_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    example = compile(text.split("```python\n")[1].split("```")[0], "docs/cuda.md", "exec")
    if not REAL:
        return
    monkeypatch.setenv("FUSEDOPT_BACKEND", backend())
    model = torch.nn.Linear(24, 8).to(DEVICE)
    batch = randn((16, 24), 1).to(DEVICE), randn((16, 8), 2).to(DEVICE)
    names: dict[str, Any] = {
        "torch": torch, "fusedopt": fusedopt, "model": model, "next_batch": lambda: batch,
        "batches": [batch] * 5, "loss_fn": torch.nn.functional.mse_loss, "next_lr": lambda: 0.01,
    }  # fmt: skip
    exec(example, names)
    steps = [names["opt"].state[p]["step"].item() for p in model.parameters()]
    assert steps == [8.0 - names["opt"].skipped_steps.item()] * 2 and steps[0] > 0
