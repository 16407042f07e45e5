"""The CPU backend: plan rows as tables of addresses for ``fusedopt._cpu``.

The tables mirror ``csrc/plan.h``; sizes are compared when the module is loaded.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import Group, Plan, Row, StepInputs

try:
    from .. import _cpu

    _import_error: str | None = None
except ImportError as error:
    _import_error = str(error)

CHUNK_ELEMENTS = 8192  # kChunk
ROW = struct.Struct("=6Qqii")  # param, master, state[3], step; numel; group, dtype
GRAD = struct.Struct("=Qii")  # data; dtype, present
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_STATES = 3

SIMD_VARIABLE = "FUSEDOPT_SIMD"

# RowKind in csrc/cpu/watch.h
_READY, _AWAITS_STATE, _STAGED = range(3)


def unavailable_reason() -> str | None:
    """Why ``_cpu`` cannot be used, or ``None``."""
    if _import_error is None:
        return None
    try:
        from .._build_config import BUILD_CONFIG
    except ImportError:
        return _import_error
    built = BUILD_CONFIG.get("modules", {}).get("_cpu", {})
    reason: str = built.get("reason") or _import_error
    return reason


def details() -> dict[str, Any]:
    if _import_error is not None:
        return {}
    return {
        "simd": _cpu.simd(),
        "compiled_simd": _cpu.simd_levels(),
        "openmp": _cpu.built_with_openmp(),
    }


def _check_mirrors() -> None:
    mine = (ROW.size, GRAD.size, 16, CHUNK_ELEMENTS)
    native = (_cpu.ROW_BYTES, _cpu.GRAD_BYTES, _cpu.CHUNK_BYTES, _cpu.CHUNK_ELEMENTS)
    if mine != native:
        raise ImportError(
            f"fusedopt._cpu was built from other sources than this package (tables {native}, "
            f"expected {mine}); reinstall fusedopt"
        )


if _import_error is None:
    _check_mirrors()
    _cpu.use_torch(
        tensor_type=torch.Tensor,
        parameter_type=torch.nn.Parameter,
        is_neg=torch.Tensor.is_neg,
        exchange=torch.Tensor.__dlpack_c_exchange_api__,
    )
    if os.environ.get(SIMD_VARIABLE):
        _cpu.set_simd(os.environ[SIMD_VARIABLE])


def _address(tensor: Tensor | None) -> int:
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


class NativePlan(Plan):
    """A plan with its tables; the native ``Watch`` does the per-step look."""

    def __init__(
        self,
        rule: str,
        rows: Sequence[Row],
        layout: object,
        groups: list[Group],
        state: dict[Tensor, Any],
    ) -> None:
        super().__init__(rule, rows, layout)
        n = len(self.rows)
        self._rows = torch.frombuffer(
            bytearray(b"".join(self._pack(row) for row in self.rows) or ROW.size), dtype=torch.uint8
        )
        self._grad_bytes = bytearray(max(n, 1) * GRAD.size)
        self._grads = torch.frombuffer(self._grad_bytes, dtype=torch.uint8)
        self._row_scalars = torch.zeros(max(n, 1), 2, dtype=torch.float32, device="cpu")
        numels = [row.dense.numel() for row in self.rows]
        self._chunks = chunk_table(numels)
        n_partials = max(len(self._chunks), 1)
        self._partials = torch.zeros(n_partials, dtype=torch.float64, device="cpu")
        self._n_elements = sum(numels)
        self._native: Any = None
        self._scalars: Tensor | None = None
        self._watch = _cpu.Watch(groups, state, [self._kind(row) for row in self.rows])
        self._params = [row.param for row in self.rows]
        self._n_absent = 0

    @staticmethod
    def _pack(row: Row) -> bytes:
        states = [_address(t) for t in row.states] + [0] * (MAX_STATES - len(row.states))
        return ROW.pack(
            _address(row.dense),
            _address(row.master),
            *states,
            _address(row.step),
            row.dense.numel(),
            row.group,
            DTYPE_CODES[row.dense.dtype],
        )

    @staticmethod
    def _kind(row: Row) -> int:
        if row.awaits_state:
            return _AWAITS_STATE
        return _STAGED if row.staged else _READY

    def native(self, scalars: Tensor) -> Any:
        """The ``_cpu.Plan`` whose finalize writes to ``scalars``."""
        if self._scalars is not scalars:
            self._native = _cpu.Plan(
                rows=_address(self._rows),
                grads=_address(self._grads),
                row_scalars=_address(self._row_scalars),
                n_rows=len(self.rows),
                chunks=_address(self._chunks) or _address(self._partials),
                n_chunks=len(self._chunks),
                n_elements=self._n_elements,
                partials=_address(self._partials),
                step_scalars=_address(scalars),
            )
            self._scalars = scalars
        return self._native

    def _look(self, groups: list[Group], state: dict[Tensor, Any]) -> Sequence[int] | None:
        look = self._watch.refresh(groups, state, _address(self._grads))
        if look is None:
            return None
        odd, self._n_absent = look
        return odd

    def _set_grad(self, index: int, grad: Tensor) -> None:
        GRAD.pack_into(
            self._grad_bytes, index * GRAD.size, _address(grad), DTYPE_CODES[grad.dtype], 1
        )

    def updated_params(self) -> list[Tensor]:
        if self._n_absent == 0:
            return self._params
        return [p for p in self._params if p.grad is not None]

    def nbytes(self) -> int:
        tables = (self._rows, self._grads, self._row_scalars, self._chunks, self._partials)
        return sum(t.numel() * t.element_size() for t in tables) + self.staging_nbytes()


class CpuBackend:
    """Kernels of ``csrc/cpu``, on as many threads as torch uses."""

    name = "cpu"

    def plan(
        self,
        rule: str,
        rows: Sequence[Row],
        layout: object,
        groups: list[Group],
        state: dict[Tensor, Any],
    ) -> Plan:
        return NativePlan(rule, rows, layout, groups, state)

    def reduce(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, NativePlan)
        native = plan.native(step.scalars)
        _cpu.reduce(native, step.norm_type, _address(step.grad_scale), torch.get_num_threads())

    def finalize(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, NativePlan)
        _cpu.finalize(
            plan.native(step.scalars),
            plan.rule,
            step.options,
            step.norm_type,
            -1.0 if step.max_grad_norm is None else step.max_grad_norm,
            step.measured,
            step.skip_nonfinite,
            _address(step.grad_scale),
            _address(step.found_inf),
            _address(step.inf_flag),
        )

    def update(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, NativePlan)
        limit = math.inf if step.max_grad_value is None else step.max_grad_value
        native = plan.native(step.scalars)
        _cpu.update(native, plan.rule, step.options, limit, torch.get_num_threads())
