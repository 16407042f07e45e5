"""The kernels alone over a range of sizes: what `python -m benchmarks kernels` does on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.kernels import time_kernels
from benchmarks.gpu.machine import Machine, no_triton
from benchmarks.gpu.report import COLUMNS, Report, Row
from benchmarks.gpu.streams import measure_streams
from benchmarks.param_sets import one_tensor
from benchmarks.pipelines import DifferentStep, Unavailable
from benchmarks.report import append
from benchmarks.verbs import Workload, check_same_step

RESERVE_S = 6.0  # with less time left no size is begun: Triton may have to compile first
BYTES_OF_TEMPORARIES = 12  # per element: the gradients before they are rounded


class Sweep:
    """A run against the clock; rows are on disk as soon as their size is done."""

    def __init__(
        self, machine: Machine, backends: Sequence[str], budget_s: float, out: Path | None
    ) -> None:
        self.machine, self._out = machine, out
        self.report = Report(machine)
        self.notes: list[str] = []
        self.failed = False
        self._end = time.monotonic() + budget_s
        missing = no_triton(machine) if "triton" in backends else None
        if missing is not None:
            self.notes.append(f"triton: not measured: {missing}")
        self.backends = [b for b in backends if b != "triton" or missing is None]

    def all(
        self,
        workloads: Sequence[tuple[Workload, Sequence[str]]],
        exponents: Sequence[int],
        progress: Callable[[], object],
    ) -> None:
        """Each workload with the verbs that are wanted of it."""
        self._keep(self.report.streams(*measure_streams(self.machine)))
        for workload, verbs in workloads:
            served = [self.machine.backends[backend] for backend in self.backends]
            served = [*dict.fromkeys([*served, "reference"])]  # also where there is only one
            try:
                check_same_step(workload, served, self.machine.device)
            except (Unavailable, DifferentStep) as problem:
                self.notes.append(f"{workload}: not measured: {problem}")
                self.failed |= isinstance(problem, DifferentStep)
                continue
            for exponent in exponents:
                if verbs:
                    self._measure(workload, verbs, exponent)
                progress()

    def _measure(self, workload: Workload, verbs: Sequence[str], exponent: int) -> None:
        name, numel = f"kernel-2^{exponent}", 1 << exponent
        per_param = BYTES_OF_TEMPORARIES + workload.memory_per_param() * len(self.backends)
        missing = per_param * numel - self.machine.free_bytes()
        if self._end - time.monotonic() < (0.0 if self.machine.dry else RESERVE_S):
            self.notes.append(f"{name}, {workload}: not measured, no time left")
        elif missing > 0:
            gib = missing / 2**30
            self.notes.append(f"{name}, {workload}: needs {gib:.1f} GiB more than are free")
        else:
            try:
                for times in time_kernels(
                    workload, one_tensor(numel), self.machine, self.backends, count_launches=False
                ):
                    self._keep(self.report.kernels(name, times, verbs))
            except RuntimeError as error:  # out of memory, a failed launch: on with the next
                self.failed = True
                self.notes.append(f"{name}, {workload}: {error}".splitlines()[0])

    def _keep(self, rows: Sequence[Row]) -> None:
        if self._out is not None:
            append(self._out, rows, COLUMNS)
