"""Our two kernels by themselves: their times, their launches and the DRAM bytes they move.

python -m benchmarks.gpu.kernels CASE BACKEND    # one step between the profiler's marks, for ncu
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
from typing import Any

import torch

import fusedopt
from benchmarks.gpu.machine import Cuda, DryRun, Machine
from benchmarks.param_sets import GRAD_SCALE, Gradients, Shape, make_params, one_tensor
from benchmarks.pipelines import ADAMW, MAX_GRAD_NORM, SGD
from benchmarks.rivals import TRITON
from benchmarks.timing import Spread, spread

ROUNDS = 20
WARMUP = 3
COUNTED_NUMEL = 400_000_000  # dirty lines that stay in the L2 cache are then under 1 % of the bytes
SUFFIXES = {"cuda": "", "triton": TRITON}
COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")

# Bytes per param of reduce and update; a half param is also read, to follow what others wrote.
BYTES = {
    "adamw": (4, 28),
    "sgd": (4, 20),
    "adamw_fp16": (2, 30),
}
_DTYPES = {"adamw_fp16": torch.float16}


@dataclass
class KernelTimes:
    name: str  # of the rule and dtype
    backend: str
    numel: int
    reduce_ms: Spread
    update_ms: Spread
    launches: list[str]

    @property
    def pipeline(self) -> str:
        return f"fusedopt_{self.name}{SUFFIXES[self.backend]}"


class Verbs:
    """reduce, finalize and update of a real optimizer on its own plan, called one by one."""

    def __init__(self, name: str, shapes: list[Shape], machine: Machine, backend: str) -> None:
        dtype = _DTYPES.get(name, torch.float32)
        serving = machine.backends[backend]
        self.params = make_params(shapes, dtype, machine.device)
        self._grads = Gradients(shapes, dtype, "new", machine.device)
        common: dict[str, Any] = {"max_grad_norm": MAX_GRAD_NORM, "skip_nonfinite": True}
        optimizer: fusedopt.FusedSGD | fusedopt.FusedAdamW
        if name == "sgd":
            optimizer = fusedopt.FusedSGD(
                self.params, **SGD, decoupled_weight_decay=False, backend=serving, **common
            )
        else:
            optimizer = fusedopt.FusedAdamW(self.params, **ADAMW, backend=serving, **common)
        optimizer.grad_scale = torch.full((), GRAD_SCALE, device=machine.device)
        self._grads.backward(self.params)
        optimizer.step()
        self._inputs = optimizer._step_inputs()
        self._backend, self._plan = optimizer._current_plan()
        self._optimizer = optimizer  # owns the states

    def reduce(self) -> None:
        self._backend.reduce(self._plan, self._inputs)
        self._backend.finalize(self._plan, self._inputs)

    def update(self) -> None:
        self._backend.update(self._plan, self._inputs)

    def both(self) -> None:
        self.reduce()
        self.update()


def time_kernels(
    name: str, shapes: list[Shape], machine: Machine, backends: Sequence[str]
) -> list[KernelTimes]:
    """Of all backends in turns, each with params and states of its own."""
    verbs = {backend: Verbs(name, shapes, machine, backend) for backend in backends}
    times: dict[str, list[list[float]]] = {backend: [] for backend in backends}
    for round_index in range(1 + 2 if machine.dry else WARMUP + ROUNDS):
        warm = round_index >= (1 if machine.dry else WARMUP)
        for backend, own in verbs.items():
            taken = machine.event_ms([own.reduce, own.update], hold_ms=1.0 if warm else 0.0)
            if warm:
                times[backend].append(taken)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    measured = []
    for backend, own in verbs.items():
        reduce_ms, update_ms = (spread([t[k] for t in times[backend]]) for k in (0, 1))
        launches = machine.launches(own.both)
        measured.append(KernelTimes(name, backend, numel, reduce_ms, update_ms, launches))
    del verbs, own
    gc.collect()
    machine.release_memory()
    return measured


def count_dram_bytes(name: str, backend: str, limit_s: float) -> tuple[dict[str, float], str]:
    """Bytes per param of each of our kernels, off the hardware counters; or the reason why not."""
    tool = shutil.which("ncu")
    if tool is None:
        return {}, "ncu is not on PATH"
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--page", "raw", "--print-units", "base", "--metrics", ",".join(COUNTERS)]
    command += [sys.executable, "-m", "benchmarks.gpu.kernels", name, backend]
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
    name, backend = sys.argv[1:]
    machine: Machine = Cuda() if torch.cuda.is_available() else DryRun()
    verbs = Verbs(name, one_tensor(4096 if machine.dry else COUNTED_NUMEL), machine, backend)
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
