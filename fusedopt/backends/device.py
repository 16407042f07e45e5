"""Shared by the GPU backends: the tables of a plan on every device, and the order of launches.

A steady step is two launches whatever the number of tensors: ``reduce``, whose last block
finalizes, and ``update``. The table of gradient addresses and options lies on the device, and is
written when it has changed. With parameters on several devices every device reduces, the words of
each are copied to all, and every device finalizes for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..plan.exchange import Ranks
from ..plan.plan import HALF_DTYPES, N_STEP_SCALARS, Layout, Plan, Row, StepInputs
from ..rules.declaration import Rule
from .driver import Driver
from .records import CHUNK, LARGEST, ROW, WORDS, address, chunk_table, pack_rows
from .tables import TablePlan

T = TypeVar("T", Tensor, "Tensor | None")


class DeviceTables:
    """The tables of one device, and its launches.

    Attributes:
        tensors: the tables by name, as bytes on the device.
        host_inputs: new contents of the table of inputs; its gradients begin at ``grads_at``.
        arguments: addresses and counts, by the names that kernels have for them.
        n_states: of a parameter, at most.
        half_params: some param is fp16 or bf16.
        coded: some row has streams that the kernels for fp32 state cannot read.
    """

    def __init__(self, plan: DevicePlan, device: torch.device, number: int, count: int) -> None:
        self.device, self.rule = device, plan.rule
        self._driver = plan.driver
        rows = self._rows_of(plan)
        own = [row for row in rows if row is not None]
        chunks = chunk_table([0 if row is None else row.dense.numel() for row in rows])
        self.host_inputs = plan._inputs if number == 0 else bytearray(len(plan._inputs))
        self.host_view = torch.frombuffer(self.host_inputs, dtype=torch.uint8)  # pins its address
        self.grads_at = plan.grads_at
        self.tensors = {
            "inputs": self._zeros(len(self.host_inputs)),
            "rows": self._zeros(max(len(rows), 1) * ROW.size),
            "chunks": self._zeros(max(len(chunks), 1) * CHUNK.size),
            "row_steps": self._zeros(max(len(rows), 1) * plan.rule.row_step_bytes),
            # The blocks of reduce add to the sums. Sums and ticket are zero between launches.
            "sums": self._zeros(WORDS * 8),
            "words": self._zeros(count * WORDS * 8),  # of each device, once reduce is over
            "ticket": self._zeros(16),
        }
        self.write_rows(plan)
        self.tensors["chunks"][: len(chunks) * CHUNK.size].copy_(chunks.view(torch.uint8).flatten())
        inputs = address(self.tensors["inputs"])
        self.arguments = {
            **{name: address(tensor) for name, tensor in self.tensors.items()},
            **{"step": inputs, "options": inputs + plan.options_at},
            **{"numbers": inputs + plan.numbers_at, "grads": inputs + plan.grads_at},
            **{"n_rows": len(rows), "n_chunks": len(chunks)},
            **{"n_devices": count, "own_number": number},  # of those that share the norm
        }
        self.n_states = max((len(row.states) for row in plan.rows), default=0)
        self.half_params = any(row.dense.dtype in HALF_DTYPES for row in own)
        self.coded = any(row.is_coded for row in own)
        # The first part uses the optimizer's own scalars; the others have scalars of their own.
        self.scalars = torch.zeros(N_STEP_SCALARS, dtype=torch.float32, device=device)
        self.launches = plan.driver.launches(self)
        self._kept: list[Tensor | None] = []
        self._streams = {plan.driver.stream(device)}

    def _zeros(self, n_bytes: int) -> Tensor:
        return torch.zeros(n_bytes, dtype=torch.uint8, device=self.device)

    def _rows_of(self, plan: DevicePlan) -> list[Row | None]:
        """The plan's rows, with ``None`` for those of other devices."""
        here = [row.served and plan.device_of(row) == self.device for row in plan.rows]
        return [row if own else None for row, own in zip(plan.rows, here, strict=True)]

    def write_rows(self, plan: DevicePlan) -> None:
        if plan.rows:
            packed = torch.frombuffer(pack_rows(self._rows_of(plan)), dtype=torch.uint8)
            self.tensors["rows"].copy_(packed)

    @property
    def on_one_stream(self) -> bool:
        return self._streams == {self._driver.stream(self.device)}

    def words_of(self, number: int) -> Tensor:
        return self.tensors["words"][number * WORDS * 8 : (number + 1) * WORDS * 8]

    def local(self, value: T) -> T:
        """``value`` on this device; the copy is ordered after the work that makes ``value``."""
        return None if value is None else value.to(self.device, non_blocking=True)

    def begin(self, plan: DevicePlan, step: StepInputs, first: bool) -> None:
        stream, capturing = plan.driver.stream(self.device), plan.driver.capturing(self.device)
        if capturing:
            plan.capture()
        elif stream not in self._streams:
            self._streams.add(stream)
            for tensor in (*self.tensors.values(), self.scalars, *plan.staged_params(self.device)):
                plan.driver.record_stream(tensor, self.device)
        if not first:
            self.host_inputs[plan.grads_at :] = plan._inputs[plan.grads_at :]
        scalars, inf_flag = (step.scalars, step.inf_flag) if first else (self.scalars, None)
        grad_scale, found_inf = self.local(step.grad_scale), self.local(step.found_inf)
        numbers = [(field, self.local(number)) for field, number in step.device_numbers]
        self._kept = [grad_scale, found_inf, *(number for _, number in numbers)]
        tensors = (grad_scale, found_inf, inf_flag, scalars)
        plan.pack_step(self.host_inputs, step, tensors, numbers)
        self.launches.begin(stream, capturing)


