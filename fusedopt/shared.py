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

from .options import Options
from .plan.options_table import Line
from .plan.plan import Plan
from .scaler.exchange import ScalerExchange

PLANS_ASIDE = 8


@dataclass
class Shared:
    options: Options
    scalars: Tensor  # StepScalars (csrc/records.h)
    line: Line
    turn: Any = field(default_factory=threading.RLock)  # of the threads that step the optimizer
    measured: bool = False  # the last step computed the norm
    plan: Plan | None = None
    # What messages call a parameter, once a checkpoint has brought its own names for the groups.
    names: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    captured_plans: list[Plan] = field(default_factory=list)  # a CUDA graph may still replay them
    aside: list[Plan] = field(default_factory=list)  # see set_aside
    amp: ScalerExchange = field(default_factory=ScalerExchange)

    def drop_plans(self) -> None:
        plans = (self.plan, *self.aside)
        self.captured_plans += [plan for plan in plans if plan is not None and plan.captured]
        self.plan, self.aside = None, []

    def set_aside(self, state: dict[Tensor, Any]) -> None:
        """Drop the plan, or keep it for later where that keeps nothing alive that would be free.

        DeepSpeed's ZeRO steps one param group at a time: ``param_groups`` is a list of one group
        for as long as a call takes, and each has its plan.
        """
        plans = [plan for plan in (self.plan, *self.aside) if plan is not None]
        self.captured_plans += [plan for plan in plans if plan.captured]
        kept = [plan for plan in plans if not plan.captured and plan.holds_only(state)]
        self.plan, self.aside = None, kept[:PLANS_ASIDE]

    def take_up(self, plan: Plan) -> None:
        self.plan = plan
        self.aside = [each for each in self.aside if each is not plan]
