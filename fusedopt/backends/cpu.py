"""The CPU backend: the kernels of ``fusedopt._cpu`` over the tables of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..plan.plan import Layout, Plan, Row, StepInputs
from ..rules.declaration import Rule
from . import modules
from .records import ROW, WORDS, address, chunk_table, pack_rows
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
    """The verbs as kernels of ``csrc/cpu``, on as many threads as torch uses."""

    def __init__(self, rule: Rule, rows: Sequence[Row], layout: Layout) -> None:
        super().__init__(rule, rows, layout)
        n_rows = max(len(self.rows), 1)
        chunks = chunk_table([row.dense.numel() for row in self.rows])
        self._tables = {
            "rows": torch.empty(n_rows * ROW.size, dtype=torch.uint8, device="cpu"),
            "row_steps": torch.zeros(n_rows * rule.row_step_bytes, dtype=torch.uint8, device="cpu"),
            "chunks": chunks if len(chunks) > 0 else chunk_table([1]),
            "words": torch.zeros(WORDS, dtype=torch.int64, device="cpu"),
        }
        self._write_rows()
        inputs = address(self._inputs_view)
        self._native = _cpu.Plan(
            rule.name,
            {
                **{name: address(table) for name, table in self._tables.items()},
                "step": inputs,
                "options": inputs + self.options_at,
                "grads": self._grads_address,
                "n_groups": self.n_groups,
                "n_rows": len(self.rows),
                "n_chunks": len(chunks),
            },
        )

    def _write_rows(self) -> None:
        if self.rows:
            packed = torch.frombuffer(pack_rows(self.rows), dtype=torch.uint8)
            self._tables["rows"].copy_(packed)

    def begin(self, step: StepInputs) -> None:
        tensors = (step.grad_scale, step.found_inf, step.inf_flag, step.scalars)
        self.pack_step(self._inputs, step, tensors, step.device_numbers)
        self._ranks, self._options = step.ranks, step.options

    def reduce(self) -> None:
        self._native.reduce(torch.get_num_threads())

    def exchange(self) -> None:
        if self._ranks is not None:
            self._ranks.add_up(self._tables["words"], self._options.norm_type)

    def finalize(self) -> None:
        self._native.finalize()

    def update(self) -> None:
        self._native.update(torch.get_num_threads())

    def nbytes(self) -> int:
        tables = (self._inputs_view, *self._tables.values())
        return sum(t.nbytes for t in tables) + self.staging_nbytes()


class CpuBackend:
    """Kernels of ``csrc/cpu``."""

    name = "cpu"

    def plan(self, rule: Rule, rows: Sequence[Row], layout: Layout) -> Plan:
        return CpuPlan(rule, rows, layout)
