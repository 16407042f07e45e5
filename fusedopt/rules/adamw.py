"""AdamW; the formula and its sources stand in ``FusedAdamW``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .declaration import Group, Rule, State
from .reference import decayed, geometric_sum, round_to


def adamw(p: Tensor, grad: Tensor, states: Sequence[Tensor], group: Group, step: int) -> Tensor:
    exp_avg, exp_avg_sq = states[:2]
    weight1 = round_to(1.0 - float(group["betas"][0]), p.dtype)
    weight2 = round_to(1.0 - float(group["betas"][1]), p.dtype)
    beta2 = round_to(float(group["betas"][1]), p.dtype)
    p, grad = decayed(p, grad, group)
    exp_avg.lerp_(grad, weight1)
    exp_avg_sq.mul_(beta2).add_(weight2 * grad * grad)
    second_moment = exp_avg_sq
    if group["amsgrad"]:
        second_moment = torch.maximum(states[2], exp_avg_sq, out=states[2])
    step_size = float(group["lr"]) / (weight1 * geometric_sum(1.0 - weight1, step))
    bias_correction2 = weight2 * geometric_sum(beta2, step)
    denom = second_moment.sqrt() / math.sqrt(bias_correction2) + float(group["eps"])
    return p - step_size * exp_avg / denom


RULE = Rule(
    name="adamw",
    numbers=(("betas", "beta1", "beta2"), "eps"),
    flags=("amsgrad",),
    states=(
        State("exp_avg"),
        State("exp_avg_sq", positive=True),
        State(
            "max_exp_avg_sq",
            when="amsgrad",
            absent=-math.inf,
            starts_later=True,
            positive=True,
            ratchets=True,
        ),
    ),
    hyper=(
        *("lerp_weight", "beta2", "one_minus_beta2", "step_size", "eps", "decay"),
        "lerp_from_grad",
    ),
    reference=adamw,
)
