"""The CPU backend: the kernels of ``fusedopt._cpu`` over the tables of a plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import installation
from ..plan import Group, Layout, Plan, Row, StepInputs
from .tables import (
    CHUNK_BYTES,
    CHUNK_ELEMENTS,
    GRAD,
    ROW,
    TablePlan,
    address,
    chunk_table,
    pack_rows,
)

try:
    from .. import _cpu

    _import_error: str | None = installation.strange(_cpu)
except ImportError as error:
    _import_error = str(error)

SIMD_VARIABLE = "FUSEDOPT_SIMD"


def unavailable_reason() -> str | None:
    """Why ``_cpu`` cannot be used, or ``None``."""
    if _import_error is None:
        return None
    return reason_not_built("_cpu") or _import_error


def reason_not_built(module: str) -> str | None:
    """Why there is no such module: what setup.py wrote down, or what the folder shows."""
    return installation.recorded_reason(module) or installation.obstacle(module)


def details() -> dict[str, Any]:
    if _import_error is not None:
        return {}
    return {
        "simd": _cpu.simd(),
        "compiled_simd": _cpu.simd_levels(),
        "openmp": _cpu.built_with_openmp(),
    }


def _set_up() -> str | None:
    """Make the module ready; what is in the way, or ``None``."""
    mine = (ROW.size, GRAD.size, CHUNK_BYTES, CHUNK_ELEMENTS)
    native = (_cpu.ROW_BYTES, _cpu.GRAD_BYTES, _cpu.CHUNK_BYTES, _cpu.CHUNK_ELEMENTS)
    if mine != native:
        return (
            f"fusedopt._cpu was built from other sources than this package (tables {native}, "
            f"expected {mine}); reinstall fusedopt"
        )
    _cpu.use_torch(
        tensor_type=torch.Tensor,
        parameter_type=torch.nn.Parameter,
        is_neg=torch.Tensor.is_neg,
        exchange=torch.Tensor.__dlpack_c_exchange_api__,
    )
    level = os.environ.get(SIMD_VARIABLE)
    if level and level not in _cpu.simd_levels():
        levels = ", ".join(_cpu.simd_levels())
        return f"{SIMD_VARIABLE}={level!r} is not in this build or not on this CPU; use {levels}"
    if level:
        _cpu.set_simd(level)
    return None


if _import_error is None:
    _import_error = _set_up()


def watch(groups: list[Group], state: dict[Tensor, Any], kinds: list[int]) -> Any:
    """The native look at every tensor before each step (csrc/cpu/watch.h)."""
    return _cpu.Watch(groups, state, kinds)


class CpuPlan(TablePlan):
    """A plan with the tables that only the CPU kernels need."""

    def __init__(self, rule: str, rows: Sequence[Row], layout: Layout) -> None:
        super().__init__(rule, rows, layout)
        n = len(self.rows)
        self._rows = torch.frombuffer(
            pack_rows(self.rows) or bytearray(ROW.size), dtype=torch.uint8
        )
        self._row_scalars = torch.zeros(max(n, 1), 2, dtype=torch.float32, device="cpu")
        numels = [row.dense.numel() for row in self.rows]
        self._chunks = chunk_table(numels)
        n_partials = max(len(self._chunks), 1)
        self._partials = torch.zeros(n_partials, dtype=torch.float64, device="cpu")
        self._n_elements = sum(numels)
        self._native: Any = None
        self._scalars: Tensor | None = None

    def _write_rows(self) -> None:
        if self.rows:
            self._rows.copy_(torch.frombuffer(pack_rows(self.rows), dtype=torch.uint8))

    def native(self, scalars: Tensor) -> Any:
        """The ``_cpu.Plan`` whose finalize writes to ``scalars``."""
        if self._scalars is not scalars:
            self._native = _cpu.Plan(
                rows=address(self._rows),
                grads=self._grads_address,
                row_scalars=address(self._row_scalars),
                n_rows=len(self.rows),
                chunks=address(self._chunks) or address(self._partials),
                n_chunks=len(self._chunks),
                n_elements=self._n_elements,
                partials=address(self._partials),
                step_scalars=address(scalars),
            )
            self._scalars = scalars
        return self._native

    def nbytes(self) -> int:
        tables = (self._rows, self._inputs_view, self._row_scalars, self._chunks, self._partials)
        return sum(t.numel() * t.element_size() for t in tables) + self.staging_nbytes()


class CpuBackend:
    """Kernels of ``csrc/cpu``, on as many threads as torch uses."""

    name = "cpu"

    def plan(self, rule: str, rows: Sequence[Row], layout: Layout) -> Plan:
        return CpuPlan(rule, rows, layout)

    def reduce(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, CpuPlan)
        native = plan.native(step.scalars)
        _cpu.reduce(native, step.norm_type, address(step.grad_scale), torch.get_num_threads())

    def finalize(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, CpuPlan)
        _cpu.finalize(
            plan.native(step.scalars),
            plan.rule,
            step.options,
            step.norm_type,
            step.clip_threshold,
            step.measured,
            step.skip_nonfinite,
            address(step.grad_scale),
            address(step.found_inf),
            address(step.inf_flag),
        )

    def update(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, CpuPlan)
        native = plan.native(step.scalars)
        _cpu.update(native, plan.rule, step.options, step.value_threshold, torch.get_num_threads())
