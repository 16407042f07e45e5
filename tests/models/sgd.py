"""SGD, in float64 and to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from models.exact import ExactStep, Floats, f32, fma
from models.reference import Group, Slot

DEFAULTS = dict(
    lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False
)


class TorchOptimizer(torch.optim.SGD):
    """torch's own, and the decoupled decay, which it has not."""

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, foreach=False, fused=False)

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["decoupled_weight_decay"]:
                continue
            for param in group["params"]:
                if param.grad is not None:
                    param.data.mul_(1 - group["lr"] * group["weight_decay"])
            group["weight_decay"] = 0.0  # until TorchStep writes the options again
        super().step()


def oracle_move(slot: Slot, grad: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    hyper, state = slot.group, slot.state
    momentum = float(hyper["momentum"])
    if momentum == 0:
        return grad, magnitude
    slot.step += 1
    if "momentum_buffer" in state:
        buffer = momentum * state["momentum_buffer"] + (1 - hyper["dampening"]) * grad
    else:
        buffer = grad.clone()
    state["momentum_buffer"] = buffer
    scale = slot.grow_scale("momentum_buffer", magnitude, buffer, keep=momentum)
    move = grad + momentum * buffer if hyper["nesterov"] else buffer
    return move, torch.fmax(scale, magnitude)


def exact_update(step: ExactStep, grad: Floats) -> None:
    hyper = step.hyper
    momentum = f32(hyper["momentum"])
    if momentum != 0:
        buffer = grad
        if "momentum_buffer" in step.state:
            fresh = f32(1 - hyper["dampening"]) * grad
            buffer = fma(momentum, step.state["momentum_buffer"], fresh)
        step.state["momentum_buffer"] = buffer
        grad = fma(momentum, buffer, grad) if hyper["nesterov"] else buffer
    step.master = fma(f32(-hyper["lr"]), grad, step.master)
