"""A training run in small, for what has to agree between two ways of running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import CHUNK
from gpu_helpers import backend, by_speed, captured, device, synchronize
from gpu_twins import assert_pairs_agree, everything
from harness import FUSED, make_param, randn
from torch import Tensor

import fusedopt

SCALERS: dict[str, Callable[..., Any]] = {
    "torch": lambda **kw: torch.amp.GradScaler(device().type, **kw),
    "ours": lambda **kw: fusedopt.GradScaler(device().type, **kw),
    "converted": lambda **kw: fusedopt.fuse_scaler(torch.amp.GradScaler(device().type, **kw)),
}
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, "amsgrad": True},
    "sgd": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
}
OPTIONS: list[dict[str, Any]] = [{}, {"max_grad_norm": None}, {"lr": 0.01, "skip_nonfinite": True}]
INIT_SCALE = 2.0**10
WARMUP = 3


def make_scaler(name: str) -> Any:
    scaler = SCALERS[name](init_scale=INIT_SCALE, growth_interval=6)
    scaler.scale(torch.zeros((), device=device()))  # makes the scale, outside a capture
    return scaler


class Run:
    """Params, inputs that keep their place, an optimizer and a scaler; `iteration` uses them all.

    The gradient of a param is (input + 0.1 param) * scale: elementwise, so that two runs agree to
    the bit, and overflowing in half precision when the scale has grown.
    """

    def __init__(
        self, rule: str, scaler: str | None, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        large = by_speed(CHUNK + 3, CHUNK + 3, 33)
        shapes: list[tuple[int, ...]] = [(5,), (37, 11), (large,), (), (0,)]
        self.params: list[Tensor] = [
            make_param(randn(shape, k, dtype).to(device())) for k, shape in enumerate(shapes)
        ]
        self.inputs = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.lr = torch.tensor(0.01).to(device())
        if scaler == "torch":  # which else unscales by itself, and waits for the answer
            options = {"amp_scaling": True, **options}
        options = {"lr": self.lr, "max_grad_norm": 3.0, "backend": backend(), **options}
        self.opt = FUSED[rule](self.params, **RULES[rule], **options)
        self.scaler = None if scaler is None else make_scaler(scaler)

    def feed(self, step: int, bad: float | None = None) -> None:
        """New values where the inputs are; `bad` goes into the last element of one of them."""
        for k, tensor in enumerate(self.inputs):
            generator = torch.Generator().manual_seed(1000 * step + k)
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if bad is not None:
            self.inputs[step % 3].view(-1)[-1] = bad

    def backward(self) -> None:
        terms = [
            (p * x).sum() + 0.05 * (p * p).sum()
            for p, x in zip(self.params, self.inputs, strict=True)
        ]
        loss = torch.stack([t.float() for t in terms]).sum()
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()

    def step(self) -> None:
        if self.scaler is None:
            self.opt.step()
        else:
            self.scaler.step(self.opt)
            self.scaler.update()

    def iteration(self, set_to_none: bool = True) -> None:
        self.opt.zero_grad(set_to_none=set_to_none)
        self.backward()
        self.step()


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


class Graphed:
    """A run that is captured and replayed, and one that takes the same steps eagerly."""

    def __init__(
        self,
        *arguments: Any,
        iteration: Callable[[Run], None] = Run.iteration,
        warmup: int = WARMUP,
        **options: Any,
    ) -> None:
        self.run, self.eager = (Run(*arguments, **options) for _ in range(2))
        self.replay = self.capture(iteration, warmup)

    def capture(self, iteration: Callable[[Run], None], warmup: int) -> Callable[[], None]:
        """Gives the replay. The eager run takes the steps of the warm-up, too."""
        replay = captured(lambda: iteration(self.run), warmup)
        for _ in range(warmup):
            iteration(self.eager)
        self.iteration = iteration
        return replay

    def feed(self, step: int, bad: float | None = None) -> None:
        for run in (self.run, self.eager):
            run.feed(step, bad)

    def step(
        self, step: int, bad: float | None = None, take: Callable[[], None] | None = None
    ) -> None:
        """The replay, or what `take` does instead, against an eager iteration."""
        self.feed(step, bad)
        (take or self.replay)()
        self.iteration(self.eager)
        self.check(f"step {step}")

    def check(self, label: str) -> None:
        assert_runs_agree(self.run, self.eager, label)


def assert_runs_agree(run: Run, other: Run, label: str) -> None:
    pairs = everything(run.opt, run.params, other.opt, other.params)
    if run.scaler is not None and other.scaler is not None:
        for name in ("_scale", "_growth_tracker"):
            pairs.append((name, getattr(run.scaler, name), getattr(other.scaler, name)))
    assert_pairs_agree([(f"{label}: {name}", ours, others) for name, ours, others in pairs])
