"""Two models of a step, written from the contract and not from the product.

``reference`` is the float64 oracle, ``exact`` the contract to the bit. Each holds what all rules
have in common. What is one rule's own is in the module of its name, which has

- ``DEFAULTS``: its options, as ``torch.optim`` has them,
- ``oracle_move(slot, grad, magnitude)``: what lr is multiplied with, in float64, and the largest
  magnitude that went into it,
- ``exact_update(step, grad)``: the exact step, once the gradient and the decay are dealt with,
- ``TorchOptimizer``: the rule in torch's operations, made of param groups.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def model_of(rule: str) -> ModuleType:
    """The module of one rule. A new rule is a new module: there is no list of them."""
    return import_module(f"{__name__}.{rule}")
