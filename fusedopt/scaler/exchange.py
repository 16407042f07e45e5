"""The values that a GradScaler and the optimizer that it steps exchange."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class ScalerExchange:
    # `grad_scale` and `found_inf`, if set; and both as they were before a scaler set them.
    values: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    answered: bool = False  # the step is over, so `found_inf` is its answer and not the scaler's
    # One flag for each scaler of ours, by its id, and the flag that the next step fills in.
    flags: dict[int, Tensor] = field(default_factory=dict)
    due: Tensor | None = None
    warned: bool = False  # that ranks' scales may differ

    def offer(self, grad_scale: Tensor | None, found_inf: Any) -> None:
        """Set both values at once, for a scaler of ours."""
        self.before, self.answered = dict(self.values), False
        self.values.update(grad_scale=grad_scale, found_inf=found_inf)

    def restore(self) -> None:
        """After a failed step: the values as they were before the scaler set them."""
        if "found_inf" in self.values:  # a scaler sets both, grad_scale first
            self.values = {k: v for k, v in self.before.items() if k != "found_inf"}
        self.undecided()

    def undecided(self) -> None:
        """Clear a flag that no step has written: the scaler then reads that nothing was found."""
        flag, self.due = self.due, None
        if flag is not None:
            with suppress(RuntimeError):  # a GPU that has failed: its own error is being raised
                flag.zero_()
