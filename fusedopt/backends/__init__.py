"""The three verbs every backend implements, and the choice of a backend.

``reduce`` (gradients -> one partial per chunk), ``finalize`` (partials -> ``StepScalars``, step
counts) and ``update`` (one pass over params and states). None of them reads anything back to the
host.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..plan import Group, Plan, Row, StepInputs

BACKEND_VARIABLE = "FUSEDOPT_BACKEND"


class FusedOptFallbackWarning(UserWarning):
    """A slower backend serves than the one that was expected; the message says why."""


class Backend(Protocol):
    """Stateless: what belongs to one parameter set is in its plan."""

    name: str

    def plan(
        self,
        rule: str,
        rows: Sequence[Row],
        layout: object,
        groups: list[Group],
        state: dict[Tensor, Any],
    ) -> Plan: ...

    def reduce(self, plan: Plan, step: StepInputs) -> None: ...

    def finalize(self, plan: Plan, step: StepInputs) -> None: ...

    def update(self, plan: Plan, step: StepInputs) -> None: ...


def _native() -> Any:
    from . import native

    return native


def _cuda() -> Any:
    from . import cuda

    return cuda


def _triton() -> Any:
    from . import triton

    return triton


def _reference() -> Backend:
    from .reference import ReferenceBackend

    return ReferenceBackend()


def requested_backend(argument: str | None) -> str:
    """``backend=`` if given, else the environment's ``FUSEDOPT_BACKEND``, else ``"auto"``."""
    from ..options import BACKEND_NAMES

    name = argument or os.environ.get(BACKEND_VARIABLE) or "auto"
    if name not in BACKEND_NAMES:
        raise ValueError(
            f"Invalid {BACKEND_VARIABLE} value: {name!r}; use one of {', '.join(BACKEND_NAMES)}"
        )
    return name


def choose(argument: str | None, params: Sequence[Tensor]) -> Backend:
    """The backend for ``params``.

    Raises:
        RuntimeError: a backend was asked for by name that cannot serve these parameters, or the
            CUDA backend is there and its driver is not.
    """
    name = requested_backend(argument)
    if name == "reference":
        return _reference()
    if name == "auto":
        name = "cuda" if any(p.device.type == "cuda" for p in params) else "cpu"
        obstacle = _obstacle(name, params)
        problem = _cuda().driver_problem() if name == "cuda" else None
        if obstacle is not None and problem is not None:
            raise RuntimeError(
                f"the CUDA backend is installed and cannot use this GPU: {problem}; update the "
                "driver, or reinstall fusedopt with an older CUDA toolkit, or use "
                "backend='reference' (plain torch operations)"
            )
        if obstacle is not None:
            _announce(obstacle)
            return _reference()
    if not params:
        name = "cpu"  # there is nothing to serve, on no device
    obstacle = _obstacle(name, params)
    if obstacle is not None:
        raise RuntimeError(f"backend {name!r} cannot serve: {obstacle}; use backend='reference'")
    backend: Backend
    if name == "triton":
        backend = _triton().TritonBackend()
    else:
        backend = _cuda().CudaBackend() if name == "cuda" else _native().CpuBackend()
    return backend


def _obstacle(name: str, params: Sequence[Tensor]) -> str | None:
    module = {"cuda": _cuda, "triton": _triton, "cpu": _native}[name]()
    reason: str | None = module.unavailable_reason()
    if reason is not None:
        return f"the native {name.upper()} module is not available ({reason})"
    wanted = "cpu" if name == "cpu" else module.driver().device_type
    elsewhere = {p.device.type for p in params} - {wanted}
    if elsewhere:
        return (
            f"parameters are on {', '.join(sorted(elsewhere))}, for which backend {name!r} has no "
            "kernel"
        )
    if any(p.dtype == torch.float64 for p in params):
        return "some parameters are float64, for which there is no fused kernel"
    return None


_announced: set[str] = set()


def _announce(obstacle: str) -> None:
    if obstacle in _announced:
        return
    _announced.add(obstacle)
    warnings.warn(
        f"fusedopt: {obstacle}; the reference backend (plain torch operations, right but slow) "
        "serves instead. `python -m fusedopt` shows what is installed; backend='reference' "
        "silences this.",
        FusedOptFallbackWarning,
        stacklevel=4,
    )


def report() -> dict[str, dict[str, Any]]:
    """Every backend: whether it can serve here, and why not."""
    native = _native()
    reason = native.unavailable_reason()
    cpu: dict[str, Any] = {"available": reason is None, "reason": reason or ""}
    cpu.update(native.details())
    no_cuda = _cuda().unavailable_reason()
    cuda: dict[str, Any] = {"available": no_cuda is None, "reason": no_cuda or ""}
    cuda.update(_cuda().details())
    return {
        "cuda": cuda,
        "cpu": cpu,
        "reference": {"available": True, "reason": "", "note": "plain torch operations; slow"},
    }
