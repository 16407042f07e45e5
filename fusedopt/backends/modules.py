"""Import the native modules, and say why one is missing. No other module does that."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from functools import cache
from itertools import zip_longest
from typing import Any

import torch

from .. import installation
from ..codecs import CODECS, SCALE_BLOCK
from ..rules import RULES
from ..rules.declaration import OPTIONS_BYTES, declared
from . import records

_CONSTANTS = (
    *("CHUNK_ELEMENTS", "WORDS", "DIGITS", "LOWEST", "STREAMS", "CODEC_BITS"),
    *("NORM_IS_TWO", "MEASURED", "SKIP_NONFINITE", "UNCOUNTED", "EXACT"),
    *("FOUND_INF", "BAD_SCALE", "ABORT", "BY_ABORT", "BY_OPTIONS"),
)
_ROW_KINDS = ("READY", "AWAITS_STATE", "STAGED", "FROZEN")  # only in the CPU's module
SIMD_VARIABLE = "FUSEDOPT_SIMD"


@cache
def load(name: str) -> tuple[Any, str | None]:
    """The module ``_cpu`` or ``_cuda``, or None; and the reason why it cannot be used, or None.

    Raises:
        ImportError: ``_cuda`` was built from other sources. (Without ``_cpu`` plain torch serves.)
    """
    try:
        module = importlib.import_module(f"fusedopt.{name}")
        reason = installation.strange(module)
        if reason is None and name == "_cpu":
            check_mirrors(module)
            reason = _set_up(module)
    except ImportError as error:
        reason = str(error)
    if reason is not None:
        # The reason that setup.py recorded goes first, then that of the folder.
        return None, installation.recorded_reason(name) or installation.obstacle(name) or reason
    if name == "_cuda":
        check_mirrors(module)
    return module, None


def check_mirrors(module: Any) -> None:
    """Compare the records that the module reads with those that Python writes, field by field.

    Raises:
        ImportError: the module was built from other sources than this package; names both fields.
    """
    names = (*_CONSTANTS, *(_ROW_KINDS if hasattr(module, "Watch") else ()))
    constants = {name: getattr(records, name) for name in names} | {"OPTIONS_BYTES": OPTIONS_BYTES}
    constants |= {codec.name: codec.number for codec in CODECS}
    constants["SCALE_BLOCK"] = SCALE_BLOCK
    found = {name: getattr(module, name, None) for name in constants}
    compare(module, "a constant", found.items(), constants.items())
    their_records = getattr(module, "RECORDS", {})
    for name, record in records.RECORDS.items():
        compare(module, name, their_records.get(name, ()), record.fields)
    rules = getattr(module, "RULES", {})
    compare(module, "a rule", zip(sorted(rules)), zip(RULES))
    for name, theirs in rules.items():
        check_rule(module, name, theirs)


def check_rule(module: Any, name: str, theirs: dict[str, Any]) -> None:
    """As ``check_mirrors``, for one rule."""
    rule = declared(name)
    options = [(field, 8 * i, 8, kind) for i, (field, kind) in enumerate(rule.options.items())]
    compare(module, f"Options of {name}", theirs["options"], options)
    hyper = [(field, 4 * i, 4, "f") for i, field in enumerate(rule.hyper)]
    compare(module, f"Hyper of {name}", theirs["hyper"], hyper)
    numbers = {
        "n_states": len(rule.states),
        "n_always": rule.n_always,
        "row_step_bytes": rule.row_step_bytes,
        "absent": [state.absent for state in rule.states if state.when is not None],
    }
    compare(module, f"rule {name}", [(key, theirs.get(key)) for key in numbers], numbers.items())


def compare(
    module: Any, where: str, theirs: Iterable[tuple[Any, ...]], ours: Iterable[tuple[Any, ...]]
) -> None:
    """Raise ``ImportError`` at the first field of the module that differs from ours."""
    for their, our in zip_longest(theirs, ours, fillvalue=("nothing",)):
        if tuple(their) != tuple(our):
            raise ImportError(
                f"{module.__name__} was built from other sources than this package "
                f"({where}: the module has {' '.join(map(str, their))}, fusedopt has "
                f"{' '.join(map(str, our))}); reinstall fusedopt"
            )


def _set_up(module: Any) -> str | None:
    """Set up the CPU's module. Returns what prevents its use, or ``None``."""
    module.use_torch(
        tensor_type=torch.Tensor,
        parameter_type=torch.nn.Parameter,
        is_neg=torch.Tensor.is_neg,
        disable_subclasses=torch._C.DisableTorchFunctionSubclass,
        exchange=torch.Tensor.__dlpack_c_exchange_api__,
    )
    level = os.environ.get(SIMD_VARIABLE)
    if level and level not in module.simd_levels():
        levels = ", ".join(module.simd_levels())
        return f"{SIMD_VARIABLE}={level!r} is not in this build or not on this CPU; use {levels}"
    if level:
        module.set_simd(level)
    return None
