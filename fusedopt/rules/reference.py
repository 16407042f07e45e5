"""Functions that the rules in plain torch share."""

from __future__ import annotations

import torch
from torch import Tensor

from .declaration import Group


def geometric_sum(base: float, count: int) -> float:
    """Sum of ``base**i`` for ``0 <= i < count``, as in csrc/rules/common.h."""
    total, power = 0.0, 1.0
    for bit in f"{count:b}":
        total, power = total * (1.0 + power), power * power
        if bit == "1":
            total, power = 1.0 + base * total, power * base
    return total


def round_to(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype).item()


def decayed(param: Tensor, grad: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Parameter and gradient after weight decay of either kind."""
    weight_decay = float(group["weight_decay"])
    if weight_decay == 0.0:
        return param, grad
    if group["decoupled_weight_decay"]:
        return param - (float(group["lr"]) * weight_decay) * param, grad
    return param, grad + weight_decay * param
