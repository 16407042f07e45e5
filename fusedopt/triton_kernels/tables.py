"""The tables of a plan as kernels see them (csrc/records.h), and access to them.

Addresses are int64.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property

import triton
import triton.language as tl

from fusedopt.backends import records

CHUNK_ELEMENTS = tl.constexpr(records.CHUNK_ELEMENTS)
LANES = tl.constexpr(256)  # kLanes
PARAM, MASTER, STATES_FROM = map(tl.constexpr, (0, 1, records.STREAMS - records.MAX_STATES))
CODEC_BITS = tl.constexpr(records.CODEC_BITS)
CODEC_MASK = tl.constexpr((1 << records.CODEC_BITS) - 1)
NORM_IS_TWO = tl.constexpr(records.NORM_IS_TWO)
MEASURED = tl.constexpr(records.MEASURED)
SKIP_NONFINITE = tl.constexpr(records.SKIP_NONFINITE)
UNCOUNTED = tl.constexpr(records.UNCOUNTED)

TYPES = {("q", 8): tl.int64, ("q", 4): tl.int32, ("d", 8): tl.float64, ("f", 4): tl.float32}


@dataclass(frozen=True)
class Layout:
    """Where the fields of a record lie. Its repr is part of the key in Triton's cache."""

    names: tuple[str, ...]
    offsets: tuple[int, ...]
    types: tuple[tl.dtype | None, ...]  # None: an array
    size: int

    @cached_property
    def Fields(self) -> type:
        return namedtuple("Fields", self.names)


def layout(record: records.Record, n_bytes: int | None = None) -> Layout:
    """The layout of ``record``; ``n_bytes`` if it is longer than its fields."""
    types = tuple(TYPES.get((kind, size)) for _, _, size, kind in record.fields)
    names, offsets, *_ = zip(*record.fields, strict=True)
    return Layout(names, offsets, types, n_bytes or record.size)


ROW = tl.constexpr(layout(records.ROW))
GRAD = tl.constexpr(layout(records.GRAD))
CHUNK = tl.constexpr(layout(records.CHUNK))
DEVICE_NUMBER = tl.constexpr(layout(records.DEVICE_NUMBER))
STEP = tl.constexpr(layout(records.STEP))
STEP_SCALARS = tl.constexpr(layout(records.STEP_SCALARS))


@triton.jit
def load(address, TYPE: tl.constexpr, wanted=True):
    """Zeros where ``wanted`` is false."""
    return tl.load(address.to(tl.pointer_type(TYPE)), mask=wanted, other=0)


@triton.jit
def store(address, value, wanted=True):
    tl.store(address.to(tl.pointer_type(value.dtype)), value, mask=wanted)


@triton.jit
def fields_at(RECORD: tl.constexpr, table, number=0):
    """Addresses of the fields of a record, or of a block of them."""
    addresses = ()
    for k in tl.static_range(len(RECORD.names)):
        addresses = addresses + (table + number * RECORD.size + RECORD.offsets[k],)
    return RECORD.Fields(*addresses)


@triton.jit
def read(RECORD: tl.constexpr, table, number=0, wanted=True):
    """The values of the fields; an array's address. The compiler drops loads of unused fields."""
    at = fields_at(RECORD, table, number)
    values = ()
    for k in tl.static_range(len(RECORD.names)):
        if RECORD.types[k] is None:
            values = values + (at[k],)
        else:
            values = values + (load(at[k], RECORD.types[k], wanted),)
    return RECORD.Fields(*values)


@triton.jit
def span_of(chunk, row, grad):
    """The chunk's first element in its row, and how many there are to work on."""
    begin = chunk.index.to(tl.int64) * CHUNK_ELEMENTS
    left = row.numel - begin
    n = tl.where(left < CHUNK_ELEMENTS, left, CHUNK_ELEMENTS).to(tl.int32)
    return begin, tl.where(grad.present != 0, n, 0)
