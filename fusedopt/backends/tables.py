"""A plan as tables of addresses, for the backends whose kernels are native code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan.local import dtensor_type
from ..plan.options_table import DeviceNumbers
from ..plan.plan import Layout, Look, Plan, Row, StepInputs
from ..rules.declaration import DEVICE_NUMBERS, OPTIONS_BYTES, Group, Rule
from . import modules
from .records import (
    CHUNK,
    CHUNK_ELEMENTS,
    CODECS,
    DEVICE_NUMBER,
    EXACT,
    GRAD,
    MEASURED,
    NORM_IS_TWO,
    ROW,
    SKIP_NONFINITE,
    STEP,
    UNCOUNTED,
    WORDS,
    address,
)
from .watch import PythonWatch, row_kind


def plan_nbytes(rule: Rule, numels: Sequence[int], n_groups: int, on_device: bool) -> int:
    """What ``nbytes()`` of a plan will be, without the copies of what has gaps.

    Args:
        numels: elements of each row; 0 for one that no step touches.
        on_device: of a GPU backend with one device, else of the CPU's.
    """
    n_rows, groups = max(len(numels), 1), max(n_groups, 1)
    inputs = STEP.size + groups * (OPTIONS_BYTES + DEVICE_NUMBERS * DEVICE_NUMBER.size)
    inputs += n_rows * GRAD.size
    n_chunks = sum(-(-n // CHUNK_ELEMENTS) for n in numels)
    tables = n_rows * (ROW.size + rule.row_step_bytes) + max(n_chunks, 1) * CHUNK.size
    if on_device:
        return 2 * inputs + tables + 2 * 8 * WORDS + 16  # the words, their sums and the ticket
    return inputs + tables + 8 * WORDS


class TablePlan(Plan):
    """Keeps the table of inputs, which is written before every step.

    The table has the step's record, a line of options for each group, the numbers that stay on a
    device, and the gradients. A watch fills in the gradients.
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
        tensors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor],
        numbers: DeviceNumbers,
    ) -> None:
        """Write all but the gradients into ``inputs``.

        Args:
            tensors: ``grad_scale``, ``found_inf``, ``inf_flag`` and ``scalars`` of the device.
            numbers: ``step.device_numbers`` on the device.
        """
        options = step.options
        flags = MEASURED if step.measured else 0
        if options.norm_type != math.inf:
            flags += NORM_IS_TWO
        if step.norm_is_exact:
            flags += EXACT
        if step.skip_nonfinite:
            flags += SKIP_NONFINITE
        n_ranks = 0
        if step.ranks is not None:
            n_ranks = step.ranks.size
            if step.ranks.uncounted:
                flags += UNCOUNTED
        grad_scale, found_inf, inf_flag, scalars = tensors
        STEP.pack_into(
            inputs,
            0,
            -1.0 if options.max_grad_norm is None else options.max_grad_norm,
            math.inf if options.max_grad_value is None else options.max_grad_value,
            0 if grad_scale is None else grad_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
            0 if inf_flag is None else inf_flag.data_ptr(),
            scalars.data_ptr(),
            len(numbers),
            flags,
            n_ranks,
            step.fingerprint,
            0 if step.ranks is None else address(self.told),
        )
        inputs[self.options_at : self.options_at + len(step.table)] = step.table
        at = self.numbers_at
        for field, number in numbers:
            is_double = number.dtype == torch.float64
            DEVICE_NUMBER.pack_into(inputs, at, address(number), field, is_double)
            at += DEVICE_NUMBER.size

    def refusal(self) -> int:
        refusal = int(self.told.item())
        if refusal:
            self.told.zero_()
        return refusal

    def look_at(self, groups: list[Group], state: dict[Tensor, Any]) -> None:
        native, _ = modules.load("_cpu")
        watch: Any = PythonWatch if native is None else native.Watch
        self._watch = watch(groups, state, list(map(row_kind, self.rows)), dtensor_type())
        self._params = [row.param for row in self.rows]

    def _look(self, groups: list[Group], state: dict[Tensor, Any]) -> Look | None:
        look: Look | None = self._watch.refresh(groups, state, self._grads_address)
        return look

    def _use_grad(self, index: int, grad: Tensor) -> None:
        dense = self._dense_grad(index, grad)
        offset = self.grads_at + index * GRAD.size
        GRAD.pack_into(self._inputs, offset, address(dense), CODECS[dense.dtype], 1)

    def updated_params(self) -> list[Tensor]:
        return super().updated_params() if self._absent else self._params
