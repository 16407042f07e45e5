"""A plan as tables of addresses, for the backends whose kernels are native code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan.plan import Layout, Look, Plan, Row, StepInputs
from ..rules.declaration import OPTIONS_BYTES, Group, Rule
from . import modules
from .records import (
    AWAITS_STATE,
    CODECS,
    DEVICE_NUMBER,
    DEVICE_NUMBERS,
    FROZEN,
    GRAD,
    MEASURED,
    NORM_IS_TWO,
    READY,
    SKIP_NONFINITE,
    STAGED,
    STEP,
    address,
)
from .watch import PythonWatch


class TablePlan(Plan):
    """Keeps the table of inputs, which is written before every step.

    In it are the step's record, a line of options for each group, the numbers that a device keeps
    itself, and the gradients, which a watch fills in.
    """

    def __init__(self, rule: Rule, rows: Sequence[Row], layout: Layout) -> None:
        super().__init__(rule, rows, layout)
        self.n_groups = max(len(layout), 1)
        self.options_at = STEP.size
        self.numbers_at = self.options_at + self.n_groups * OPTIONS_BYTES
        self.grads_at = self.numbers_at + self.n_groups * DEVICE_NUMBERS * DEVICE_NUMBER.size
        self._inputs = bytearray(self.grads_at + max(len(self.rows), 1) * GRAD.size)
        self._inputs_view = torch.frombuffer(self._inputs, dtype=torch.uint8)  # pins its address
        self._grads_address = address(self._inputs_view) + self.grads_at

    def pack_step(
        self,
        inputs: bytearray,
        step: StepInputs,
        scalars: Tensor,
        inf_flag: Tensor | None,
        local: Callable[[Tensor | None], Tensor | None],
    ) -> list[Tensor | None]:
        """Write all but the gradients into ``inputs``, with what ``local`` makes of each tensor.

        Returns:
            The tensors whose addresses are in the table.
        """
        numbers = [(field, local(number)) for field, number in step.device_numbers]
        kept = [local(step.grad_scale), local(step.found_inf), *(n for _, n in numbers)]
        flags = NORM_IS_TWO * (step.norm_type != math.inf)
        flags += MEASURED * step.measured + SKIP_NONFINITE * step.skip_nonfinite
        addresses = (address(kept[0]), address(kept[1]), address(inf_flag), address(scalars))
        thresholds = (step.clip_threshold, step.value_threshold)
        STEP.pack_into(inputs, 0, *thresholds, *addresses, len(numbers), flags)
        inputs[self.options_at : self.options_at + len(step.options)] = step.options
        for i, (field, number) in enumerate(numbers):
            assert number is not None
            is_double = number.dtype == torch.float64
            at = self.numbers_at + i * DEVICE_NUMBER.size
            DEVICE_NUMBER.pack_into(inputs, at, address(number), field, is_double)
        return kept

    def look_at(self, groups: list[Group], state: dict[Tensor, Any]) -> None:
        native, _ = modules.load("_cpu")
        watch: Any = PythonWatch if native is None else native.Watch
        self._watch = watch(groups, state, [self._kind(row) for row in self.rows])
        self._params = [row.param for row in self.rows]

    @staticmethod
    def _kind(row: Row) -> int:
        if not row.served:
            return FROZEN
        if row.awaits_state:
            return AWAITS_STATE
        return STAGED if row.staged else READY

    def _look(self, groups: list[Group], state: dict[Tensor, Any]) -> Look | None:
        look: Look | None = self._watch.refresh(groups, state, self._grads_address)
        return look

    def _use_grad(self, index: int, grad: Tensor) -> None:
        dense = self._dense_grad(index, grad)
        offset = self.grads_at + index * GRAD.size
        GRAD.pack_into(self._inputs, offset, address(dense), CODECS[dense.dtype], 1)

    def updated_params(self) -> list[Tensor]:
        return super().updated_params() if self._absent else self._params
