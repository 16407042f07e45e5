"""Time complete optimizer steps on the current NVIDIA GPU, ours and the alternatives in turns.

python -m benchmarks gpu              every case; rows go to benchmarks/results/local
python -m benchmarks gpu --quick      a few cases in few rounds, printed only
python -m benchmarks gpu --dry-run    without a GPU: everything but the measuring
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import goals, rows
from benchmarks.cases import COMPILED, QUICK_GPU_CASES, Case, gpu_cases
from benchmarks.clocks import EventClock
from benchmarks.gpu import kernels, machine as gpu
from benchmarks.gpu.first_step import add_first_steps
from benchmarks.gpu.streams import measure_streams
from benchmarks.measure import Bench, run_case
from benchmarks.param_sets import Gradients, make_params
from benchmarks.pipelines import take_checked_steps
from benchmarks.registry import gpu_kinds, unavailable
from benchmarks.verbs import DTYPES, Workload

ADAMW, FP16, SGD = Workload("adamw"), Workload("adamw", DTYPES["float16"]), Workload("sgd-momentum")
# Cases whose kernels are timed by themselves too.
KERNELS = {"adamw-llama-1.24B": ADAMW, "fp16-llama-1.24B": FP16, "sgd-llama-1.24B": SGD,
           "adamw-gpt2-124M": ADAMW, "adamw-resnet50": ADAMW}  # fmt: skip
# Seconds: with less time left it is not begun.
RESERVE_S = {"first step": 60.0, "counters": 45.0, "compiled": 60.0, "case": 12.0, "launches": 5.0}


class Run:
    """A run against the clock; rows are on disk as soon as they are known."""

    def __init__(self, args: Any, machine: gpu.Machine) -> None:
        self.args, self.machine = args, machine
        self.report = gpu.DeviceReport(machine, args.out)
        self.bench = Bench(
            lambda case: EventClock(machine, case.numel), gpu_kinds(machine.backends),
            args.rounds, args.rounds, machine.device, builds=1, free_bytes=machine.free_bytes,
            time_is_up=lambda: self._left() < 0,
        )  # fmt: skip
        self._no_triton = gpu.no_triton(machine)
        self._backends = ["cuda", *(["triton"] if self._no_triton is None else [])]
        self._end = time.monotonic() + args.budget
        self._shown = 0
        self.notes: list[str] = []
        self.wrong = False

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _no_time(self, what: str, name: str) -> bool:
        if self._left() >= RESERVE_S[name]:
            return False
        self.notes.append(f"{what}: not measured, no time left")
        return True

    def all(self) -> None:
        """The profiler, which counts launches, comes last: the host may be slower for good."""
        measure_streams(self.machine, self.report)
        self._show()
        for name, reason in unavailable(self.bench.kinds).items():
            self.notes.append(f"not compared: {name} ({reason})")
        cases = [gpu_cases()[name] for name in self.args.cases]
        plain = [case for case in cases if not case.name.endswith(COMPILED)]
        agreed = [(case, self._case(case)) for case in plain]
        self._first_steps()
        if not self.args.quick or self.machine.dry:
            self._counters()
        agreed += [(case, self._case(case)) for case in cases if case not in plain]
        for case, pipelines in agreed:
            self._launches(case, pipelines)
        self._show()

    def _case(self, case: Case) -> list[str]:
        """The pipelines that were measured."""
        if self._no_time(case.name, "compiled" if case.name.endswith(COMPILED) else "case"):
            return []
        start, said = time.monotonic(), {}
        for name in case.pipelines:
            times = goals.predicted_ms(name, self.bench.kinds[name].bytes_per_param, case)
            said[name] = f"{name} {times[0]:.3g}/{times[1]:.3g} ms"
        case = case.shrunk() if self.machine.dry else case
        print(f"\n{case.label}\npredicted for an H200, GPU/wall: {', '.join(said.values())}")
        agreed: dict[str, None] = {}
        try:
            for result in run_case(case, self.bench):
                pair = (result.comparison.pipeline, result.comparison.reference)
                if result.trials:
                    agreed |= dict.fromkeys(pair)
                    foretold = f"predicted {', '.join(said[name] for name in pair)}"
                    result.note = "; ".join(filter(None, (result.note, foretold)))
                    result.add_to(self.report, self.bench)
                else:
                    self.notes.append(f"{case.name}: {pair[1]} not measured: {result.note}")
                self.wrong |= result.wrong
            if agreed and case.name in KERNELS:
                workload, shapes = KERNELS[case.name], case.shapes()
                given = (workload, shapes, self.machine, self._backends)
                kernels.time_kernels(self.report, case.name, *given)
        except RuntimeError as error:  # out of memory, a failed launch: on with the next case
            self._failed(case.name, error)
        self.machine.release_memory()
        self._show()
        print(f"{time.monotonic() - start:.1f} s, {self._left():.0f} s left", flush=True)
        return list(agreed)

    def _launches(self, case: Case, pipelines: Sequence[str]) -> None:
        """Kernels, copies and fills of a step, of pipelines that are made anew."""
        if not pipelines or self._no_time(f"{case.name}, launches", "launches"):
            return
        case = case.shrunk() if self.machine.dry else case
        shapes, device = case.shapes(), self.machine.device
        for name in pipelines:
            try:
                grads = Gradients(shapes, case.dtype, case.grads, device)
                params = make_params(shapes, case.dtype, device)
                pipeline = self.bench.kinds[name].build(params, grads)
                take_checked_steps(pipeline, grads)
                pipeline.prepare()
                found = self.machine.launches(pipeline.step)
            except RuntimeError as error:
                self._failed(case.name, error)
                continue
            names = Counter(map(kernels.short, found)).most_common()
            note = ", ".join(f"{count} {kernel}" for kernel, count in names)[:200]
            self.report.add("launches", "count", [len(found)], case=case.name, pipeline=name,
                            params=case.numel, tensors=len(shapes), note=note)  # fmt: skip
            del pipeline, params, grads
            self.machine.release_memory()

    def _failed(self, what: str, error: RuntimeError) -> None:
        self.notes.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0])
        self.wrong = True

    def _first_steps(self) -> None:
        what = "first step with Triton"
        if self._no_triton is not None:
            self.notes.append(f"{what}: not measured: {self._no_triton}")
        elif not self._no_time(what, "first step"):
            try:
                add_first_steps(self.machine, self.report)
            except RuntimeError as error:
                self._failed(what, error)

    def _counters(self) -> None:
        for backend in self._backends:
            what, reason = f"DRAM counters, {backend}", ""
            if self.machine.dry:
                measured = {"reduce_kernel": 4.0, "update_kernel": 0.0}
            elif self._no_time(what, "counters"):
                continue
            else:
                self.machine.release_memory()
                limit_s = min(60.0, self._left())
                measured, reason = kernels.count_dram_bytes(ADAMW, backend, limit_s)
            if reason:
                self.notes.append(f"{what}: not read, {reason}")
            else:
                numel = kernels.COUNTED_NUMEL
                kernels.add_counters(self.report, ADAMW, backend, numel, measured)

    def _show(self) -> None:
        """What has come since the last time."""
        new, self._shown = self.report.rows[self._shown :], len(self.report.rows)
        print(rows.table(rows.figures(new).values()), flush=True)


def parse(arguments: Sequence[str] | None) -> Any:
    parser = rows.parser("gpu", __doc__)
    names = list(gpu_cases())
    add = parser.add_argument
    add("--cases", nargs="+", choices=names, metavar="CASE", help=", ".join(names))
    add("--rounds", type=rows.positive, help="samples of each pipeline (default: 30)")
    add("--budget", type=rows.positive_float, default=240.0, help="seconds (default: 240)")
    add("--dry-run", action="store_true", help="on the CPU; measures nothing")
    add("--goals", action="store_true", help="show what the project works towards on an H200")
    rows.add_options(parser, "default to a few small cases")
    args = parser.parse_args(arguments)
    args.cases = args.cases or (list(QUICK_GPU_CASES) if args.quick else names)
    args.rounds = args.rounds or (2 if args.dry_run else 8 if args.quick else 30)
    gpu.refuse_results(parser, args)
    return args


def stop(*_: object) -> None:
    raise SystemExit("stopped before the end")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    machine = gpu.find_machine(args.dry_run)
    args.out = gpu.output(args, machine)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    signal.signal(signal.SIGTERM, stop)
    run = Run(args, machine)
    print(f"{machine.name}, torch {torch.__version__}, {gpu.versions()}", flush=True)
    try:
        run.all()
    finally:  # also when the time is up: what was measured is worth its table
        print("\n" + "\n".join(run.notes))
        print(rows.told(args.out), flush=True)
        if args.goals:
            print("\n" + goals.table(goals.ON_GPU, run.report.figures(), machine.dry), flush=True)
    return int(run.wrong)


if __name__ == "__main__":
    sys.exit(main())
