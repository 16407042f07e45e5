"""What the backends of GPUs share: the tables of a plan on every device, and the order of launches.

A steady step is two launches whatever the number of tensors: ``reduce``, whose last block
finalizes, and ``update``. The table of gradient addresses and options lies on the device, and is
written when it has changed. With parameters on several devices every device reduces, the totals
are exchanged, and every device finalizes for itself.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..plan.plan import HALF_DTYPES, N_STEP_SCALARS, OPTIONS_BYTES, Layout, Plan, Row, StepInputs
from .records import ROW, address, chunk_table, pack_rows
from .tables import TablePlan

DEVICE_NUMBER = struct.Struct("=Qii")  # data; field of the options table, fp64 (csrc/cuda/step.h)
DEVICE_NUMBERS = 4  # of a group, at most
ROW_STEP_BYTES = 32  # what finalize leaves for the update of one tensor


class Launches(Protocol):
    """The kernels over the tables of one device. Errors are ``RuntimeError`` and move nothing."""

    def begin(
        self,
        *,
        norm_type: float,
        max_grad_norm: float,
        measured: bool,
        skip_nonfinite: bool,
        max_grad_value: float,
        grad_scale: int,
        found_inf: int,
        inf_flag: int,
        scalars: int,
        n_device_numbers: int,
        stream: int,
        capturing: bool,
    ) -> None: ...

    def reduce(self, finalizes: bool) -> None: ...

    def finalize(self) -> None: ...

    def update(self) -> None: ...

    @property
    def updates(self) -> int:
        """Launches of ``update`` that did not fail, so far."""


@dataclass
class DeviceTables:
    """One device's part of a plan, as its launches are made from it."""

    device: torch.device
    rule: str
    amsgrad: bool  # some group uses it
    half_params: bool  # some param is fp16 or bf16
    n_groups: int
    n_rows: int
    n_chunks: int
    n_elements: int
    n_totals: int
    own_total: int
    host_inputs: bytearray  # options, device numbers, gradients, and what else the driver wants
    tensors: dict[str, Tensor]


class Driver(ABC):
    """A way to run kernels on torch's devices of one type."""

    device_type = "cuda"  # of ROCm, too
    step_bytes = 0  # that the driver wants for itself after the gradients in the table of inputs

    @abstractmethod
    def launches(self, tables: DeviceTables) -> Launches:
        """Raises ``RuntimeError`` if the device cannot run them."""

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


class _Part:
    """The tables of one device, and its launches."""

    def __init__(self, plan: DevicePlan, device: torch.device, number: int, count: int) -> None:
        self.device = device
        self._driver = plan.driver
        rows = self._rows_of(plan)
        numels = [0 if row is None else row.dense.numel() for row in rows]
        chunks = chunk_table(numels)
        self.host_inputs = plan._inputs if number == 0 else bytearray(len(plan._inputs))
        self._host_view = torch.frombuffer(self.host_inputs, dtype=torch.uint8)  # pins its address
        self.tensors = self._allocate(device, len(rows), len(chunks), count)
        self.write_rows(plan)
        self.tensors["chunks"][: len(chunks)].copy_(chunks)
        # The optimizer's own scalars live with the first part; others decide for themselves.
        self.scalars = torch.zeros(N_STEP_SCALARS, dtype=torch.float32, device=device)
        self.launches = plan.driver.launches(
            DeviceTables(
                device=device,
                rule=plan.rule,
                amsgrad=plan.rule == "adamw" and any(len(row.states) == 3 for row in plan.rows),
                half_params=any(row and row.dense.dtype in HALF_DTYPES for row in rows),
                n_groups=plan.n_groups,
                n_rows=len(rows),
                n_chunks=len(chunks),
                n_elements=sum(numels),
                n_totals=count,
                own_total=number,
                host_inputs=self.host_inputs,
                tensors=self.tensors,
            )
        )
        self._kept: tuple[Tensor | None, ...] = ()
        self._streams = {plan.driver.stream(device)}

    def _rows_of(self, plan: DevicePlan) -> list[Row | None]:
        """Those of this device."""
        here = [row.served and plan.device_of(row) == self.device for row in plan.rows]
        return [row if own else None for row, own in zip(plan.rows, here, strict=True)]

    def write_rows(self, plan: DevicePlan) -> None:
        if plan.rows:
            packed = torch.frombuffer(pack_rows(self._rows_of(plan)), dtype=torch.uint8)
            self.tensors["rows"].copy_(packed)

    @property
    def on_one_stream(self) -> bool:
        return self._streams == {self._driver.stream(self.device)}

    def _allocate(
        self, device: torch.device, n_rows: int, n_chunks: int, n_totals: int
    ) -> dict[str, Tensor]:
        row_bytes, step_bytes = max(n_rows, 1) * ROW.size, max(n_rows, 1) * ROW_STEP_BYTES
        return {
            "inputs": torch.zeros(len(self.host_inputs), dtype=torch.uint8, device=device),
            "rows": torch.empty(row_bytes, dtype=torch.uint8, device=device),
            "chunks": torch.empty(max(n_chunks, 1), 2, dtype=torch.int64, device=device),
            "partials": torch.zeros(max(n_chunks, 1), dtype=torch.float64, device=device),
            "row_steps": torch.zeros(step_bytes, dtype=torch.uint8, device=device),
            "totals": torch.zeros(n_totals, dtype=torch.float64, device=device),
            "ticket": torch.zeros(1, dtype=torch.int32, device=device),
        }

    def local(self, value: Tensor | None) -> Tensor | None:
        """``value`` on this device, by a copy that the device orders after what made it."""
        return None if value is None else value.to(self.device, non_blocking=True)

    def begin(self, plan: DevicePlan, step: StepInputs, first: bool) -> None:
        stream, capturing = plan.driver.stream(self.device), plan.driver.capturing(self.device)
        if capturing:
            plan.capture()
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
        self.launches.begin(
            norm_type=step.norm_type,
            max_grad_norm=step.clip_threshold,
            measured=step.measured,
            skip_nonfinite=step.skip_nonfinite,
            max_grad_value=step.value_threshold,
            grad_scale=address(grad_scale),
            found_inf=address(found_inf),
            inf_flag=address(step.inf_flag) if first else 0,
            scalars=address(step.scalars if first else self.scalars),
            n_device_numbers=len(numbers),
            stream=stream,
            capturing=capturing,
        )


