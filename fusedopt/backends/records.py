"""The records that Python writes and kernels read (csrc/plan.h), and how tensors get into them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan.plan import Row

CHUNK_ELEMENTS = 8192  # kChunk
ROW = struct.Struct("=6Qqii")  # param, master, state[3], step; numel; group, dtype
GRAD = struct.Struct("=Qii")  # data; dtype, present
EMPTY_ROW = bytes(ROW.size)
CHUNK_BYTES = 16
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_STATES = 3

READY, AWAITS_STATE, STAGED, FROZEN = range(4)  # RowKind in csrc/watch/watch.h


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