class DevicePlan(TablePlan):
    """A plan with its tables on every device that has parameters, and the verbs as launches of a
    driver on the caller's current stream of each device."""

    answers_late = True

    def __init__(self, driver: Driver, rule: Rule, rows: Sequence[Row], layout: Layout) -> None:
        self.driver = driver
        super().__init__(rule, rows, layout)
        devices = list(dict.fromkeys(self.device_of(row) for row in self.rows if row.served))
        self.parts = [DeviceTables(self, d, i, len(devices)) for i, d in enumerate(devices)]
        self._finalized = False

    def rebind(self, rows: Sequence[Row]) -> bool:
        """False also after use on another stream, which could still read the table of rows."""
        usable = all(part.on_one_stream for part in self.parts)
        return usable and super().rebind(rows)

    def _write_rows(self) -> None:
        for part in self.parts:
            part.write_rows(self)

    def device_of(self, row: Row) -> torch.device:
        return row.dense.device

    def staged_params(self, device: torch.device) -> list[Tensor]:
        return [row.dense for row in self._staged_params if self.device_of(row) == device]

    def hear(self, told: Tensor | None) -> None:
        self.told = self.driver.host_words.taken_over(told)

    def _dense_grad(self, index: int, grad: Tensor) -> Tensor:
        staged = super()._dense_grad(index, grad)
        self.driver.record_stream(staged, staged.device)
        return staged

    def begin(self, step: StepInputs) -> None:
        self._finalized = False
        self._ranks, self._options = step.ranks, step.options
        for number, part in enumerate(self.parts):
            part.begin(self, step, first=number == 0)

    def reduce(self) -> None:
        """On one device the last block finalizes, which saves a launch."""
        for part in self.parts:
            part.launches.reduce()
        self._finalized = len(self.parts) == 1 and self._ranks is None

    def exchange(self) -> None:
        if self._ranks is not None:
            self._exchange_with(self._ranks)
            return
        for number, source in enumerate(self.parts):
            for part in self.parts:
                if part is not source:
                    part.words_of(number).copy_(source.words_of(number), non_blocking=True)

    def _exchange_with(self, ranks: Ranks) -> None:
        """The ranks add up what their devices have together. Each device gets the total as the
        words of the first device, and zeros for the others."""
        first, *others = self.parts
        total = first.words_of(0).view(torch.int64)
        for number, part in enumerate(others, 1):
            words = first.local(part.words_of(number).view(torch.int64))
            largest = torch.maximum(total[LARGEST], words[LARGEST])
            total.add_(words)
            total[LARGEST] = largest
        ranks.add_up(total, self._options.norm_type)
        if others:
            first.tensors["words"][total.nbytes :].zero_()
        for part in others:
            part.tensors["words"].zero_()
            part.words_of(0).copy_(first.words_of(0), non_blocking=True)

    def finalize(self) -> None:
        if not self._finalized:
            for part in self.parts:
                part.launches.finalize()

    def update(self) -> None:
        """On all devices or none: an exception between two launches is raised after the last."""
        before = [part.launches.updates for part in self.parts]
        try:
            for part in self.parts:
                part.launches.update()
        except BaseException:
            left = [
                part.launches
                for part, count in zip(self.parts, before, strict=True)
                if part.launches.updates == count
            ]
            if len(left) < len(self.parts):
                for launches in left:
                    launches.update()
            raise

    def nbytes(self) -> int:
        tables = [self._inputs_view, *(t for part in self.parts for t in part.tensors.values())]
        return sum(t.nbytes for t in tables) + self.staging_nbytes()


class DeviceBackend:
    """Kernels of a driver."""

    name: str

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def plan(self, rule: Rule, rows: Sequence[Row], layout: Layout) -> Plan:
        return DevicePlan(self._driver, rule, rows, layout)
