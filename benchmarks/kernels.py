"""GB/s of the verbs reduce and update by themselves, over sizes, next to the memory's.

python -m benchmarks kernels                           rows go to benchmarks/results/local
python -m benchmarks kernels --quick                   a few sizes, printed only
python -m benchmarks kernels --rules adamw sgd --dtypes all --verbs update --sizes 12:24
python -m benchmarks kernels --backends cuda triton    on a GPU

A size is a power of two and one tensor. On the CPU each sample of a kernel lies between two of a
stream (benchmarks/stream.py) over as many elements, so that a size which stays in a cache is held
to that cache; the ratio is that of their GB/s. On a GPU triton.testing.do_bench times the kernels,
caches are cold and the ceiling is the copy of 4 GiB. A call from Python is part of each time on the
CPU, and most of it below 2^16 elements.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import rows, stream
from benchmarks.clocks import HostClock
from benchmarks.gpu import machine as gpu
from benchmarks.gpu.kernels import time_kernels
from benchmarks.gpu.streams import measure_streams
from benchmarks.measure import add_trials, available_bytes, sandwich
from benchmarks.param_sets import Shape, one_tensor
from benchmarks.pipelines import DifferentStep, Unavailable
from benchmarks.verbs import DTYPES, RULES, VERBS, Verbs, Workload, check_same_step

ON_CPU, ON_GPU = ("cpu", "reference"), ("cuda", "triton")
DEFAULT = [Workload("adamw"), Workload("sgd-momentum"), Workload("adamw", DTYPES["bfloat16"])]
SIZES, GPU_SIZES = "10:26", "10:30"
QUICK_SIZES, QUICK_GPU_SIZES, DRY_SIZES = "12:20:4", "14:26:6", "10:12"
ROUNDS, QUICK_ROUNDS = 7, 3
REFERENCE = "stream_huge"
LARGEST_OF_REFERENCE = 22  # the power of two up to which plain torch operations are waited for
# Of memory per element: a stream's and the reference's; on a GPU the gradients before rounding.
BESIDES_ON_CPU, BESIDES_ON_GPU = 16 + 24, 12
SERIAL_ELEMENTS = 1 << 15  # below, our kernels use one thread (csrc/cpu/kernels.cpp); so does it
TIMED_S = 1e-3  # so many calls make up one step that it lasts about as long as this
MAX_CALLS = 1000
RESERVE_S = 6.0  # on a GPU: with less time left no size is begun, Triton may have to compile first


class Calls:
    """Has the interface of a pipeline; a step is several calls where one is too short to time."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        call()
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        self.count = max(1, min(MAX_CALLS, round(TIMED_S / took)))

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        for _ in range(self.count):
            self._call()


def measure_on_cpu(
    report: rows.Report, case: str, workload: Workload, shapes: list[Shape],
    backends: Sequence[str], verbs: Sequence[str], rounds: int,
) -> None:  # fmt: skip
    """Each backend and verb against a stream, whose times are scaled to the bytes of the verb."""
    ((numel,),) = shapes
    own = {backend: Verbs(workload, shapes, backend) for backend in backends}
    calls = {f"{b} {verb}": Calls(getattr(v, verb)) for b, v in own.items() for verb in verbs}
    threads = 1 if numel < SERIAL_ELEMENTS else None
    beside = stream.Stream(numel, huge=True, threads=threads)
    reference = Calls(beside.step)
    trials = sandwich(reference, calls, HostClock(), rounds, 2 * rounds)
    for name, taken in trials.items():
        backend, verb = name.split(" ")
        share = workload.bytes_per_param(verb) / stream.BYTES_PER_PARAM
        scales = (1 / calls[name].count, share / reference.count)
        note = f"{beside.describe()}; as many elements, its time scaled to these bytes"
        columns = workload.columns(backend, verb, shapes)
        columns |= {"case": case, "reference": REFERENCE, "note": note}
        columns["reference_bytes"] = columns["bytes_per_param"]
        add_trials(report, {"call": "ms"}, taken, scales, **columns)


def wanted_verbs(workloads: Sequence[Workload], verbs: Sequence[str]) -> list[list[str]]:
    """Of each workload; reducing is the same for every rule, and is measured with the first."""
    seen: set[str] = set()
    wanted = []
    for workload in workloads:
        wanted.append([verb for verb in verbs if workload.kernel(verb) not in seen])
        seen |= {workload.kernel(verb) for verb in verbs}
    return wanted


