"""The native modules: nothing else imports them, or says why one of them is not there."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch

from .. import installation
from .records import CHUNK_BYTES, CHUNK_ELEMENTS, GRAD, ROW

SIMD_VARIABLE = "FUSEDOPT_SIMD"
_MIRRORS = {
    "ROW_BYTES": ROW.size,
    "GRAD_BYTES": GRAD.size,
    "CHUNK_BYTES": CHUNK_BYTES,
    "CHUNK_ELEMENTS": CHUNK_ELEMENTS,
}


@cache
def load(name: str) -> tuple[Any, str | None]:
    """``_cpu`` or ``_cuda``, or None and why it cannot be used."""
    try:
        module = importlib.import_module(f"fusedopt.{name}")
        reason = installation.strange(module)
        if reason is None:
            check_mirrors(module)
            reason = _set_up(module) if name == "_cpu" else None
    except ImportError as error:
        module, reason = None, str(error)
    return (module, None) if reason is None else (None, not_built(name) or reason)


def not_built(name: str) -> str | None:
    """Why there is no such module: what setup.py wrote down, or what the folder shows."""
    return installation.recorded_reason(name) or installation.obstacle(name)


def check_mirrors(module: Any) -> None:
    """Raise ``ImportError`` if the module was built from other sources than this package."""
    theirs = {name: getattr(module, name) for name in _MIRRORS}
    if theirs != _MIRRORS:
        raise ImportError(
            f"{module.__name__} was built from other sources than this package (tables {theirs}, "
            f"expected {_MIRRORS}); reinstall fusedopt"
        )


def _set_up(module: Any) -> str | None:
    """Make the CPU's module ready; what is in the way, or ``None``."""
    module.use_torch(
        tensor_type=torch.Tensor,
        parameter_type=torch.nn.Parameter,
        is_neg=torch.Tensor.is_neg,
        exchange=torch.Tensor.__dlpack_c_exchange_api__,
    )
    level = os.environ.get(SIMD_VARIABLE)
    if level and level not in module.simd_levels():
        levels = ", ".join(module.simd_levels())
        return f"{SIMD_VARIABLE}={level!r} is not in this build or not on this CPU; use {levels}"
    if level:
        module.set_simd(level)
    return None
