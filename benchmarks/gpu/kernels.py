"""Our two kernels by themselves: their times, and the DRAM bytes they move.

python -m benchmarks.gpu.kernels RULE DTYPES BACKEND    # one step, marked for ncu
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import torch

from benchmarks.gpu.machine import DryRun, Machine
from benchmarks.param_sets import Shape, one_tensor
from benchmarks.rows import Report
from benchmarks.verbs import DTYPES, VERBS, Verbs, Workload

COUNTED_NUMEL = 400_000_000  # dirty lines that stay in the L2 cache are then under 1 % of the bytes
COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
NCU = ("--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
       "--print-units", "base", "--metrics", ",".join(COUNTERS))  # fmt: skip


def time_kernels(
    report: Report, case: str, workload: Workload, shapes: list[Shape], machine: Machine,
    backends: Sequence[str], verbs: Sequence[str] = VERBS,
) -> None:  # fmt: skip
    """Each backend has params and states of its own."""
    for backend in backends:
        own = Verbs(workload, shapes, machine.backends[backend], machine.device)
        for verb in verbs:
            times = machine.bench(getattr(own, verb))
            report.add("gpu", "ms", times, case=case, **workload.columns(backend, verb, shapes))
        del own
        machine.release_memory()


def count_dram_bytes(
    workload: Workload, backend: str, limit_s: float
) -> tuple[dict[str, float], str]:
    """Bytes per param of each of our kernels, off the hardware counters; or the reason why not."""
    tool = shutil.which("ncu")
    if tool is None:
        return {}, "ncu is not on PATH"
    command = [tool, *NCU, sys.executable, "-m", "benchmarks.gpu.kernels"]
    command += [workload.rule, str(workload.dtypes), backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {}, f"ncu took more than {limit_s:.0f} s"
    measured = parse_counters(done.stdout, COUNTED_NUMEL)
    if not measured:
        said = [s for s in (done.stdout + done.stderr).splitlines() if "==" in s or "rror" in s]
        return {}, f"ncu measured no kernel: {' | '.join(said[-2:])[:200]}"
    return measured, ""


def parse_counters(output: str, numel: int) -> dict[str, float]:
    """From ncu's CSV with a column a metric and a second line of units."""
    measured: Counter[str] = Counter()
    for row in csv.DictReader(line for line in output.splitlines() if line.startswith('"')):
        if row.get("ID"):  # the line of units has none
            n_bytes = sum(float(row[name].replace(",", "")) for name in COUNTERS)
            measured[row["Kernel Name"]] += n_bytes / numel
    return measured


def add_counters(
    report: Report, workload: Workload, backend: str, numel: int, measured: dict[str, float]
) -> None:
    """What was counted, and by how many percent that is not what is counted by reading."""
    total, wanted = sum(measured.values()), workload.traffic().total
    note = ", ".join(f"{short(kernel)} {value:.3f}" for kernel, value in measured.items())
    columns = {"case": "adamw-400M", "pipeline": f"fusedopt_{backend}:{workload}", "params": numel}
    columns |= {"bytes_per_param": wanted, "note": note}
    report.add("dram_bytes_per_param", "bytes", [total], **columns)
    report.add("dram_deviation", "%", [100 * abs(total / wanted - 1)], **columns)


def short(kernel: str) -> str:
    return kernel.split("(")[0].split("::")[-1][:40]


def main() -> None:
    rule, dtypes, backend = sys.argv[1:]
    machine = Machine() if torch.cuda.is_available() else DryRun()
    shapes = one_tensor(4096 if machine.dry else COUNTED_NUMEL)
    workload = Workload(rule, DTYPES[dtypes])
    verbs = Verbs(workload, shapes, machine.backends[backend], machine.device)
    verbs.both()
    machine.synchronize()
    if not machine.dry:
        torch.cuda.profiler.start()
    verbs.both()
    machine.synchronize()
    if not machine.dry:
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
