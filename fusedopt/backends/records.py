"""The records that Python writes and kernels read: csrc/records.h in Python."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import plan
from ..plan.plan import KERNEL_DTYPES, N_STEP_SCALARS, Row

CHUNK_ELEMENTS = 8192  # kChunk
STREAMS = 5  # param, master, states
MAX_STATES = STREAMS - 2
WORDS = 24  # the norm as integers, 8 bytes each (csrc/words.h)
DIGITS, LOWEST = 20, -352  # of the words; digit d counts 2^(32 d + LOWEST)
INF_CHUNKS, NAN_CHUNKS, LARGEST, VOTES = range(DIGITS, WORDS)
CODECS = {dtype: code for code, dtype in enumerate(KERNEL_DTYPES)}  # of params and gradients
CODEC_BITS = 4  # of a stream in Row.codecs

NORM_IS_TWO, MEASURED, SKIP_NONFINITE, UNCOUNTED, EXACT = 1, 2, 4, 8, 16  # StepRecord::Flag

VOTE_BITS = 21  # kVoteBits; the votes of a rank, in the last of its words
FINGERPRINTS = 1 << 32  # kFingerprints
FOUND_INF, BAD_SCALE, ABORT = (1 << VOTE_BITS * i for i in range(3))  # enum class Vote
BY_ABORT, BY_OPTIONS = 1, 2  # enum class Refusal

READY, AWAITS_STATE, STAGED, FROZEN = range(4)  # RowKind in csrc/watch/watch.h


class Record:
    """Fields in order, each with its ``struct`` format."""

    def __init__(self, **fields: str) -> None:
        # Name, offset and size in bytes, and `d`, `f`, or `q` for anything else.
        self.fields: list[tuple[str, int, int, str]] = []
        at = 0
        for name, format in fields.items():
            size = struct.calcsize(f"={format}")
            self.fields.append((name, at, size, format if format in ("d", "f") else "q"))
            at += size
        packed = struct.Struct("=" + "".join(fields.values()))
        self.pack, self.pack_into = packed.pack, packed.pack_into
        self.format, self.size = packed.format, packed.size


ROW = Record(
    **{"data": f"{STREAMS}Q", "step": "Q", "numel": "q", "group": "i", "codecs": "I"},
    **{"scales": f"{STREAMS}Q", "uncounted": "q", "first": "q", "reserved": "8x"},
)
GRAD = Record(data="Q", codec="i", present="i")
CHUNK = Record(row="i", index="i", position="q")
DEVICE_NUMBER = Record(data="Q", field="i", is_double="i")
STEP = Record(
    **{"max_grad_norm": "d", "max_grad_value": "d"},
    **{"grad_scale": "Q", "found_inf": "Q", "inf_flag": "Q", "scalars": "Q"},
    **{"n_device_numbers": "q", "flags": "Q", "n_ranks": "Q", "fingerprint": "Q"},
    **{"refusal": "Q", "reserved": "8x"},
)
STEP_SCALARS = Record(
    **dict.fromkeys(("grad_norm", "clip_coef", "grad_mult", "inv_scale"), "f"),
    **dict.fromkeys(("found_inf", "skip", "skipped_steps", "reserved"), "f"),
)
assert STEP_SCALARS.size == 4 * N_STEP_SCALARS
assert all(getattr(plan, f[0].upper(), i) == i for i, f in enumerate(STEP_SCALARS.fields))
RECORDS = {
    "Row": ROW,
    "Grad": GRAD,
    "Chunk": CHUNK,
    "DeviceNumber": DEVICE_NUMBER,
    "StepRecord": STEP,
    "StepScalars": STEP_SCALARS,
}


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
    """The table of rows. A row of another device is ``None``, and gets an empty record."""
    return bytearray(b"".join(bytes(ROW.size) if row is None else pack_row(row) for row in rows))


def pack_row(row: Row) -> bytes:
    """The row as a ``Row`` record."""
    streams: list[Tensor | None] = [row.dense, row.master, *row.states]
    streams += [None] * (STREAMS - len(streams))
    scales = [None, None, *row.scales]
    scales += [None] * (STREAMS - len(scales))
    return ROW.pack(
        *map(address, streams),
        address(row.step),
        row.dense.numel(),
        row.group,
        sum(codec.number << CODEC_BITS * stream for stream, codec in enumerate(row.codecs)),
        *map(address, scales),
        not row.counted,
        row.first,
    )
