"""AdamW, in float64 and to the bit."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from models.exact import ExactStep, Floats, f32, fma, geometric_sum
from models.reference import Slot

DEFAULTS = dict(
    lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, maximize=False
)
# Adam's groups say whether the decay is decoupled, which makes it AdamW.
TorchOptimizer = partial(torch.optim.Adam, foreach=False, fused=False)


def oracle_move(slot: Slot, grad: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    hyper, state = slot.group, slot.state
    beta1, beta2 = (float(beta) for beta in hyper["betas"])
    zeros = torch.zeros_like(grad)
    slot.step += 1
    exp_avg = state.get("exp_avg", zeros)
    exp_avg = state["exp_avg"] = exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad * grad
    state["exp_avg_sq"] = exp_avg_sq
    scale = slot.grow_scale("exp_avg", (1 - beta1) * magnitude, exp_avg, keep=beta1)
    sq_magnitudes = (1 - beta2) * grad * magnitude, exp_avg_sq
    slot.grow_scale("exp_avg_sq", *sq_magnitudes, keep=beta2)
    if hyper["amsgrad"]:
        largest = torch.maximum(state.get("max_exp_avg_sq", zeros), exp_avg_sq)
        exp_avg_sq = state["max_exp_avg_sq"] = largest
        slot.grow_scale("max_exp_avg_sq", *sq_magnitudes)
    bias_correction1 = 1 - beta1**slot.step
    bias_correction2 = 1 - beta2**slot.step
    denom = (exp_avg_sq / bias_correction2).sqrt() + hyper["eps"]
    move = exp_avg / bias_correction1 / denom
    sq_scale = slot.scale["max_exp_avg_sq" if hyper["amsgrad"] else "exp_avg_sq"]
    by_denom = move * (sq_scale / exp_avg_sq).nan_to_num()
    return move, torch.fmax(scale / bias_correction1 / denom, by_denom.abs())


def exact_update(step: ExactStep, grad: Floats) -> None:
    hyper, zeros = step.hyper, np.zeros_like(grad)
    beta1, beta2 = hyper["betas"]
    weight1, weight2, beta2_32 = f32(1 - beta1), f32(1 - beta2), f32(beta2)
    exp_avg = step.state.get("exp_avg", zeros)
    exp_avg_sq = step.state.get("exp_avg_sq", zeros)
    if weight1 < f32(0.5):
        exp_avg = fma(weight1, grad - exp_avg, exp_avg)
    else:  # torch.lerp: from the nearer end
        exp_avg = fma(-(f32(1) - weight1), grad - exp_avg, grad)
    step.state["exp_avg"] = exp_avg
    exp_avg_sq = fma(weight2 * grad, grad, beta2_32 * exp_avg_sq)
    step.state["exp_avg_sq"] = exp_avg_sq
    if hyper["amsgrad"]:
        largest = np.maximum(step.state.get("max_exp_avg_sq", zeros), exp_avg_sq)
        exp_avg_sq = step.state["max_exp_avg_sq"] = largest
    correction1 = float(weight1) * float(geometric_sum(1 - float(weight1), step.count))
    correction2 = float(weight2) * float(geometric_sum(float(beta2_32), step.count))
    root = math.sqrt(correction2)
    step_size = f32(hyper["lr"] / correction1 * root)
    denom = np.sqrt(exp_avg_sq) + f32(hyper["eps"] * root)
    step.master = step.master - (step_size * exp_avg) / denom
