"""The CUDA backend: the kernels of ``fusedopt._cuda`` over the tables of a plan.

A steady step is two launches whatever the number of tensors: ``reduce``, whose last block
finalizes, and ``update``. The table of gradient addresses and options lies on the device; when it
has changed since the last step, and always in a graph that is being captured, a third small kernel
that carries it in its parameters writes it. With parameters on several devices every device
reduces, the totals are exchanged, and every device finalizes for itself.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plan import N_STEP_SCALARS, Group, Plan, Row, StepInputs
from . import native as cpu
from .tables import (
    CHUNK_BYTES,
    CHUNK_ELEMENTS,
    GRAD,
    ROW,
    TablePlan,
    address,
    chunk_table,
    pack_row,
)

try:
    from .. import _cuda

    _import_error: str | None = None
except ImportError as error:
    _import_error = str(error)

OPTIONS_BYTES = 64  # of a group, for every rule (csrc/rules.h)
DEVICE_NUMBER = struct.Struct("=Qii")  # data; field of the options table, fp64 (csrc/cuda/step.h)
DEVICE_NUMBERS = 4  # of a group, at most
ROW_STEP_BYTES = 32  # RowStep
EMPTY_ROW = bytes(ROW.size)  # a tensor of another device


@dataclass
class Driver:
    """The native module, and what it takes to know about the device it drives."""

    native: Any
    device_type: str = "cuda"

    def stream(self, device: torch.device) -> int:
        stream: int = torch.cuda.current_stream(device).cuda_stream
        return stream

    def capturing(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def record_stream(self, tensor: Tensor, device: torch.device) -> None:
        """Tell the allocator that the current stream, too, has to be done before it reuses it."""
        tensor.record_stream(torch.cuda.current_stream(device))

    def index(self, device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index


_driver: Driver | None = None  # made when it is first asked for


def driver() -> Driver:
    """The driver of this machine's GPUs.

    Raises:
        RuntimeError: there is none; the message says why.
    """
    global _driver
    if _driver is None:
        reason = unavailable_reason()
        if reason is not None:
            raise RuntimeError(f"the CUDA backend is not available ({reason})")
        _driver = Driver(_cuda)
    return _driver


def unavailable_reason() -> str | None:
    """Why CUDA tensors cannot be served, or ``None``."""
    if _driver is not None:
        return None
    if _import_error is not None:
        return cpu.reason_not_built("_cuda") or _import_error
    no_watch = cpu.unavailable_reason()
    if no_watch is not None:
        return f"it needs the native CPU module, which is missing: {no_watch}"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    reason = driver_problem()
    if reason is None and not torch.cuda.is_available():
        return "this torch is built without CUDA or cannot use it"
    return reason


def driver_problem() -> str | None:
    """What keeps a module that was built from using this machine's GPUs, or ``None``."""
    if _driver is not None or _import_error is not None:
        return None
    try:
        count = _cuda.device_count()
    except RuntimeError as error:
        return str(error).removeprefix("fusedopt: ")
    return None if count > 0 else "CUDA sees no device"


def details() -> dict[str, Any]:
    """Versions that the native module knows of, for the environment report."""
    return {} if _import_error is not None else dict(_cuda.versions())


def _check_mirrors(native: Any) -> None:
    mine = {
        "ROW_BYTES": ROW.size,
        "GRAD_BYTES": GRAD.size,
        "CHUNK_BYTES": CHUNK_BYTES,
        "CHUNK_ELEMENTS": CHUNK_ELEMENTS,
        "ROW_STEP_BYTES": ROW_STEP_BYTES,
        "OPTIONS_BYTES": OPTIONS_BYTES,
        "DEVICE_NUMBER_BYTES": DEVICE_NUMBER.size,
        "DEVICE_NUMBERS": DEVICE_NUMBERS,
    }
    theirs = {name: getattr(native, name) for name in mine}
    if mine != theirs:
        raise ImportError(
            f"fusedopt._cuda was built from other sources than this package (tables {theirs}, "
            f"expected {mine}); reinstall fusedopt"
        )


if _import_error is None:
    _check_mirrors(_cuda)


