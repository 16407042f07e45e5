"""The choice of a backend. Its plans implement the verbs of a step (``Plan`` in plan/plan.py)."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import installation
from ..callers import users_level
from ..options import BACKEND_NAMES
from ..plan.plan import Layout, Plan, Row
from ..rules.declaration import Rule

BACKEND_VARIABLE = "FUSEDOPT_BACKEND"


class FusedOptFallbackWarning(UserWarning):
    """A slower backend serves than expected; the message says why."""


class Backend(Protocol):
    """Stateless: the data of a parameter set is in its plan, and so are the verbs."""

    name: str

    def plan(self, rule: Rule, rows: Sequence[Row], layout: Layout) -> Plan: ...


REFERENCE = "reference"
TITLES = {"cuda": "CUDA", "triton": "Triton", "cpu": "CPU"}  # in the order of preference
UPDATE_DRIVER = "update the driver, or reinstall fusedopt with an older CUDA toolkit"


def _module(name: str) -> Any:
    """Import a backend's module when it is first needed."""
    return importlib.import_module(f".{name}", __package__)


def requested_backend(argument: str | None) -> str:
    """``backend=`` if given, else the environment's ``FUSEDOPT_BACKEND``, else ``"auto"``."""
    name = argument or os.environ.get(BACKEND_VARIABLE) or "auto"
    if name not in BACKEND_NAMES:
        raise ValueError(
            f"Invalid {BACKEND_VARIABLE} value: {name!r}; use one of {', '.join(BACKEND_NAMES)}"
        )
    return name


def prepare(argument: str | None, params: Sequence[Tensor]) -> None:
    """Import the backend that will serve ``params``, so that the first step need not.

    Raises:
        ValueError: ``FUSEDOPT_BACKEND`` names no backend.
    """
    name = requested_backend(argument)
    candidates = _by_speed(params) if name == "auto" else [name, REFERENCE]
    for module in (REFERENCE, next(each for each in candidates if _missing(each) is None)):
        _module(module)


def choose(argument: str | None, params: Sequence[Tensor]) -> Backend:
    """The backend for ``params``.

    Raises:
        RuntimeError: the backend that was asked for by name cannot serve these parameters; or the
            CUDA backend is built but has no usable driver, and Triton cannot serve either.
    """
    name = requested_backend(argument)
    if not params and name != REFERENCE:
        name = "cpu" if _missing("cpu") is None else REFERENCE  # there is nothing to serve
    elif name == "auto":
        name = _best(params)
    elif name != REFERENCE:
        obstacle = _missing(name) or _unfit(name, _device_type(name), params)
        if obstacle is not None:
            raise RuntimeError(
                f"backend {name!r} cannot serve: {obstacle}; use `backend='reference'`"
            )
    backend: Backend = getattr(_module(name), f"{name.capitalize()}Backend")()
    return backend


def _best(params: Sequence[Tensor]) -> str:
    """The fastest backend that can serve; warns if it is slower than expected."""
    names = _by_speed(params)
    obstacle = _unfit(names[0], "cpu" if names[0] == "cpu" else "cuda", params)
    if obstacle is not None:
        _announce(obstacle, REFERENCE)
        return REFERENCE
    obstacles: list[str] = []
    for name in names:
        obstacle = _missing(name)
        if obstacle is None:
            break
        obstacles.append(obstacle)
    if name == REFERENCE and "cuda" in names:
        problem = _module("cuda").driver_problem()
        if problem is not None:
            raise RuntimeError(
                f"the CUDA backend is installed and cannot use this GPU: {problem}; "
                f"{UPDATE_DRIVER}, or use `backend='reference'` (plain torch operations); "
                f"{obstacles[-1]}"
            )
    if obstacles:
        _announce(" and ".join(obstacles), name, _remedy(names[0]))
    return name


def _by_speed(params: Sequence[Tensor]) -> list[str]:
    if not any(p.device.type == "cuda" for p in params):  # ROCm's devices have this name, too
        return ["cpu", REFERENCE]
    return ["cuda", "triton", REFERENCE] if torch.version.hip is None else ["triton", REFERENCE]


def _missing(name: str) -> str | None:
    """Why the backend cannot serve any parameters on this machine, or ``None``."""
    reason: str | None = None if name == REFERENCE else _module(name).unavailable_reason()
    return None if reason is None else f"the {TITLES[name]} backend is not available ({reason})"


def _remedy(name: str) -> str:
    """Advice on how to make the backend available; empty if the reason has it already."""
    reason: str = _module(name).unavailable_reason()
    if name == "triton" or any(words in reason for words in ("reinstall", "; use ", "Windows")):
        return ""
    if installation.obstacle(f"_{name}") is not None:
        remedy = installation.remedy()
    elif name == "cuda" and _module("cuda").driver_problem() is not None:
        remedy = UPDATE_DRIVER
    elif "=0 was set" in reason:
        remedy = f"reinstall fusedopt without {reason.split()[0]}"
    elif "no C" in reason:
        compiler = "a C++ compiler" if name == "cpu" else "nvcc"
        remedy = f"reinstall fusedopt with {compiler} on PATH"
    else:
        remedy = "put that right and reinstall fusedopt"
    return f" For the {TITLES[name]} backend {remedy}."


def _device_type(name: str) -> str:
    device_type: str = "cpu" if name == "cpu" else _module(name).driver().device_type
    return device_type


def _unfit(name: str, device_type: str, params: Sequence[Tensor]) -> str | None:
    """Why the kernels of a backend cannot update these parameters, or ``None``."""
    elsewhere = {p.device.type for p in params} - {device_type}
    if elsewhere:
        return (
            f"parameters are on {', '.join(sorted(elsewhere))}, for which backend {name!r} has no "
            "kernel"
        )
    if any(p.dtype == torch.float64 for p in params):
        return "some parameters are float64, for which there is no fused kernel"
    return None


_announced: set[str] = set()


def _announce(obstacle: str, name: str, remedy: str = "") -> None:
    if obstacle in _announced:
        return
    _announced.add(obstacle)
    slow = " (plain torch operations, right but slow)" if name == REFERENCE else ""
    title = TITLES.get(name, name)
    warnings.warn(
        f"fusedopt: {obstacle}; the {title} backend{slow} serves instead.{remedy} "
        f"`python -m fusedopt` shows what is installed; `backend={name!r}` silences this.",
        FusedOptFallbackWarning,
        stacklevel=users_level(),
    )


def report() -> dict[str, dict[str, Any]]:
    """Every backend: whether it can serve here, and why not."""
    told = {}
    for name in TITLES:
        reason = _module(name).unavailable_reason()
        facts = {"available": reason is None, "reason": reason or ""}
        told[name] = facts | _module(name).details()
        if name == "cpu" and reason is not None:
            told[name]["remedy"] = _remedy(name).strip()
    told[REFERENCE] = {"available": True, "reason": "", "note": "plain torch operations; slow"}
    return told
