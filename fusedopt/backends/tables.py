"""A plan as tables of addresses, for the backends whose kernels are native code.

The records mirror ``csrc/plan.h``; each backend compares the sizes when its module is loaded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import Group, Layout, Look, Plan, Row

CHUNK_ELEMENTS = 8192  # kChunk
ROW = struct.Struct("=6Qqii")  # param, master, state[3], step; numel; group, dtype
GRAD = struct.Struct("=Qii")  # data; dtype, present
EMPTY_ROW = bytes(ROW.size)
CHUNK_BYTES = 16
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_STATES = 3

READY, AWAITS_STATE, STAGED, FROZEN = range(4)  # RowKind in csrc/cpu/watch.h


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def chunk_table(numels: Sequence[int]) -> Tensor:
    """``Chunk`` records of rows with the given lengths, as int64 [n_chunks, 2].

    First column: row in the low 32 bits, index in the high 32; second: elements before the chunk.
    """
    lengths = torch.tensor(numels, dtype=torch.int64, device="cpu")
    counts = (lengths + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS
    row = torch.repeat_interleave(counts)
    first_chunk = torch.cumsum(counts, 0) - counts
    index = torch.arange(row.numel(), device="cpu") - first_chunk[row]
    before_row = torch.cumsum(lengths, 0) - lengths
    position = before_row[row] + index * CHUNK_ELEMENTS
    return torch.stack([row | (index << 32), position], dim=1).contiguous()


def pack_rows(rows: Sequence[Row | None]) -> bytearray:
    """The table of rows; of ``None``, a row that is not for this device, an empty record."""
    return bytearray(b"".join(EMPTY_ROW if row is None else pack_row(row) for row in rows))


def pack_row(row: Row) -> bytes:
    """The row as a ``Row`` record."""
    states = [address(t) for t in row.states] + [0] * (MAX_STATES - len(row.states))
    return ROW.pack(
        address(row.dense),
        address(row.master),
        *states,
        address(row.step),
        row.dense.numel(),
        row.group,
        DTYPE_CODES[row.dense.dtype],
    )


def _watch(groups: list[Group], state: dict[Tensor, Any], kinds: list[int]) -> Any:
    """What looks at every tensor before each step."""
    from . import native
    from .watch import PythonWatch

    watch = native.watch if native.unavailable_reason() is None else PythonWatch
    return watch(groups, state, kinds)


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
        self._watch = _watch(groups, state, [self._kind(row) for row in self.rows])
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
