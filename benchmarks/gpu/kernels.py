"""Our two kernels by themselves: their times, their launches and the DRAM bytes they move.

python -m benchmarks.gpu.kernels RULE DTYPES BACKEND    # one step, marked for ncu
"""

from __future__ import annotations

import csv
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.machine import Cuda, DryRun, Machine
from benchmarks.param_sets import Shape, one_tensor
from benchmarks.timing import Spread, spread
from benchmarks.verbs import DTYPES, VERBS, Verbs, Workload

ROUNDS = 20
WARMUP = 3
COUNTED_NUMEL = 400_000_000  # dirty lines that stay in the L2 cache are then under 1 % of the bytes
COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


@dataclass
class KernelTimes:
    workload: Workload
    backend: str
    numel: int
    ms: dict[str, Spread]  # by the verb
    samples: int
    launches: list[str] | None  # None: not counted

    def pipeline(self, verb: str) -> str:
        return f"fusedopt_{self.backend}:{self.workload.kernel(verb)}"


def time_kernels(
    workload: Workload,
    shapes: list[Shape],
    machine: Machine,
    backends: Sequence[str],
    count_launches: bool = True,
) -> list[KernelTimes]:
    """Of all backends in turns, each with params and states of its own."""
    verbs = {b: Verbs(workload, shapes, machine.backends[b], machine.device) for b in backends}
    times: dict[str, list[list[float]]] = {backend: [] for backend in backends}
    warmup, rounds = (1, 2) if machine.dry else (WARMUP, ROUNDS)
    for round_index in range(warmup + rounds):
        warm = round_index >= warmup
        for backend, own in verbs.items():
            taken = machine.event_ms([own.reduce, own.update], hold_ms=1.0 if warm else 0.0)
            if warm:
                times[backend].append(taken)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    measured = []
    for backend, own in verbs.items():
        ms = {verb: spread([t[k] for t in times[backend]]) for k, verb in enumerate(VERBS)}
        launches = machine.launches(own.both) if count_launches else None
        measured.append(KernelTimes(workload, backend, numel, ms, rounds, launches))
    del verbs, own
    gc.collect()
    machine.release_memory()
    return measured


def count_dram_bytes(
    workload: Workload, backend: str, limit_s: float
) -> tuple[dict[str, float], str]:
    """Bytes per param of each of our kernels, off the hardware counters; or the reason why not."""
    tool = shutil.which("ncu")
    if tool is None:
        return {}, "ncu is not on PATH"
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--page", "raw", "--print-units", "base", "--metrics", ",".join(COUNTERS)]
    command += [sys.executable, "-m", "benchmarks.gpu.kernels"]
    command += [workload.rule, str(workload.dtypes), backend]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=os.environ
        )
    except subprocess.TimeoutExpired:
        return {}, f"ncu took more than {limit_s:.0f} s"
    measured = parse_counters(done.stdout, COUNTED_NUMEL)
    if not measured:
        said = [s for s in (done.stdout + done.stderr).splitlines() if "==" in s or "rror" in s]
        return {}, f"ncu measured no kernel: {' | '.join(said[-2:])[:200]}"
    return measured, ""


def parse_counters(output: str, numel: int) -> dict[str, float]:
    """From ncu's CSV with a column a metric and a second line of units."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    measured: dict[str, float] = {}
    for row in rows:
        if row.get("ID"):  # the line of units has none
            n_bytes = sum(float(row[name].replace(",", "")) for name in COUNTERS)
            kernel = row["Kernel Name"]
            measured[kernel] = measured.get(kernel, 0.0) + n_bytes / numel
    return measured


def main() -> None:
    rule, dtypes, backend = sys.argv[1:]
    machine: Machine = Cuda() if torch.cuda.is_available() else DryRun()
    shapes = one_tensor(4096 if machine.dry else COUNTED_NUMEL)
    workload = Workload(rule, DTYPES[dtypes])
    verbs = Verbs(workload, shapes, machine.backends[backend], machine.device)
    verbs.both()
    machine.synchronize()
    if machine.dry:
        verbs.both()
        return
    torch.cuda.profiler.start()
    verbs.both()
    machine.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
