"""What is compared: everything between "backward left scaled grads in .grad" and "scaler updated".

Every pipeline computes the same step: unscale, skip if not finite, clip the global norm to
`MAX_GRAD_NORM`, update. `compare_steps` holds two of them to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.param_sets import GRAD_SCALE, Gradients

MAX_GRAD_NORM = 1.0
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
NEVER = 10**9  # growth_interval: the scale stays, so every step is the same work

# Two pipelines agree if no element differs by more than this share of the farthest move of any
# element, plus RTOL of its own value. Norms summed in different orders differ by about 1e-5.
MOVE_TOLERANCE = 1e-3
RTOL = 4 * torch.finfo(torch.float32).eps
# Pipelines that are allowed more, for half params without masters or small states, are held to this
# share of the mean move too. Rounding params to bf16 is 0.05 to 0.10 of it, 8-bit states are 0.03,
# a step without clipping 0.14.
MEAN_TOLERANCE = 0.12
CHECKED_FACTORS = (1.0, 2.0**-5)  # clipped, then not: AdamW would hide one constant wrong factor


class Unavailable(Exception):
    """This pipeline cannot run here."""


class DifferentStep(Exception):
    """Two pipelines do not compute the same step, so comparing their times says nothing."""


class Pipeline:
    """An optimizer and its scaler over params of its own, driven as torch's documentation says."""

    def __init__(
        self,
        params: list[Tensor],
        grads: Gradients,
        make_optimizer: Callable[[list[Tensor]], Any],
        make_scaler: Callable[..., torch.amp.GradScaler] = torch.amp.GradScaler,
    ) -> None:
        self.params, self._grads = params, grads
        self.optimizer = make_optimizer(params)
        device = params[0].device
        self.scaler = make_scaler(device.type, init_scale=GRAD_SCALE, growth_interval=NEVER)
        self.scaler.scale(torch.ones((), device=device))  # the scale is made at the first use

    def prepare(self) -> None:
        self._grads.backward(self.params)

    def step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def updated(self) -> list[Tensor]:
        """The fp32 tensors the update acts on: the params, or their masters."""
        return self.params

    def describe(self) -> str:
        return ""


class TorchOpsMasters(Pipeline):
    """fp32 masters of half params by hand: grads cast up, stock step on the masters, cast down.

    The up-cast gradients have buffers of their own, which is faster than new tensors every step.
    """

    def __init__(self, params: list[Tensor], grads: Gradients, make_optimizer: Any) -> None:
        masters: list[Tensor] = [torch.nn.Parameter(param.detach().float()) for param in params]
        self.master_grads = [torch.empty_like(master) for master in masters]
        for master, grad in zip(masters, self.master_grads, strict=True):
            master.grad = grad
        super().__init__(masters, grads, make_optimizer)
        self.masters, self.params = masters, params

    @torch.no_grad()
    def step(self) -> None:
        grads = [param.grad for param in self.params if param.grad is not None]
        torch._foreach_copy_(self.master_grads, grads)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.masters, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        torch._foreach_copy_([param.detach() for param in self.params], self.masters)

    def updated(self) -> list[Tensor]:
        return self.masters


class Ours(Pipeline):
    """fusedopt: unscaling, check, clipping and update are all inside scaler.step()."""

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def updated(self) -> list[Tensor]:
        states = self.optimizer.state
        return [states[param].get("master_param", param) for param in self.params]

    def describe(self) -> str:
        return f"backend {self.backend()}"

    def backend(self) -> str:
        return str(next(iter(self.optimizer.backend.values())))


@dataclass(frozen=True)
class Kind:
    """How to make a pipeline, its name in a table, and the bytes it moves per param and step."""

    label: str
    bytes_per_param: float
    build: Callable[[list[Tensor], Gradients], Pipeline]
    allowed: float = 1.0  # difference from the exact step, in tolerances: above 1 for small states
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # of the params
    devices: tuple[str, ...] = ("cpu", "cuda")
    module: str = ""  # that must import


def take_checked_steps(pipeline: Pipeline, grads: Gradients) -> None:
    for factor in CHECKED_FACTORS:
        grads.multiply(factor)
        pipeline.prepare()
        pipeline.step()
        grads.multiply(1.0 / factor)


class Stepped(Protocol):
    """Whose step can be compared: `Pipeline` is one."""

    params: list[Tensor]

    def updated(self) -> list[Tensor]: ...


def compare_steps(
    start: Sequence[Tensor], first: Stepped, second: Stepped, allowed: float = 1.0
) -> float:
    """The largest difference, in tolerances, after both have taken the checked steps.

    Raises DifferentStep where that is above ``allowed``.
    """
    excess = _excess(start, first.updated(), second.updated())
    if not excess <= allowed:
        raise DifferentStep(f"the two pipelines take different steps: {excess:.3g} x the tolerance")
    if allowed > 1.0:
        share = _mean_difference(start, first.updated(), second.updated())
        if not share <= MEAN_TOLERANCE:
            raise DifferentStep(f"the two pipelines take different steps: {share:.0%} of the move")
    for pipeline in (first, second):
        for param, master in zip(pipeline.params, pipeline.updated(), strict=True):
            if not torch.equal(param, master.to(param.dtype)):
                raise DifferentStep("a param is not the rounded value of its master")
    return excess


@torch.no_grad()
def _excess(start: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    move = max(float((s.float() - f).abs().max()) for s, f in zip(start, first, strict=True))
    if move == 0.0:
        raise DifferentStep("no element moved: the step was skipped, so nothing is compared")
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        allowed = one.abs().mul_(RTOL).add_(MOVE_TOLERANCE * move)
        excess = (one - other).abs_().div_(allowed).nan_to_num_(nan=float("inf"))
        worst = max(worst, float(excess.max()))
    return worst


@torch.no_grad()
def _mean_difference(
    start: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]
) -> float:
    """Root mean square of the difference over that of the move."""

    def squares(some: Sequence[Tensor]) -> float:
        pairs = zip(some, first, strict=True)
        return sum(float((a.float() - b.float()).square_().sum()) for a, b in pairs)

    return math.sqrt(squares(second) / squares(start))
