"""SGD; the formula and its sources stand in ``FusedSGD``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .declaration import Group, Rule, State
from .reference import decayed


def sgd(p: Tensor, grad: Tensor, states: Sequence[Tensor], group: Group, step: int) -> Tensor:
    p, grad = decayed(p, grad, group)
    momentum = float(group["momentum"])
    if momentum != 0.0:
        (buffer,) = states
        if step <= 1:
            buffer.copy_(grad)
        else:
            buffer.mul_(momentum).add_((1.0 - float(group["dampening"])) * grad)
        grad = grad + momentum * buffer if group["nesterov"] else buffer
    return p - float(group["lr"]) * grad


RULE = Rule(
    name="sgd",
    numbers=("momentum", "dampening"),
    flags=("nesterov",),
    states=(State("momentum_buffer", when="momentum", uncounted=True),),
    hyper=("minus_lr", "buffer_momentum", "grad_weight", "momentum", "decay"),
    reference=sgd,
)
