"""What an optimizer shares with the wrappers and copies that take over its ``__dict__``.

Lightning, Fabric and others make an object of a derived class and give it the optimizer's
attributes. An attribute that one of the two binds anew is then lost to the other. So everything
that changes in the life of an optimizer, and is not torch's, lies in one object that both have.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .backends.registry import Backend
from .options import Options
from .plan.plan import Plan
from .scaler.exchange import ScalerExchange

PLANS_ASIDE = 8


@dataclass
class Shared:
    options: Options
    scalars: Tensor  # StepScalars (csrc/scalars.h)
    turn: Any = field(default_factory=threading.RLock)  # of the threads that step the optimizer
    measured: bool = False  # the last step computed the norm
    plan: Plan | None = None
    backend: Backend | None = None
    # What messages call a parameter, once a checkpoint has brought its own names for the groups.
    names: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    captured_plans: list[Plan] = field(default_factory=list)  # a CUDA graph may still replay them
    aside: list[tuple[Backend, Plan]] = field(default_factory=list)  # see set_aside
    amp: ScalerExchange = field(default_factory=ScalerExchange)

    def drop_plans(self) -> None:
        plans = [self.plan, *(plan for _, plan in self.aside)]
        self.captured_plans += [plan for plan in plans if plan is not None and plan.captured]
        self.plan = self.backend = None
        self.aside.clear()

    def set_aside(self, state: dict[Tensor, Any]) -> None:
        """Drop the plan, or keep it for later where that keeps nothing alive that would be free.

        DeepSpeed's ZeRO steps one param group at a time: ``param_groups`` is a list of one group
        for as long as a call takes, and each has its plan.
        """
        if self.plan is not None and self.backend is not None:
            self.aside.insert(0, (self.backend, self.plan))
        plans = [plan for _, plan in self.aside]
        self.captured_plans += [plan for plan in plans if plan.captured]
        kept = [each for each in self.aside if not each[1].captured and each[1].holds_only(state)]
        self.plan, self.backend, self.aside = None, None, kept[:PLANS_ASIDE]