class DevicePlan(TablePlan):
    """A plan with its tables on every device that has parameters."""

    def __init__(
        self,
        driver: Driver,
        rule: str,
        rows: Sequence[Row],
        layout: Layout,
    ) -> None:
        self.driver = driver
        self.n_groups = len(layout)
        self.numbers_at = self.n_groups * OPTIONS_BYTES
        numbers_bytes = self.n_groups * DEVICE_NUMBERS * DEVICE_NUMBER.size
        before = self.numbers_at + numbers_bytes
        super().__init__(rule, rows, layout, before, driver.step_bytes)
        devices = list(dict.fromkeys(self.device_of(row) for row in self.rows if row.served))
        self.parts = [_Part(self, d, number, len(devices)) for number, d in enumerate(devices)]

    def rebind(self, rows: Sequence[Row]) -> bool:
        """Another stream could still read the table of rows, which is written on this one."""
        usable = all(part.on_one_stream for part in self.parts)
        return usable and super().rebind(rows)

    def _write_rows(self) -> None:
        for part in self.parts:
            part.write_rows(self)

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


class DeviceBackend:
    """The three verbs as launches of a driver, on the caller's current stream of each device."""

    name: str

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def plan(self, rule: str, rows: Sequence[Row], layout: Layout) -> Plan:
        return DevicePlan(self._driver, rule, rows, layout)

    def reduce(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, DevicePlan)
        plan.begin(step)
        alone = len(plan.parts) == 1
        for part in plan.parts:
            part.launches.reduce(finalizes=alone)

    def finalize(self, plan: Plan, step: StepInputs) -> None:
        """Nothing is left to do where the last block of ``reduce`` has done it."""
        assert isinstance(plan, DevicePlan)
        if not step.measured:
            plan.begin(step)
        elif len(plan.parts) == 1:
            return
        else:
            plan.exchange_totals()
        for part in plan.parts:
            part.launches.finalize()

    def update(self, plan: Plan, step: StepInputs) -> None:
        """On all devices or on none: what a signal's handler raises between two is raised later."""
        assert isinstance(plan, DevicePlan)
        before = [part.launches.updates for part in plan.parts]
        try:
            for part in plan.parts:
                part.launches.update()
        except BaseException:
            left = [
                part.launches
                for part, count in zip(plan.parts, before, strict=True)
                if part.launches.updates == count
            ]
            if len(left) < len(plan.parts):
                for launches in left:
                    launches.update()
            raise
