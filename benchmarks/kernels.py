"""GB/s of the verbs reduce and update by themselves, over sizes, next to the memory's.

python -m benchmarks kernels                           rows go to benchmarks/results/local
python -m benchmarks kernels --quick                   a few sizes, printed only
python -m benchmarks kernels --rules adamw sgd --dtypes all --verbs update --sizes 12:24
python -m benchmarks kernels --backends cuda triton    on a GPU

A size is a power of two and one tensor. On the CPU each sample of a kernel lies between two of a
stream (benchmarks/stream.py) over as many elements, so that a size which stays in a cache is held
to that cache; the ratio is that of their GB/s. On a GPU caches are cold and the ceiling is the
copy of 4 GiB. A call from Python is part of each time, and most of it below 2^16 elements.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import stream
from benchmarks.arguments import positive, positive_float
from benchmarks.cpu_measure import available_bytes
from benchmarks.param_sets import one_tensor
from benchmarks.pipelines import DifferentStep, Unavailable
from benchmarks.report import append, check_header, provenance
from benchmarks.row_files import add_options, destination, told
from benchmarks.timing import Summary, Trial, sandwich, summarize
from benchmarks.verbs import DTYPES, RULES, VERBS, Verbs, Workload, check_same_step

ON_CPU, ON_GPU = ("cpu", "reference"), ("cuda", "triton")
DEFAULT = (Workload("adamw"), Workload("sgd-momentum"), Workload("adamw", DTYPES["bfloat16"]))
SIZES, GPU_SIZES = "10:26", "10:30"
QUICK_SIZES, QUICK_GPU_SIZES, DRY_SIZES = "12:20:4", "14:26:6", "10:12"
ROUNDS, QUICK_ROUNDS = 7, 3
REFERENCE = "stream_huge"
LARGEST_OF_REFERENCE = 22  # the power of two up to which plain torch operations are waited for
STREAM_BYTES, TEMPORARY_BYTES = 16, 24  # of memory per element: the stream's, the reference's
SERIAL_ELEMENTS = 1 << 15  # below, our kernels use one thread (csrc/cpu/kernels.cpp); so does it
TIMED_S = 1e-3  # so many calls make up one step that it lasts about as long as this
MAX_CALLS = 1000


@dataclass(frozen=True)
class Benchmark:
    """A table of GB/s, declared in the words of triton.testing.Benchmark.

    Not that class itself: its perf_report measures one provider after the other, and ours take
    turns; and it needs Triton, pandas and matplotlib.
    """

    plot_name: str  # the kernel, say update:adamw:float32
    x_vals: Sequence[int]
    line_vals: Sequence[str]  # backends
    x_names: tuple[str, ...] = ("N",)
    line_arg: str = "provider"
    ylabel: str = "GB/s"
    x_log: bool = True

    def table(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """As perf_report prints it, with the share of the ceiling beside each figure."""
        found = {(str(r["case"]).split(":")[-1], r["pipeline"]): r for r in rows}
        head = "".join(
            f"{f'{name} ({self.ylabel})':>18}{'of ceiling':>12}" for name in self.line_vals
        )
        lines = [f"{self.x_names[0]:>8}{head}"]
        n_bytes: object = "?"
        for exponent in self.x_vals:
            cells = ""
            for provider in self.line_vals:
                row = found.get((f"kernel-2^{exponent}", f"fusedopt_{provider}:{self.plot_name}"))
                cells += _cells(row)
                n_bytes = n_bytes if row is None else row["bytes_per_param"]
            lines.append(f"{f'2^{exponent}':>8}{cells}")
        return "\n".join([f"{self.plot_name}, {n_bytes} bytes per param:", *lines])


def _cells(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return f"{'-':>18}{'-':>12}"
    share = row["ceiling_fraction"] if "ceiling_fraction" in row else row["copy_fraction"]
    shown = "-" if share == "" else f"{float(share):.2f}"
    if row.get("quiet", 1) == 0:
        shown += " ?"  # disturbed
    return f"{float(row['gb_s']):>18.4g}{shown:>12}"


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


def measure(
    workload: Workload, verbs: Sequence[str], backends: Sequence[str], numel: int, rounds: int
) -> tuple[dict[tuple[str, str], Summary], str]:
    """Of each backend and verb, against a stream of the same bytes; and what the stream was."""
    own = {backend: Verbs(workload, one_tensor(numel), backend) for backend in backends}
    calls = {f"{b} {verb}": Calls(getattr(v, verb)) for b, v in own.items() for verb in verbs}
    threads = 1 if numel < SERIAL_ELEMENTS else None
    beside = stream.Stream(numel, huge=True, threads=threads)
    reference = Calls(beside.step)
    trials = sandwich(reference, calls, rounds, 2 * rounds)
    found = {}
    for name, taken in trials.items():
        backend, verb = name.split(" ")
        share = workload.bytes_per_param(verb) / stream.BYTES_PER_PARAM
        found[backend, verb] = summarize(
            [
                Trial(
                    trial.seconds / calls[name].count,
                    trial.reference_seconds / reference.count * share,
                    trial.disturbed,
                )
                for trial in taken
            ]
        )
    return found, beside.describe()


def row(
    workload: Workload, backend: str, verb: str, exponent: int, summary: Summary, note: str
) -> dict[str, object]:
    """A row of the CSV, without its provenance."""
    n_bytes = workload.bytes_per_param(verb)
    moved = n_bytes * (1 << exponent) / 1e6
    times = {f"ms_{p}": f"{getattr(summary.ms, p):.6f}" for p in ("p20", "p50", "p80")}
    ratios = {f"ratio_{p}": f"{getattr(summary.ratio, p):.4f}" for p in ("p20", "p50", "p80")}
    ceiling = {
        "ceiling_fraction": ratios["ratio_p50"],
        "ceiling_gb_s": f"{moved / summary.reference_ms.p50:.3f}",
        "predicted_ms": f"{summary.reference_ms.p50:.6f}",
        "measured_over_predicted": f"{summary.ms.p50 / summary.reference_ms.p50:.4f}",
    }
    return {
        "case": f"kernel-2^{exponent}",
        "pipeline": f"fusedopt_{backend}:{workload.kernel(verb)}",
        "reference": REFERENCE,
        "params": 1 << exponent,
        "tensors": 1,
        "dtype": workload.dtypes.grads if verb == "reduce" else workload.dtypes.params,
        "grads": "kept",
        "bytes_per_param": n_bytes,
        **times,
        "reference_ms_p50": f"{summary.reference_ms.p50:.6f}",
        **ratios,
        "target": "",
        "samples": summary.samples,
        "disturbed": summary.disturbed,
        "quiet": int(summary.quiet),
        "note": f"{note}; as many elements, its time scaled to these bytes",
        "gb_s": f"{moved / summary.ms.p50:.3f}",
        **(ceiling if stream.is_ceiling() else dict.fromkeys(ceiling, "")),
    }


def wanted_verbs(workloads: Sequence[Workload], verbs: Sequence[str]) -> list[list[str]]:
    """Of each workload; reducing is the same for every rule, and is measured with the first."""
    seen: set[str] = set()
    wanted = []
    for workload in workloads:
        wanted.append([verb for verb in verbs if workload.kernel(verb) not in seen])
        seen |= {workload.kernel(verb) for verb in verbs}
    return wanted


def backends_at(backends: Sequence[str], exponent: int) -> list[str]:
    return [b for b in backends if b != "reference" or exponent <= LARGEST_OF_REFERENCE]


def run_on_cpu(args: argparse.Namespace, progress: Callable[[], object]) -> list[dict[str, object]]:
    """Rows are on disk as soon as their size is done."""
    common = provenance()
    rows: list[dict[str, object]] = []
    if backends_at(args.backends, max(args.sizes)) != args.backends:
        args.notes.append(f"reference: not measured above 2^{LARGEST_OF_REFERENCE}")
    for workload, verbs in zip(
        args.workloads, wanted_verbs(args.workloads, args.verbs), strict=True
    ):
        try:
            held_to_each_other = dict.fromkeys([*args.backends, "reference"])
            check_same_step(workload, [*held_to_each_other], torch.device("cpu"))
        except (Unavailable, DifferentStep) as problem:
            args.notes.append(f"{workload}: not measured: {problem}")
            args.failed |= isinstance(problem, DifferentStep)
            continue
        for exponent in args.sizes if verbs else []:
            backends = backends_at(args.backends, exponent)
            per_element = workload.memory_per_param() * len(backends)
            per_element += STREAM_BYTES + TEMPORARY_BYTES
            missing = (per_element << exponent) - available_bytes()
            if missing > 0:
                lacking = f"needs {missing / 2**30:.1f} GiB more than are free"
                args.notes.append(f"2^{exponent}, {workload}: {lacking}")
            elif backends:
                found, note = measure(workload, verbs, backends, 1 << exponent, args.rounds)
                new = [common | row(workload, *key, exponent, s, note) for key, s in found.items()]
                rows += new
                if args.out is not None:
                    append(args.out, new)
            gc.collect()
            progress()
    return rows


def run_on_gpu(args: argparse.Namespace, progress: Callable[[], object]) -> list[dict[str, object]]:
    from benchmarks.gpu.machine import find_machine
    from benchmarks.gpu.report import output
    from benchmarks.gpu.sweep import Sweep

    machine = find_machine(args.dry_run)
    args.out = output(args, machine)
    sweep = Sweep(machine, args.backends, args.budget, args.out)
    verbs = wanted_verbs(args.workloads, args.verbs)
    try:
        sweep.all([*zip(args.workloads, verbs, strict=True)], args.sizes, progress)
    finally:  # also when the time is up
        args.notes += sweep.notes
    args.failed = sweep.failed
    return sweep.report.rows


def exponents(text: str) -> list[int]:
    """`10:28` is 2^10, 2^12 ... 2^28; `10:28:1` every power of two."""
    match = re.fullmatch(r"(\d+)(?::(\d+)(?::([1-9]\d*))?)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: use FIRST:LAST or FIRST:LAST:STEP, say 10:28")
    first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 2)
    if not 0 <= first <= last <= 34:
        raise argparse.ArgumentTypeError(f"{text!r}: exponents of two from 0 to 34")
    return [*range(first, last + 1, step)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--verbs", nargs="+", choices=VERBS, default=[*VERBS])
    add("--rules", nargs="+", choices=[*RULES, "all"], metavar="RULE", help=", ".join(RULES))
    add("--dtypes", nargs="+", choices=[*DTYPES, "all"], metavar="DTYPE", help=", ".join(DTYPES))
    add("--backends", nargs="+", choices=[*ON_CPU, *ON_GPU], default=[*ON_CPU])
    add("--sizes", type=exponents, help=f"powers of two, default {SIZES}, on a GPU {GPU_SIZES}")
    add("--threads", type=positive, default=2, help="on the CPU, default 2")
    add("--rounds", type=positive, help=f"samples on the CPU, default {ROUNDS}")
    add("--budget", type=positive_float, default=60.0, help="seconds on a GPU, default 60")
    add("--dry-run", action="store_true", help="a GPU's run, on the CPU; measures nothing")
    add_options(parser, "a few sizes")
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
    args.sizes = args.sizes or exponents(sizes)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    args.notes, args.failed = [], False
    if args.dry_run:
        from benchmarks.gpu.report import refuse_results

        refuse_results(parser, args)
    if not args.on_gpu:  # whose name is known when it is found
        args.out = destination(args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not args.on_gpu:
        if args.out is not None:
            check_header(args.out)
        torch.set_num_threads(args.threads)
    with tqdm(total=len(args.workloads) * len(args.sizes), unit="size") as bar:
        rows = (run_on_gpu if args.on_gpu else run_on_cpu)(args, lambda: bar.update())
    for name in dict.fromkeys(w.kernel(verb) for w in args.workloads for verb in args.verbs):
        if args.dry_run:
            print(f"{name}: DRY RUN, no figures")
        else:
            print("\n" + Benchmark(name, args.sizes, args.backends).table(rows))
    if any(row.get("quiet", 1) == 0 for row in rows):
        args.notes.append("?: disturbed by other programs, and worth little")
    print("\n" + "\n".join(args.notes))
    print(told(args.out))
    return int(args.failed)


if __name__ == "__main__":
    sys.exit(main())
