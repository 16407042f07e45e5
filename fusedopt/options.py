"""Options that hold for a whole optimizer, as opposed to one param group."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

BACKEND_NAMES = ("auto", "cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Options:
    """Validated at construction; ``ValueError`` names the argument, its value and the remedy."""

    max_grad_norm: float | None = None
    norm_type: float = 2.0
    max_grad_value: float | None = None
    master_weights: bool | None = None
    skip_nonfinite: bool = False
    amp_scaling: bool | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None:
            self._number(
                "max_grad_norm",
                lambda value: value >= 0.0,
                "use None for no clipping, or a number >= 0 (inf measures without clipping)",
            )
        self._number("norm_type", lambda value: value in (2.0, math.inf), "use 2 or inf")
        if self.max_grad_value is not None:
            self._number(
                "max_grad_value",
                lambda value: value > 0.0,
                "use None for no clipping, or a number > 0",
            )
        if self.master_weights is not None:
            self._flag(
                "master_weights",
                "use None or True for fp32 masters of half parameters, False for none",
            )
        if self.amp_scaling is not None:
            self._flag("amp_scaling", "use None for the default, True or False")
        self._flag("skip_nonfinite", "use True or False")
        if self.backend is not None and not (
            isinstance(self.backend, str) and self.backend in BACKEND_NAMES
        ):
            raise _invalid("backend", self.backend, f"use one of {', '.join(BACKEND_NAMES)}")

    def _number(self, name: str, allowed: Callable[[float], bool], remedy: str) -> None:
        """Make the option a float, if it can be one and is allowed."""
        value = getattr(self, name)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last: torch's
            raise _invalid(name, value, remedy) from error
        if not allowed(number):
            raise _invalid(name, number, remedy)
        object.__setattr__(self, name, number)

    def _flag(self, name: str, remedy: str) -> None:
        """Make the option a bool, if it is equal to one."""
        value = getattr(self, name)
        try:
            flag = value in (True, False)
        except (TypeError, ValueError, RuntimeError) as error:  # several elements: numpy's, torch's
            raise _invalid(name, value, remedy) from error
        if not flag:
            raise _invalid(name, value, remedy)
        object.__setattr__(self, name, bool(value))

    def changed(self, **changes: Any) -> Options:
        return replace(self, **changes)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(cls.__dataclass_fields__)

    def non_defaults(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v != getattr(Options, k)}


def _invalid(name: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"Invalid {name} value: {value!r}; {remedy}")
