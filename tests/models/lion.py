"""Lion, in float64 and to the bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.exact import ExactStep, Floats, f32, fma
from models.reference import Group, Slot

DEFAULTS = dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False)


class TorchOptimizer(torch.optim.Optimizer):
    """Lion in torch's operations, for there is none in torch.optim."""

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, {})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = -param.grad if group["maximize"] else param.grad
                if group["decoupled_weight_decay"]:
                    param.data.mul_(1 - group["lr"] * group["weight_decay"])
                else:
                    grad = grad.add(param.data, alpha=group["weight_decay"])
                exp_avg = self.state[param].setdefault("exp_avg", torch.zeros_like(param.data))
                move = exp_avg.mul(beta1).add(grad, alpha=1 - beta1).sign()
                param.data.add_(move, alpha=-group["lr"])
                exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


def oracle_move(slot: Slot, grad: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    beta1, beta2 = (float(beta) for beta in slot.group["betas"])
    slot.step += 1
    exp_avg = slot.state.get("exp_avg", torch.zeros_like(grad))
    move = (beta1 * exp_avg + (1 - beta1) * grad).sign()
    exp_avg = slot.state["exp_avg"] = beta2 * exp_avg + (1 - beta2) * grad
    slot.grow_scale("exp_avg", (1 - beta2) * magnitude, exp_avg, keep=beta2)
    return move, move


def exact_update(step: ExactStep, grad: Floats) -> None:
    beta1, beta2 = step.hyper["betas"]
    exp_avg = step.state.get("exp_avg", np.zeros_like(grad))
    move = np.sign(fma(f32(1 - beta1), grad, f32(beta1) * exp_avg))
    step.state["exp_avg"] = fma(f32(1 - beta2), grad, f32(beta2) * exp_avg)
    step.master = fma(f32(-step.hyper["lr"]), move, step.master)
