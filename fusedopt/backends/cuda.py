"""The CUDA backend: the kernels of ``fusedopt._cuda`` over the tables of a plan.

A third, small kernel has the table of inputs in its parameters and writes it to the device. It runs
when the table has changed since the last step, and in every step during and after a graph capture.
"""

from __future__ import annotations

from typing import Any

import torch

from . import modules
from .device import DeviceBackend, DeviceTables
from .driver import Driver, DriverOnDemand, Launches
from .records import address

_cuda, _import_error = modules.load("_cuda")


class CudaDriver(Driver):
    """Runs the kernels of a native module: ``_cuda``, or a test's replacement."""

    def __init__(self, native: Any) -> None:
        self.native = native

    def launches(self, tables: DeviceTables) -> Launches:
        plan: Launches = self.native.Plan(
            tables.rule.name,
            {
                **tables.arguments,
                "host_inputs": address(tables.host_view),
                "n_input_bytes": len(tables.host_inputs),
                "device": self.index(tables.device),
                "n_states": tables.n_states,
                "coded": tables.coded,
            },
        )
        return plan


driver = DriverOnDemand("CUDA", lambda: CudaDriver(_cuda), lambda: unavailable_reason())


def unavailable_reason() -> str | None:
    """Why CUDA tensors cannot be served, or ``None``."""
    if driver.made is not None:
        return None
    if _import_error is not None:
        return _import_error
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    reason = driver_problem()
    if reason is None and not torch.cuda.is_available():
        return "this torch is built without CUDA or cannot use it"
    return reason


def driver_problem() -> str | None:
    """Why the module, although it was built, cannot use this machine's GPUs, or ``None``."""
    if driver.made is not None or _import_error is not None:
        return None
    try:
        count = _cuda.device_count()
    except RuntimeError as error:
        return str(error).removeprefix("fusedopt: ")
    return None if count > 0 else "CUDA sees no device"


def details() -> dict[str, Any]:
    """Versions that the native module knows of, for the environment report."""
    return {} if _import_error is not None else dict(_cuda.versions())


class CudaBackend(DeviceBackend):
    """Kernels of ``csrc/cuda``."""

    name = "cuda"

    def __init__(self) -> None:
        super().__init__(driver())
