"""The tables of a plan as kernels see them (csrc/records.h), and access to them.

Addresses are int64, and so is a field's: the record's plus the field's offset in bytes.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fusedopt.backends import records
from fusedopt.rules import declaration

CHUNK = tl.constexpr(records.CHUNK_ELEMENTS)
LANES = tl.constexpr(256)  # kLanes


def _offsets(record: records.Record, *names: str) -> list[tl.constexpr]:
    offsets = {name: offset for name, offset, *_ in record.fields}
    return [tl.constexpr(offsets[name]) for name in names]


ROW_BYTES = tl.constexpr(records.ROW.size)
ROW_DATA, ROW_STEP, ROW_NUMEL, ROW_GROUP, ROW_CODECS = _offsets(
    records.ROW, "data", "step", "numel", "group", "codecs"
)
PARAM, MASTER, STATES_FROM = map(tl.constexpr, (0, 1, records.STREAMS - records.MAX_STATES))
CODEC_BITS = tl.constexpr(records.CODEC_BITS)
CODEC_MASK = tl.constexpr((1 << records.CODEC_BITS) - 1)

GRAD_BYTES = tl.constexpr(records.GRAD.size)
GRAD_DATA, GRAD_CODEC, GRAD_PRESENT = _offsets(records.GRAD, "data", "codec", "present")

CHUNK_BYTES = tl.constexpr(records.CHUNK.size)
CHUNK_ROW, CHUNK_INDEX = _offsets(records.CHUNK, "row", "index")

NUMBER_BYTES = tl.constexpr(records.DEVICE_NUMBER.size)
NUMBER_DATA, NUMBER_FIELD, NUMBER_IS_DOUBLE = _offsets(
    records.DEVICE_NUMBER, "data", "field", "is_double"
)

OPTIONS_BYTES = tl.constexpr(declaration.OPTIONS_BYTES)

MAX_GRAD_NORM, MAX_GRAD_VALUE, N_NUMBERS, FLAGS = _offsets(
    records.STEP, "max_grad_norm", "max_grad_value", "n_device_numbers", "flags"
)
GRAD_SCALE, FOUND_INF, INF_FLAG, SCALARS = _offsets(
    records.STEP, "grad_scale", "found_inf", "inf_flag", "scalars"
)
NORM_IS_TWO = tl.constexpr(records.NORM_IS_TWO)
MEASURED = tl.constexpr(records.MEASURED)
SKIP_NONFINITE = tl.constexpr(records.SKIP_NONFINITE)

S_GRAD_NORM, S_CLIP_COEF, S_GRAD_MULT, S_INV_SCALE, S_FOUND_INF, S_SKIP, S_SKIPPED_STEPS = _offsets(
    records.STEP_SCALARS,
    *("grad_norm", "clip_coef", "grad_mult", "inv_scale", "found_inf", "skip", "skipped_steps"),
)


@triton.jit
def load(address, TYPE: tl.constexpr):
    return tl.load(address.to(tl.pointer_type(TYPE)))


@triton.jit
def load_if(wanted, address, TYPE: tl.constexpr):
    """Zeros where nothing is loaded."""
    return tl.load(address.to(tl.pointer_type(TYPE)), mask=wanted, other=0)


@triton.jit
def store(address, value):
    tl.store(address.to(tl.pointer_type(value.dtype)), value)


@triton.jit
def store_if(wanted, address, value):
    tl.store(address.to(tl.pointer_type(value.dtype)), value, mask=wanted)


@triton.jit
def options_of(group, wanted, RULE: tl.constexpr):
    """The words of the Options at ``group``, each of its kind."""
    options = ()
    for k in tl.static_range(len(RULE.kinds)):
        value = load_if(wanted, group + 8 * k, tl.int64)
        if RULE.kinds[k] == "d":
            options = options + (value.to(tl.float64, bitcast=True),)
        else:
            options = options + (value,)
    return options


@triton.jit
def chunk_elements(numel, index):
    """Elements of a row's chunk, at most CHUNK."""
    left = numel - index.to(tl.int64) * CHUNK
    return tl.where(left < CHUNK, left, CHUNK).to(tl.int32)