class Sweep:
    """All sizes of all workloads, on the CPU or, against the clock, on a GPU."""

    def __init__(self, args: Any, machine: gpu.Machine | None) -> None:
        self.args, self.machine = args, machine
        self.notes: list[str] = []
        self.failed = False
        self._end = time.monotonic() + (args.budget if machine else float("inf"))
        self.backends = list(args.backends)
        if machine is None:
            self.report = rows.Report(rows.provenance(), args.out)
            if "reference" in self.backends and max(args.sizes) > LARGEST_OF_REFERENCE:
                self.notes.append(f"reference: not measured above 2^{LARGEST_OF_REFERENCE}")
            return
        self.report = device_report = gpu.DeviceReport(machine, args.out)
        measure_streams(machine, device_report)
        missing = gpu.no_triton(machine) if "triton" in self.backends else None
        if missing is not None:
            self.notes.append(f"triton: not measured: {missing}")
            self.backends.remove("triton")

    def all(self, progress: Callable[[], object]) -> None:
        """Rows are on disk as soon as their size is done."""
        machine, workloads = self.machine, self.args.workloads
        device = machine.device if machine else torch.device("cpu")
        served = [machine.backends[b] if machine else b for b in self.backends]
        held_to_each_other = [*dict.fromkeys([*served, "reference"])]  # also where there is one
        wanted = wanted_verbs(workloads, self.args.verbs)
        for workload, verbs in zip(workloads, wanted, strict=True):
            try:
                check_same_step(workload, held_to_each_other, device)
            except (Unavailable, DifferentStep) as problem:
                self.notes.append(f"{workload}: not measured: {problem}")
                self.failed |= isinstance(problem, DifferentStep)
                continue
            for exponent in self.args.sizes:
                if verbs:
                    self._measure(workload, verbs, exponent)
                gc.collect()
                progress()

    def _measure(self, workload: Workload, verbs: Sequence[str], exponent: int) -> None:
        case, numel, machine = f"kernel-2^{exponent}", 1 << exponent, self.machine
        what, small = f"{case}, {workload}", exponent <= LARGEST_OF_REFERENCE
        backends = [b for b in self.backends if b != "reference" or small]
        besides = BESIDES_ON_GPU if machine else BESIDES_ON_CPU
        free = machine.free_bytes() if machine else available_bytes()
        missing = numel * (workload.memory_per_param() * len(backends) + besides) - free
        reserve = 0.0 if machine is None or machine.dry else RESERVE_S
        if self._end - time.monotonic() < reserve:
            self.notes.append(f"{what}: not measured, no time left")
        elif missing > 0:
            self.notes.append(f"{what}: needs {missing / 2**30:.1f} GiB more than are free")
        elif backends:
            given = (self.report, case, workload, one_tensor(numel))
            try:
                if machine is None:
                    measure_on_cpu(*given, backends, verbs, self.args.rounds)
                else:
                    time_kernels(*given, machine, backends, verbs)
            except RuntimeError as error:  # out of memory, a failed launch: on with the next
                self.failed = True
                self.notes.append(f"{what}: {error}".splitlines()[0])


def exponents(text: str) -> list[int]:
    """`10:28` is 2^10, 2^12 ... 2^28; `10:28:1` every power of two."""
    match = re.fullmatch(r"(\d+)(?::(\d+)(?::([1-9]\d*))?)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: use FIRST:LAST or FIRST:LAST:STEP, say 10:28")
    first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 2)
    if not 0 <= first <= last <= 34:
        raise argparse.ArgumentTypeError(f"{text!r}: exponents of two from 0 to 34")
    return [*range(first, last + 1, step)]


def parse(arguments: Sequence[str] | None) -> Any:
    parser = rows.parser("kernels", __doc__)
    add = parser.add_argument
    add("--verbs", nargs="+", choices=VERBS, default=[*VERBS])
    add("--rules", nargs="+", choices=[*RULES, "all"], metavar="RULE", help=", ".join(RULES))
    add("--dtypes", nargs="+", choices=[*DTYPES, "all"], metavar="DTYPE", help=", ".join(DTYPES))
    add("--backends", nargs="+", choices=[*ON_CPU, *ON_GPU], default=[*ON_CPU])
    add("--sizes", type=exponents, help=f"powers of two, default {SIZES}, on a GPU {GPU_SIZES}")
    add("--threads", type=rows.positive, default=2, help="on the CPU, default 2")
    add("--rounds", type=rows.positive, help=f"samples on the CPU, default {ROUNDS}")
    add("--budget", type=rows.positive_float, default=60.0, help="seconds on a GPU, default 60")
    add("--dry-run", action="store_true", help="a GPU's run, on the CPU; measures nothing")
    rows.add_options(parser, "a few sizes")
    args = parser.parse_args(arguments)
    args.on_gpu = any(backend in ON_GPU for backend in args.backends)
    if args.on_gpu and any(backend in ON_CPU for backend in args.backends):
        parser.error("cpu and reference run on the CPU, cuda and triton on a GPU: two commands")
    if args.dry_run and not args.on_gpu:
        parser.error("--dry-run is for --backends cuda triton")
    args.workloads = DEFAULT
    if args.rules or args.dtypes:
        rules = [*RULES] if "all" in (args.rules or ()) else args.rules or ["adamw"]
        dtypes = [*DTYPES] if "all" in (args.dtypes or ()) else args.dtypes or ["float32"]
        args.workloads = [Workload(r, DTYPES[d]) for d, r in itertools.product(dtypes, rules)]
    sizes = DRY_SIZES if args.dry_run else QUICK_GPU_SIZES if args.quick else GPU_SIZES
    if not args.on_gpu:
        sizes = QUICK_SIZES if args.quick else SIZES
        args.out = rows.destination(args)  # a GPU's name is known when it is found
    args.sizes = args.sizes or exponents(sizes)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    gpu.refuse_results(parser, args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    machine = None
    if args.on_gpu:
        machine = gpu.find_machine(args.dry_run)
        args.out = gpu.output(args, machine)
    else:
        torch.set_num_threads(args.threads)
    sweep = Sweep(args, machine)
    try:
        with tqdm(total=len(args.workloads) * len(args.sizes), unit="size") as bar:
            sweep.all(lambda: bar.update())
    finally:  # also when the time is up
        known = sweep.report.figures()
        print("DRY RUN, no figures" if args.dry_run else rows.table(known))
        print("\n".join(["", *sweep.notes, rows.told(args.out)]))
    return int(sweep.failed)
