"""Time complete optimizer steps on the current NVIDIA GPU, ours and the alternatives in turns.

python -m benchmarks gpu              every case; rows go to benchmarks/results/local
python -m benchmarks gpu --quick      a few cases in few rounds, printed only
python -m benchmarks gpu --dry-run    without a GPU: everything but the measuring
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import warnings
from collections.abc import Sequence

import torch

from benchmarks.arguments import positive, positive_float
from benchmarks.gpu.cases import GpuCase, gpu_cases, tiny
from benchmarks.gpu.first_step import measure_first_steps
from benchmarks.gpu.kernels import COUNTED_NUMEL, count_dram_bytes, time_kernels
from benchmarks.gpu.machine import Machine, find_machine, no_triton
from benchmarks.gpu.measure import SMALL, Measured, count_launches_anew, measure_case
from benchmarks.gpu.report import (
    COLUMNS,
    Report,
    Row,
    output,
    predictions,
    refuse_results,
    table,
)
from benchmarks.gpu.streams import measure_streams
from benchmarks.registry import gpu_kinds, unavailable_libraries
from benchmarks.report import append
from benchmarks.row_files import add_options, told
from benchmarks.verbs import DTYPES, Workload

ADAMW, FP16, SGD = Workload("adamw"), Workload("adamw", DTYPES["float16"]), Workload("sgd-momentum")
# Cases whose kernels are timed by themselves too.
KERNELS = {"adamw-llama-1.24B": ADAMW, "fp16-llama-1.24B": FP16, "sgd-llama-1.24B": SGD,
           "adamw-gpt2-124M": ADAMW, "adamw-resnet50": ADAMW}  # fmt: skip
COUNTED = "adamw-400M"
RESERVE_S = {
    "first step": 60.0,
    "counters": 45.0,
    "compiled": 60.0,
    "case": 12.0,
}  # not begun with less time left


class Run:
    """A run against the clock; rows are on disk as soon as their case is done."""

    def __init__(self, args: argparse.Namespace, machine: Machine) -> None:
        self.args, self.machine = args, machine
        self.report = Report(machine)
        self.kinds = gpu_kinds(machine.backends)
        self._no_triton = no_triton(machine)
        self._end = time.monotonic() + args.budget
        self.notes: list[str] = []
        self.wrong = False

    def left(self) -> float:
        return float(self._end - time.monotonic())

    def all(self) -> None:
        self._keep(self.report.streams(*measure_streams(self.machine)))
        for name, reason in unavailable_libraries().items():
            self.notes.append(f"not compared: {name} ({reason})")
        cases = [gpu_cases()[name] for name in self.args.cases]
        small = [case for case in cases if case.numel <= SMALL and not case.compiles]
        waiting = [self._case(case, count_launches=False) for case in small]
        self._first_steps()
        for measured in waiting:  # now the profiler may run
            self._finish(measured)
        large = [case for case in cases if case not in small and not case.compiles]
        for case in large:
            self._finish(self._case(case, count_launches=True))
        if not self.args.quick or self.machine.dry:
            self._counters()
        for case in (case for case in cases if case.compiles):
            self._finish(self._case(case, count_launches=True))

    def _case(self, case: GpuCase, count_launches: bool) -> list[Measured]:
        if self.left() < RESERVE_S["compiled" if case.compiles else "case"]:
            self.notes.append(f"{case.name}: not measured, no time left")
            return []
        start = time.monotonic()
        predicted = predictions([Measured(case, n, self.kinds[n]) for n in case.pipelines])
        case = case.shrunk() if self.machine.dry else case
        print(f"\n{case.label}\n{predicted}", flush=True)
        try:
            measured = measure_case(
                case, self.kinds, self.machine, self.args.rounds, self.left, count_launches
            )
        except RuntimeError as error:  # out of memory, a failed launch: on with the next case
            self._failed(case, error)
            return []
        for item in measured:
            if not item.samples:
                self.notes.append(f"{case.name}: {item.pipeline} not measured: {item.note}")
            self.wrong |= item.wrong
        print(f"{time.monotonic() - start:.1f} s, {self.left():.0f} s left", flush=True)
        return measured

    def _finish(self, measured: list[Measured]) -> None:
        if not measured or not measured[0].samples:
            return
        case = measured[0].case
        try:
            count_launches_anew(measured, self.machine)
            self._keep(self.report.case(measured))
            if case.name in KERNELS:
                for times in time_kernels(
                    KERNELS[case.name], case.shapes(), self.machine, self._backends()
                ):
                    self._keep(self.report.kernels(case.name, times))
        except RuntimeError as error:
            self._failed(case, error)

    def _failed(self, case: GpuCase, error: RuntimeError) -> None:
        self.notes.append(f"{case.name}: {type(error).__name__}: {error}".splitlines()[0])
        self.wrong = True

    def _backends(self) -> list[str]:
        """Whose kernels are timed by themselves."""
        return ["cuda", *(["triton"] if self._no_triton is None else [])]

    def _first_steps(self) -> None:
        if self._no_triton is not None:
            self.notes.append(f"first step with Triton: not measured: {self._no_triton}")
        elif self.left() < RESERVE_S["first step"]:
            self.notes.append("first step with Triton: not measured, no time left")
        else:
            try:
                for measured in measure_first_steps(self.machine):
                    self._keep(self.report.first_step(measured))
            except RuntimeError as error:
                self.notes.append(f"first step with Triton: {error}")
                self.wrong = True

    def _counters(self) -> None:
        for backend in self._backends():
            if self.machine.dry:
                faked = {"reduce_kernel": 4.0, "update_kernel": 0.0}
                self._keep(self.report.counters(COUNTED, tiny_numel(), ADAMW, backend, faked))
                continue
            if self.left() < RESERVE_S["counters"]:
                self.notes.append(f"DRAM counters, {backend}: not read, no time left")
                continue
            self.machine.release_memory()
            measured, reason = count_dram_bytes(ADAMW, backend, min(60.0, self.left()))
            if reason:
                self.notes.append(f"DRAM counters, {backend}: not read, {reason}")
            else:
                rows = self.report.counters(COUNTED, COUNTED_NUMEL, ADAMW, backend, measured)
                self._keep(rows)

    def _keep(self, rows: Sequence[Row]) -> None:
        if self.args.out is not None:
            append(self.args.out, rows, COLUMNS)
        print(table(rows), flush=True)


def tiny_numel() -> int:
    return sum(torch.Size(shape).numel() for shape in tiny())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(gpu_cases())
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--rounds", type=positive, help="samples of each pipeline (default: 30)")
    parser.add_argument(
        "--budget", type=positive_float, default=240.0, help="seconds for all (default 240)"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU; measures nothing")
    goals = "show what the project works towards on an H200, and what of it was met"
    parser.add_argument("--goals", action="store_true", help=goals)
    add_options(parser, "default to a few small cases")
    args = parser.parse_args(arguments)
    quick = [name for name, case in gpu_cases().items() if case.quick]
    args.cases = args.cases or (quick if args.quick else names)
    args.rounds = args.rounds or (2 if args.dry_run else 8 if args.quick else 30)
    refuse_results(parser, args)
    return args


def stop(*_: object) -> None:
    raise SystemExit("stopped before the end")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    machine = find_machine(args.dry_run)
    args.out = output(args, machine)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    signal.signal(signal.SIGTERM, stop)
    run = Run(args, machine)
    print(", ".join(f"{key} {value}" for key, value in machine.facts().items()), flush=True)
    try:
        run.all()
    finally:  # also when the time is up: what was measured is worth its table
        print("\n" + "\n".join(run.notes))
        print(told(args.out), flush=True)
        if args.goals:
            print("\n" + run.report.goals(), flush=True)
    return int(run.wrong)


if __name__ == "__main__":
    sys.exit(main())
