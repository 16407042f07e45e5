"""The share of the optimizer in the examples' training: torch.optim against fusedopt.

python -m benchmarks profile            rows go to benchmarks/results/local
python -m benchmarks profile --quick    small models in a few rounds, printed only

The optimizer is everything from the end of backward() to the end of scaler.update(). Times and
shares come from runs without the profiler, in turns in one process; the operators from a few more
iterations under it. docs/training.md tells what the figures mean.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.arguments import device, positive
from benchmarks.figures import Figures, common_columns, gpu_name, table
from benchmarks.pipelines import DifferentStep, Unavailable
from benchmarks.row_files import add_options, destination, told
from benchmarks.timing import MAX_FOREIGN_SHARE, ForeignLoad
from benchmarks.traces import Range, read_ranges
from benchmarks.training_cases import (
    MAX_WARM_UP,
    OURS,
    Case,
    all_cases,
    check_same_training,
    start,
    warm_up,
)

TIMES = ("optimizer_ms", "iteration_ms", "optimizer_share", "optimizer_ratio", "iteration_ratio")
PROFILED = ("optimizer_operators", "optimizer_launches", "optimizer_share_profiled")
QUICK_ROUNDS = 4
TOP = 4  # operators that are named


@dataclass
class Rounds:
    """Times of iterations by pipeline in ms, one per round, and which rounds were disturbed."""

    optimizer: dict[str, list[float]]
    iteration: dict[str, list[float]]
    disturbed: list[bool]

    def kept(self) -> list[int]:
        """The rounds to use: the undisturbed ones, or all where those are too few."""
        clean = [index for index, flag in enumerate(self.disturbed) if not flag]
        enough = len(clean) >= max(3, len(self.disturbed) // 4)
        return clean if enough else list(range(len(self.disturbed)))

    def note(self) -> str:
        count = sum(self.disturbed)
        if not count:
            return ""
        left_out = len(self.kept()) < len(self.disturbed)
        return f"; disturbed rounds: {count}, {'left out' if left_out else 'NOT left out'}"


def time_rounds(runs: Mapping[str, Any], rounds: int, bar: tqdm[Any]) -> Rounds:
    """One iteration of every pipeline per round, in random order."""
    rng, disturbed = random.Random(0), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            with ForeignLoad() as load:
                for pipeline in rng.sample(list(runs), len(runs)):
                    runs[pipeline].step()
            disturbed.append(load.share > MAX_FOREIGN_SHARE)
            bar.update()
    finally:
        gc.enable()
    return Rounds(
        {pipeline: run.watch.times[-rounds:] for pipeline, run in runs.items()},
        {pipeline: run.whole_watch.times[-rounds:] for pipeline, run in runs.items()},
        disturbed,
    )


def profile_steps(run: Any, steps: int, path: Path) -> tuple[list[Range], list[Range]]:
    """The ranges `optimizer` and `iteration` of some iterations under the profiler.

    The trace stays at ``path``. The first iteration, in which the profiler gets going, is left out.
    """
    activities = [ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(1 + steps):
            run.step()
    profiler.export_chrome_trace(str(path))
    return read_ranges(path, "optimizer")[1:], read_ranges(path, "iteration")[1:]


def add_times(figures: Figures, case: str, timed: Rounds, note: str) -> None:
    kept = timed.kept()
    note += timed.note()
    for pipeline in timed.optimizer:
        step = [timed.optimizer[pipeline][index] for index in kept]
        whole = [timed.iteration[pipeline][index] for index in kept]
        shares = [100 * part / all_of_it for part, all_of_it in zip(step, whole, strict=True)]
        figures.add(case, pipeline, "optimizer_ms", "ms", step, note)
        figures.add(case, pipeline, "iteration_ms", "ms", whole, note)
        figures.add(case, pipeline, "optimizer_share", "%", shares, note)
        if pipeline == OURS:
            continue
        for name, times in (("optimizer", timed.optimizer), ("iteration", timed.iteration)):
            ratios = [times[pipeline][index] / times[OURS][index] for index in kept]
            figures.add(case, pipeline, f"{name}_ratio", "x", ratios, note)


def add_profile(
    figures: Figures, case: str, pipeline: str, steps: Sequence[Range], iterations: Sequence[Range]
) -> None:
    counts = [step.operators.total() for step in steps]
    top = _top([step.self_ms for step in steps], [step.operators for step in steps])
    figures.add(case, pipeline, "optimizer_operators", "count", counts, top)
    launches = [step.launches.total() for step in steps]
    if any(launches):
        top = _top([step.device_ms for step in steps], [step.launches for step in steps])
        figures.add(case, pipeline, "optimizer_launches", "count", launches, top)
    shares = [100 * part.ms / whole.ms for part, whole in zip(steps, iterations, strict=True)]
    figures.add(case, pipeline, "optimizer_share_profiled", "%", shares)


def _top(times: Sequence[Counter[str]], calls: Sequence[Counter[str]]) -> str:
    """What took most time, per step: `aten::mul_ 3x 0.12 ms`."""
    n_steps = len(times)
    all_calls: Counter[str] = sum(calls, Counter())
    entries = []
    for name, ms in sum(times, Counter()).most_common(TOP):
        count = f" {all_calls[name] / n_steps:g}x" if name in all_calls else ""
        entries.append(f"{name}{count} {ms / n_steps:.3f} ms")
    return "; ".join(entries)


def measure(case: Case, args: argparse.Namespace, figures: Figures, bar: tqdm[Any]) -> None:
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else case.rounds)
    bar.set_description(case.name)
    runs = start(case, MAX_WARM_UP + rounds + 1 + args.profiled, args.device, args.quick)
    warm_up(runs)
    check_same_training(runs, case.dtype)
    backend = next(iter(runs[OURS].optimizer.backend.values()))
    if backend == "reference":
        raise Unavailable("fusedopt has only its reference backend here; see python -m fusedopt")
    numel = sum(param.numel() for param in runs[OURS].model.parameters())
    scaler = "with" if runs[OURS].scaler.is_enabled() else "without"
    note = f"{numel} params; {scaler} scaler; backend {backend}"
    add_times(figures, case.name, time_rounds(runs, rounds, bar), note)
    with tempfile.TemporaryDirectory() as folder:
        for pipeline, run in runs.items():
            path = (args.trace or Path(folder)) / f"{case.name}-{pipeline}.json"
            add_profile(figures, case.name, pipeline, *profile_steps(run, args.profiled, path))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=device, default=torch.device("cpu"))
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="see a run for the names")
    parser.add_argument(
        "--rounds", type=positive, help="timed iterations of each (default: by case)"
    )
    parser.add_argument(
        "--profiled", type=positive, help="iterations under the profiler (default: 5)"
    )
    parser.add_argument("--threads", type=positive, help="default: torch's, one for each core")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="keep the Chrome traces there")
    add_options(parser, "small models, few rounds")
    args = parser.parse_args(arguments)
    names = list(all_cases(args.device))
    args.cases = args.cases or [name for name in names if not args.quick or "batch" not in name]
    for name in args.cases:
        if name not in names:
            parser.error(f"no case {name} on {args.device.type}; there are {', '.join(names)}")
    args.profiled = args.profiled or (2 if args.quick else 5)
    args.out = destination(args, "-profile", gpu_name(args.device))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.trace is not None:
        args.trace.mkdir(parents=True, exist_ok=True)
    figures = Figures(common_columns(args.device), args.out)
    cases = [all_cases(args.device)[name] for name in args.cases]
    rounds = [args.rounds or (QUICK_ROUNDS if args.quick else case.rounds) for case in cases]
    problems: dict[str, Exception] = {}
    with tqdm(total=sum(rounds), unit="round") as bar:
        for case in cases:
            try:
                measure(case, args, figures, bar)
            except (Unavailable, DifferentStep) as error:
                problems[case.name] = error
            figures.save()
    print_report(figures)
    for name, error in problems.items():
        print(f"{name} not measured: {error}")
    print(f"\n{told(args.out)}")
    return int(any(isinstance(error, DifferentStep) for error in problems.values()))


def print_report(figures: Figures) -> None:
    print(table(figures.rows, TIMES))
    print()
    print(table(figures.rows, PROFILED))
    print()
    for row in figures.rows:
        if row["unit"] == "count":
            print(f"{row['case']}, {row['pipeline']}, {row['figure']}: {row['note']}")


if __name__ == "__main__":
    sys.exit(main())
