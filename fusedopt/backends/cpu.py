"""The CPU backend: the kernels of ``fusedopt._cpu`` over the tables of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan.plan import Layout, Plan, Row, StepInputs
from . import modules
from .records import ROW, address, chunk_table, pack_rows
from .tables import TablePlan

_cpu, _reason = modules.load("_cpu")


def unavailable_reason() -> str | None:
    """Why ``_cpu`` cannot be used, or ``None``."""
    return _reason


def details() -> dict[str, Any]:
    if _reason is not None:
        return {}
    return {
        "simd": _cpu.simd(),
        "compiled_simd": _cpu.simd_levels(),
        "openmp": _cpu.built_with_openmp(),
    }


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
