"""What passes between a GradScaler and the optimizer that it steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class ScalerExchange:
    # `grad_scale` and `found_inf`, each if it is set; and both as they were before a scaler came.
    values: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    answered: bool = False  # the step is over, so `found_inf` is its answer and not the scaler's
    # One flag for each scaler of ours, by its id, and the flag that the next step fills in.
    flags: dict[int, Tensor] = field(default_factory=dict)
    due: Tensor | None = None
