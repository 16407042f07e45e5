"""Whole iterations as CUDA graphs: what replays compute, also with eager steps and other graphs
between them, is what the eager run computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FLOATS, parametrize
from gpu_helpers import (
    backend,
    by_speed,
    captured,
    device,
    device_work,
    new_stream,
    on_gpu,
    on_stream,
    only_on_a_gpu,
    real,
    wait_for,
)
from gpu_runs import INIT_SCALE, RULES, SCALERS, WARMUP, Graphed, Run, make_scaler
from gpu_twins import assert_pairs_agree, copies, everything
from harness import FUSED, make_param, randn
from torch import Tensor

import fusedopt

runner = on_gpu()

INF, NAN = torch.inf, torch.nan


def bad_replays() -> dict[int, float]:
    many = {2: INF, 3: NAN, 17: -INF, 33: INF, 34: INF}
    return by_speed(many, many, {3: INF, 4: NAN})


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("rule", RULES)
@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_hundred_replays(rule: str, scaler: str, dtype: torch.dtype, set_to_none: bool) -> None:
    """With back-off, growth, a learning rate that moves, and clipping on and off by the norm."""
    pair = Graphed(rule, scaler, dtype, iteration=lambda run: run.iteration(set_to_none))
    bad, scales = bad_replays(), set()
    for step in range(by_speed(100, 36, 6)):
        for run in (pair.run, pair.eager):
            run.lr.fill_(0.01 / (1 + step % 7))
        pair.step(step, bad.get(step))
        scales.add(pair.eager.scaler.get_scale())
    assert pair.run.opt.skipped_steps.item() >= len(bad)
    assert min(scales) < INIT_SCALE < max(scales)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": None}, {"skip_nonfinite": True}], ids=str
)
def test_without_a_scaler(rule: str, options: dict[str, Any]) -> None:
    pair = Graphed(rule, None, **options)
    for step in range(by_speed(20, 20, 7)):
        pair.step(step, INF if step == 5 and "skip_nonfinite" in options else None)


def test_unscale_and_clip_by_hand() -> None:
    """torch's recipe, in one graph: the gradients are unscaled when the step sees them."""

    def iteration(run: Run) -> None:
        run.opt.zero_grad()
        run.backward()
        run.scaler.unscale_(run.opt)
        torch.nn.utils.clip_grad_norm_(run.params, 1.0, foreach=False)
        run.step()

    pair = Graphed("adamw", "torch", max_grad_norm=None, iteration=iteration)
    for step in range(by_speed(20, 20, 6)):
        pair.step(step, bad_replays().get(step))


# ---- what a capture freezes, and what it needs --------------------------------------------------


def test_a_number_is_baked_in() -> None:
    """A float lr is read when the graph is captured; a tensor is read by every replay."""
    only_on_a_gpu()
    pair = Graphed("sgd", None, lr=0.25, max_grad_norm=None)
    pair.run.opt.param_groups[0]["lr"] = 99.0
    for step in range(3):
        pair.step(step)


@pytest.mark.parametrize("rule", RULES)
def test_init_state_takes_the_place_of_warm_up_steps(rule: str) -> None:
    """Then only backward() needs a warm-up; the first step of all is a replayed one."""
    pair = Graphed(rule, "ours", iteration=lambda run: None, warmup=0)
    pair.run.opt.init_state()
    side = new_stream()
    with on_stream(side):
        for _ in range(WARMUP):
            pair.run.opt.zero_grad()
            pair.run.backward()
    wait_for(side)
    replay = pair.capture(Run.iteration, 0)
    for step in range(8):
        pair.step(step, INF if step == 2 else None, replay)


