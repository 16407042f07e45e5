"""Lion; the formula and its source stand in ``FusedLion``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .declaration import Group, Rule, State
from .reference import decayed


def lion(p: Tensor, grad: Tensor, states: Sequence[Tensor], group: Group, step: int) -> Tensor:
    (exp_avg,) = states
    beta1, beta2 = (float(beta) for beta in group["betas"])
    p, grad = decayed(p, grad, group)
    p = p - float(group["lr"]) * exp_avg.mul(beta1).add(grad, alpha=1.0 - beta1).sign()
    exp_avg.mul_(beta2).add_(grad, alpha=1.0 - beta2)
    return p


RULE = Rule(
    name="lion",
    numbers=(("betas", "beta1", "beta2"),),
    flags=(),
    states=(State("exp_avg"),),
    hyper=("minus_lr", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "decay"),
    reference=lion,
    not_beside=("exp_avg_sq", "exp_inf"),
)
