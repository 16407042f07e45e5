"""Options of a whole optimizer, and the tests for numbers and flags."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

BACKEND_NAMES = ("auto", "cuda", "triton", "cpu", "reference")


def number(value: Any) -> float:
    """``value`` as a float; a string is no number, although ``float()`` would read it."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def flag(value: Any) -> bool:
    """``value`` as a bool, if it equals True or False; a string or None is refused."""
    if not is_flag(value):
        raise TypeError(f"{value!r} is neither True nor False")
    return bool(value)


def is_flag(value: Any) -> bool:
    try:
        return bool(value in (True, False))
    except (TypeError, ValueError, RuntimeError):  # several elements: numpy's, torch's
        return False


_REMEDIES = {
    "max_grad_norm": "use None for no clipping, or a number >= 0 (inf measures without clipping)",
    "norm_type": "use 2 or inf",
    "max_grad_value": "use None for no clipping, or a number > 0",
    "master_weights": "use None or True for fp32 masters of half parameters, False for none, "
    "'remainder', or for bf16 'remainder8' or 'dither'",
    "state_dtype": "use None for fp32, 'bf16', '8bit', or a dict of these by the names of states",
    "min_8bit_size": "use a whole number of elements >= 0",
    "amp_scaling": "use None for the default, True or False",
    "skip_nonfinite": "use True or False",
    "backend": f"use one of {', '.join(BACKEND_NAMES)}",
    "norm_bits": "use 'exact' (the correctly rounded sum of the squares of all elements), or None",
    "norm_group": "use a ProcessGroup or DeviceMesh of torch.distributed, or None",
}
NOT_PICKLED = "a group that was not pickled"  # stands for a norm_group until a user sets it again
# Options that are neither numbers nor flags.
_OTHERS: dict[str, Callable[[Any], bool]] = {
    "backend": lambda value: isinstance(value, str) and value in BACKEND_NAMES,
    "norm_bits": lambda value: isinstance(value, str) and value == "exact",
    "norm_group": lambda value: _is_group(value) or value == NOT_PICKLED,
    "state_dtype": lambda value: is_state_dtype(value),
    "min_8bit_size": lambda value: isinstance(value, int) and value >= 0,
}
# Ranges of the options that are numbers. The others are flags.
_ALLOWED: dict[str, Callable[[float], bool]] = {
    "max_grad_norm": lambda value: value >= 0.0,
    "norm_type": lambda value: value in (2.0, math.inf),
    "max_grad_value": lambda value: value > 0.0,
}


@dataclass(frozen=True)
class Options:
    """Validated at construction; ``ValueError`` names the argument, its value and the remedy."""

    max_grad_norm: float | None = None
    norm_type: float = 2.0
    max_grad_value: float | None = None
    master_weights: bool | str | None = None
    skip_nonfinite: bool = False
    amp_scaling: bool | None = None
    backend: str | None = None
    norm_group: Any = None
    norm_bits: str | None = None
    state_dtype: Any = None
    min_8bit_size: int = 4096

    def __post_init__(self) -> None:
        for name, remedy in _REMEDIES.items():
            value = getattr(self, name)
            if value is not None or getattr(Options, name) is not None:
                object.__setattr__(self, name, _converted(name, value, remedy))

    def changed(self, **changes: Any) -> Options:
        return replace(self, **changes)

    def non_defaults(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in Options.__dataclass_fields__}
        return {k: v for k, v in values.items() if v != getattr(Options, k)}


STATE_DTYPES = (None, "fp32", "bf16", "8bit")
MASTERS_BESIDE = ("remainder", "remainder8", "dither")


def is_state_dtype(value: Any) -> bool:
    forms = value.values() if isinstance(value, dict) else (value,)
    return all(form is None or form in STATE_DTYPES for form in forms if not isinstance(form, dict))


def _is_group(value: Any) -> bool:
    import torch.distributed as dist

    if not dist.is_available():
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(value, (dist.ProcessGroup, DeviceMesh))


OPTION_NAMES = frozenset(Options.__dataclass_fields__)
OF_GROUPS = frozenset({"state_dtype"})  # these a group may have, too, and then its own counts


def _converted(name: str, value: Any, remedy: str) -> Any:
    if name == "master_weights" and isinstance(value, str) and value in MASTERS_BESIDE:
        return value
    if name in _OTHERS:
        if _OTHERS[name](value):
            return value
        raise invalid(name, value, remedy)
    try:
        converted = number(value) if name in _ALLOWED else flag(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last is torch's
        raise invalid(name, value, remedy) from error
    if name in _ALLOWED and not _ALLOWED[name](converted):
        raise invalid(name, converted, remedy)
    return converted


def invalid(
    name: str, value: object, remedy: str, where: str = "", error: type[Exception] = ValueError
) -> Exception:
    return error(f"Invalid {name} value: {value!r}{where}; {remedy}")


def literal(value: Any) -> str:
    """``value`` as code that needs no import; a tensor or NumPy scalar becomes a plain number."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(literal, value))})"
    plain = value.item() if hasattr(value, "item") else value
    nonfinite = isinstance(plain, float) and not math.isfinite(plain)
    return f"float('{plain}')" if nonfinite else repr(plain)


def is_number(value: Any, nan: bool = False) -> bool:
    """Whether ``value`` is a number; NaN is one only with ``nan=True``.

    The value of a tensor on a device is not read, so that the host does not wait for it.
    """
    if isinstance(value, Tensor):
        known = value.numel() == 1 and not value.is_complex() and not value.is_meta
        return known and (nan or not (value.is_cpu and math.isnan(value)))
    try:
        as_float = number(value)
        return nan or not math.isnan(as_float)
    except (TypeError, ValueError, OverflowError):
        return False


def is_pair(value: Any) -> bool:
    """Whether ``value`` is an ordered pair of numbers: a tuple, list, array or tensor."""
    if isinstance(value, (Mapping, bytes, bytearray)):  # keys or bytes would be unpacked
        return False
    try:
        return len(value) == 2 and is_number(value[0]) and is_number(value[1])
    except (TypeError, LookupError):
        return False