def test_autocast_model() -> None:
    """fp16 autocast and a real model; the eager twin gets the gradients that each replay left."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(24, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    model.to(device())
    params, inputs = list(model.parameters()), torch.zeros(16, 24, device=device())
    twin = list(copies(params))
    opts = [
        FUSED["adamw"](p, lr=0.01, max_grad_norm=1.0, backend=backend()) for p in (params, twin)
    ]
    scalers = [make_scaler("ours") for _ in range(2)]
    half = torch.float16 if real() else torch.bfloat16
    autocast = torch.autocast(device().type, dtype=half, cache_enabled=False)

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

    inputs.copy_(randn((16, 24), 1))
    side = new_stream()
    with on_stream(side):
        for _ in range(WARMUP):
            iteration()
            follow()
    wait_for(side)
    replay = captured(iteration, 0)
    n_replays, bad = by_speed((30, (4, 5, 21)), (30, (4, 5, 21)), (8, (2, 3, 5)))
    for step in range(n_replays):
        inputs.copy_(randn((16, 24), step + 2))
        if step in bad:
            inputs[3, 7] = INF
        replay()
        follow()
        assert_pairs_agree(everything(opts[0], params, opts[1], twin))
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert opts[0].skipped_steps.item() >= 3
    assert any(bool(p.grad.any()) for p in twin), "the model had no gradient"


def test_the_example_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    example = compile(text.split("```python\n")[1].split("```")[0], "docs/cuda.md", "exec")
    only_on_a_gpu()
    monkeypatch.setenv("FUSEDOPT_BACKEND", backend())
    model = torch.nn.Linear(24, 8).to(device())
    batch = randn((16, 24), 1).to(device()), randn((16, 8), 2).to(device())
    names: dict[str, Any] = {
        "torch": torch, "fusedopt": fusedopt, "model": model, "next_batch": lambda: batch,
        "batches": [batch] * 5, "loss_fn": torch.nn.functional.mse_loss, "next_lr": lambda: 0.01,
    }  # fmt: skip
    exec(example, names)
    steps = [names["opt"].state[p]["step"].item() for p in model.parameters()]
    assert steps == [8.0 - names["opt"].skipped_steps.item()] * 2 and steps[0] > 0


# ---- eager steps and other graphs between replays -----------------------------------------------
# The plan's tables on the device are those of the last one that wrote them.


def test_eager_steps_between_replays() -> None:
    """A replay brings its own gradient addresses; the eager step after it must notice."""
    pair = Graphed("adamw", "ours")
    run = pair.run
    static = [p.grad for p in run.params]
    # "kept": an eager step on the gradients of another eager step, with replays in between
    kept: list[Tensor | None] = [None] * len(static)

    def take(kind: str) -> None:
        nonlocal kept
        for param, grad in zip(run.params, static if kind == "replay" else kept, strict=True):
            param.grad = grad
        if kind == "replay":
            pair.replay()
            return
        run.iteration(set_to_none=kind == "eager")
        kept = [p.grad for p in run.params]

    for step, kind in enumerate(["eager", "replay", "kept", "kept", "replay", "replay", "kept"]):
        pair.step(step, take=lambda kind=kind: take(kind))


@pytest.mark.parametrize("lr_in_tensor", [True, False])
def test_eager_step_before_the_first_replay(lr_in_tensor: bool) -> None:
    """What was captured has not run: an eager step cannot count on it."""
    pair = Graphed("adamw", "ours", **({} if lr_in_tensor else {"lr": 0.02}))
    for step in range(6):
        # the static gradients of the capture, which an eager backward fills
        pair.step(step, take=None if step == 3 else lambda: pair.run.iteration(set_to_none=False))


def test_two_graphs_of_one_optimizer() -> None:
    """Say, with and without gradient accumulation: each replay uses its own gradients."""

    def accumulated(run: Run) -> None:
        run.opt.zero_grad()
        run.backward()
        run.backward()
        run.step()

    pair = Graphed("adamw", "ours")
    iterations = (Run.iteration, accumulated)
    replays = [pair.replay, pair.capture(accumulated, WARMUP)]
    for step in range(12):
        which = step // 2 % 2
        pair.iteration = iterations[which]
        pair.step(step, INF if step == 4 else None, replays[which])


@pytest.mark.parametrize("many", [False, True])
def test_replay_of_many_tensors(many: bool) -> None:
    """The table of gradients travels in the parameters of as many kernels as it takes."""
    n_tensors = by_speed(1200, 60, 20) if many else 1
    lengths = [1 + k % 13 for k in range(n_tensors)]
    grads = [[randn(n, 50 * s + k + 9).to(device()) for k, n in enumerate(lengths)] for s in (0, 1)]
    params = [make_param(randn(n, k).to(device())) for k, n in enumerate(lengths)]
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
    pair = Graphed("adamw", "ours")
    pair.run.opt._shared.drop_plans()
    # zeros: a table of them has no tensors in it rather than wild pointers
    others = [torch.zeros(n, dtype=torch.uint8, device=device()) for n in 200 * [512, 4096, 16384]]
    for step in range(4):
        pair.step(step)
    assert not any(bool(other.any()) for other in others), "a replay wrote into freed memory"


@pytest.mark.parametrize("n_graphs", [2, 5])
def test_captures_in_a_row(n_graphs: int) -> None:
    """No step between them, and each with a table of its own; then replays and eager steps."""
    pair = Graphed("adamw", "ours")
    run = pair.run

    def decay(run: Run, which: int) -> None:
        run.opt.param_groups[0]["weight_decay"] = 0.1 * (which + 1)

    replays = []
    for which in range(n_graphs):
        decay(run, which)
        replays.append(pair.capture(Run.iteration, 0))
    last = n_graphs - 1
    for step, (which, kind) in enumerate(
        [(0, "replay"), (last, "replay"), (0, "eager"), (0, "replay"), (1, "eager"),
         (1, "eager"), (last, "replay"), (1, "replay"), (0, "replay")]
    ):  # fmt: skip
        for one in (run, pair.eager):
            decay(one, which)
        if kind == "replay":
            decay(run, 50 if real() else which)  # the graph has its own
        take = replays[which] if kind == "replay" else run.iteration
        pair.step(step, INF if step == 6 else None, take)


def test_a_replay_writes_its_table(tmp_path: Path) -> None:
    """CUDA's in a kernel; Triton's is a copy from pinned memory, a node of the graph."""
    only_on_a_gpu()
    run = Run("adamw", None)
    run.feed(0)
    run.iteration()
    names = device_work(captured(run.opt.step, 1), tmp_path)
    assert len(names) == 3, names
    is_copy = ["Memcpy HtoD" in name and "Pinned" in name for name in names]
    assert is_copy == [backend() == "triton", False, False], names