class _Part:
    """The tables of one device, and its native plan."""

    def __init__(self, plan: CudaPlan, device: torch.device, number: int, count: int) -> None:
        self.device = device
        rows = [row if plan.device_of(row) == device else None for row in plan.rows]
        numels = [0 if row is None else row.dense.numel() for row in rows]
        packed = b"".join(EMPTY_ROW if row is None else pack_row(row) for row in rows)
        chunks = chunk_table(numels)
        self.host_inputs = plan._inputs if number == 0 else bytearray(len(plan._inputs))
        self._host_view = torch.frombuffer(self.host_inputs, dtype=torch.uint8)
        self.tensors = {
            "inputs": torch.zeros(len(self.host_inputs), dtype=torch.uint8, device=device),
            "rows": torch.empty(max(len(packed), ROW.size), dtype=torch.uint8, device=device),
            "chunks": torch.empty(max(len(chunks), 1), 2, dtype=torch.int64, device=device),
            "partials": torch.zeros(max(len(chunks), 1), dtype=torch.float64, device=device),
            "row_steps": torch.zeros(
                max(len(rows), 1) * ROW_STEP_BYTES, dtype=torch.uint8, device=device
            ),
            "totals": torch.zeros(count, dtype=torch.float64, device=device),
            "ticket": torch.zeros(1, dtype=torch.int32, device=device),
        }
        if packed:
            self.tensors["rows"].copy_(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        self.tensors["chunks"][: len(chunks)].copy_(chunks)
        # The optimizer's own scalars live with the first part; others decide for themselves.
        self.scalars = torch.zeros(N_STEP_SCALARS, dtype=torch.float32, device=device)
        self.native = plan.driver.native.Plan(
            tables={
                **{name: address(tensor) for name, tensor in self.tensors.items()},
                "host_inputs": address(self._host_view),
                "device": plan.driver.index(device),
                "n_groups": plan.n_groups,
                "n_rows": len(rows),
                "n_chunks": len(chunks),
                "n_elements": sum(numels),
                "n_totals": count,
                "own_total": number,
            },
            rule=plan.rule,
            amsgrad=plan.rule == "adamw" and any(len(row.states) == 3 for row in plan.rows),
        )
        self._kept: tuple[Tensor | None, ...] = ()
        self._streams = {plan.driver.stream(device)}

    def local(self, value: Tensor | None) -> Tensor | None:
        """``value`` on this device, by a copy that the device orders after what made it."""
        return None if value is None else value.to(self.device, non_blocking=True)

    def begin(self, plan: CudaPlan, step: StepInputs, first: bool) -> None:
        stream, capturing = plan.driver.stream(self.device), plan.driver.capturing(self.device)
        if capturing:
            plan.captured = True
        elif stream not in self._streams:
            self._streams.add(stream)
            for tensor in (*self.tensors.values(), self.scalars, *plan.staged_params(self.device)):
                plan.driver.record_stream(tensor, self.device)
        grad_scale, found_inf = self.local(step.grad_scale), self.local(step.found_inf)
        numbers = [(field, self.local(number)) for field, number in step.device_numbers]
        self._kept = (grad_scale, found_inf, *(number for _, number in numbers))
        if not first:
            self.host_inputs[:] = plan._inputs
        for i, (field, number) in enumerate(numbers):
            assert number is not None
            is_double = number.dtype == torch.float64
            at = plan.numbers_at + i * DEVICE_NUMBER.size
            DEVICE_NUMBER.pack_into(self.host_inputs, at, address(number), field, is_double)
        self.native.begin(
            norm_type=step.norm_type,
            max_grad_norm=-1.0 if step.max_grad_norm is None else step.max_grad_norm,
            measured=step.measured,
            skip_nonfinite=step.skip_nonfinite,
            max_grad_value=math.inf if step.max_grad_value is None else step.max_grad_value,
            grad_scale=address(grad_scale),
            found_inf=address(found_inf),
            inf_flag=address(step.inf_flag) if first else 0,
            scalars=address(step.scalars if first else self.scalars),
            n_device_numbers=len(numbers),
            stream=stream,
            capturing=capturing,
        )


class CudaPlan(TablePlan):
    """A plan with its tables on every device that has parameters."""

    def __init__(
        self,
        rule: str,
        rows: Sequence[Row],
        layout: object,
        groups: list[Group],
        state: dict[Tensor, Any],
    ) -> None:
        self.driver = driver()
        self.n_groups = len(groups)
        self.numbers_at = self.n_groups * OPTIONS_BYTES
        numbers_bytes = self.n_groups * DEVICE_NUMBERS * DEVICE_NUMBER.size
        super().__init__(rule, rows, layout, groups, state, self.numbers_at + numbers_bytes)
        devices = list(dict.fromkeys(self.device_of(row) for row in self.rows))
        self.parts = [_Part(self, d, number, len(devices)) for number, d in enumerate(devices)]

    def device_of(self, row: Row) -> torch.device:
        return row.dense.device

    def begin(self, step: StepInputs) -> None:
        self._inputs[: len(step.options)] = step.options
        for number, part in enumerate(self.parts):
            part.begin(self, step, first=number == 0)

    def staged_params(self, device: torch.device) -> list[Tensor]:
        return [row.dense for row in self._staged_params if self.device_of(row) == device]

    def _dense_grad(self, index: int, grad: Tensor) -> Tensor:
        staged = super()._dense_grad(index, grad)
        self.driver.record_stream(staged, staged.device)
        return staged

    def exchange_totals(self) -> None:
        for number, source in enumerate(self.parts):
            for part in self.parts:
                if part is not source:
                    total = source.tensors["totals"][number]
                    part.tensors["totals"][number].copy_(total, non_blocking=True)

    def nbytes(self) -> int:
        tables = [self._inputs_view, *(t for part in self.parts for t in part.tensors.values())]
        return sum(t.numel() * t.element_size() for t in tables) + self.staging_nbytes()


class CudaBackend:
    """Kernels of ``csrc/cuda``, on the caller's current stream of each device."""

    name = "cuda"

    def plan(
        self,
        rule: str,
        rows: Sequence[Row],
        layout: object,
        groups: list[Group],
        state: dict[Tensor, Any],
    ) -> Plan:
        return CudaPlan(rule, rows, layout, groups, state)

    def reduce(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, CudaPlan)
        plan.begin(step)
        alone = len(plan.parts) == 1
        for part in plan.parts:
            part.native.reduce(finalizes=alone)

    def finalize(self, plan: Plan, step: StepInputs) -> None:
        """Nothing is left to do where the last block of ``reduce`` has done it."""
        assert isinstance(plan, CudaPlan)
        if not step.measured:
            plan.begin(step)
        elif len(plan.parts) == 1:
            return
        else:
            plan.exchange_totals()
        for part in plan.parts:
            part.native.finalize()

    def update(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, CudaPlan)
        for part in plan.parts:
            part.native.update()
