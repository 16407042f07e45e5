"""Options that hold for a whole optimizer, as opposed to one param group."""

from __future__ import annotations

import math
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
            object.__setattr__(self, "max_grad_norm", float(self.max_grad_norm))
            _require(
                self.max_grad_norm >= 0.0,
                "max_grad_norm",
                self.max_grad_norm,
                "use None for no clipping, or a number >= 0 (inf measures without clipping)",
            )
        object.__setattr__(self, "norm_type", float(self.norm_type))
        _require(self.norm_type in (2.0, math.inf), "norm_type", self.norm_type, "use 2 or inf")
        if self.max_grad_value is not None:
            object.__setattr__(self, "max_grad_value", float(self.max_grad_value))
            _require(
                self.max_grad_value > 0.0,
                "max_grad_value",
                self.max_grad_value,
                "use None for no clipping, or a number > 0",
            )
        _require(
            self.master_weights in (None, True, False),
            "master_weights",
            self.master_weights,
            "use None or True for fp32 masters of half parameters, False for none",
        )
        _require(
            self.amp_scaling in (None, True, False),
            "amp_scaling",
            self.amp_scaling,
            "use None for the default, True or False",
        )
        _require(
            self.skip_nonfinite in (True, False),
            "skip_nonfinite",
            self.skip_nonfinite,
            "use True or False",
        )
        _require(
            self.backend is None or self.backend in BACKEND_NAMES,
            "backend",
            self.backend,
            f"use one of {', '.join(BACKEND_NAMES)}",
        )

    def changed(self, **changes: Any) -> Options:
        return replace(self, **changes)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(cls.__dataclass_fields__)

    def non_defaults(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v != getattr(Options, k)}


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"Invalid {name} value: {value!r}; {remedy}")
