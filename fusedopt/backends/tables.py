"""A plan as tables of addresses, for the backends whose kernels are native code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan.plan import Group, Layout, Look, Plan, Row
from . import modules
from .records import AWAITS_STATE, DTYPE_CODES, FROZEN, GRAD, READY, STAGED, address
from .watch import PythonWatch


class TablePlan(Plan):
    """Keeps the table of gradients, which a watch fills before every step.

    Args:
        before_grads, after_grads: bytes to leave free around the gradients, for a backend that
            hands over more.
    """

    def __init__(
        self,
        rule: str,
        rows: Sequence[Row],
        layout: Layout,
        before_grads: int = 0,
        after_grads: int = 0,
    ) -> None:
        super().__init__(rule, rows, layout)
        self._grads_at = before_grads
        grads_bytes = max(len(self.rows), 1) * GRAD.size
        self._inputs = bytearray(before_grads + grads_bytes + after_grads)
        self._inputs_view = torch.frombuffer(self._inputs, dtype=torch.uint8)
        self._grads_address = address(self._inputs_view) + before_grads

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
        offset = self._grads_at + index * GRAD.size
        GRAD.pack_into(self._inputs, offset, address(dense), DTYPE_CODES[dense.dtype], 1)

    def updated_params(self) -> list[Tensor]:
        return super().updated_params() if self._absent else self._params
