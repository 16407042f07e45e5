"""The share of the optimizer in the examples' training: torch.optim against fusedopt.

python -m benchmarks profile            rows go to benchmarks/results/local
python -m benchmarks profile --quick    small models in a few rounds, printed only

The optimizer is everything from the end of backward() to the end of scaler.update(). Times and
shares come from runs without the profiler, in turns in one process; the operators from a few more
iterations under it. docs/training.md tells what the figures mean.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks import rows
from benchmarks.clocks import ForeignLoad, Sample, Sampler
from benchmarks.measure import Trial, add_trials, sandwich
from benchmarks.pipelines import DifferentStep, Unavailable

TIMES = ("optimizer", "iteration", "optimizer_share", "optimizer_ratio", "iteration_ratio")
PROFILED = ("optimizer_operators", "optimizer_launches", "optimizer_share_profiled")
QUICK_ROUNDS = 4
MARKS = ("iteration", "forward", "backward", "optimizer")  # ranges that the examples mark
OURS = "fusedopt"
PIPELINES = ("torch_fused", "torch_foreach", OURS)
WARM_UP = 3  # iterations; state is made in the first
MAX_WARM_UP = 20
# After the warm-up, of the loss: rounding to half multiplies differences in the last bits.
SAME_LOSS = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}
DIGITS, TEXT = "train_digits", "train_char_transformer"
# In each example: its data, and its training with torch.optim and with fusedopt.
_PARTS = {
    DIGITS: ("Digits", "torch_training", "fused_training"),
    TEXT: ("Text", "TorchTraining", "FusedTraining"),
}


# ---- the examples' training ----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    example: str
    dtype: str
    rounds: int
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.example}-{self.dtype}" + "".join(self.options).replace("--", "-")


def all_cases(device: torch.device) -> dict[str, Case]:
    """On a CPU fp16 is left out: its convolutions and matrix products take seconds there."""
    on_gpu = device.type == "cuda"
    cases = [
        Case(DIGITS, "fp16" if on_gpu else "bf16", 80),
        Case(TEXT, "fp32", 40),
        Case(TEXT, "fp32", 12, ("--batch", "32")),
        Case(TEXT, "bf16", 20),
        *([Case(TEXT, "fp16", 40)] if on_gpu else []),
    ]
    return {case.name: case for case in cases}


def start(case: Case, steps: int, device: torch.device, quick: bool) -> dict[str, Any]:
    """The example's training with every pipeline, from the same seed, for at most so many steps."""
    folder = str(rows.ROOT / "examples")
    if folder not in sys.path:  # the examples find each other as scripts do
        sys.path.append(folder)
    try:
        example = importlib.import_module(case.example)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error}; pip install 'fusedopt[examples]'") from error
    data_class, *makers = (getattr(example, part) for part in _PARTS[case.example])
    small = ["--layers", "1", "--width", "64"] if quick and case.example == TEXT else []
    options = [*case.options, *small, "--dtype", case.dtype, "--device", str(device)]
    options += ["--steps", str(steps)]
    data = data_class(example.parse_arguments(options))
    runs = {}
    for pipeline in PIPELINES:
        baseline = ["--baseline", pipeline.removeprefix("torch_")] if pipeline != OURS else []
        parsed = example.parse_arguments([*options, *baseline])
        runs[pipeline] = makers[pipeline == OURS](parsed, data)
    return runs


def warm_up(runs: Mapping[str, Any]) -> None:
    """A few iterations of each; more while steps are skipped, as a scaler's first ones may be."""
    in_a_row = 0
    for _ in range(MAX_WARM_UP):
        before = [run.scaler.get_scale() for run in runs.values()]
        for run in runs.values():
            run.step()
        skipped = before != [run.scaler.get_scale() for run in runs.values()]
        in_a_row = 0 if skipped else in_a_row + 1
        if in_a_row == WARM_UP:
            break


def check_same_training(runs: Mapping[str, Any], dtype: str) -> None:
    allowed = SAME_LOSS[dtype]
    first, *others = runs
    for other in others:
        pairs = zip(runs[first].losses, runs[other].losses, strict=True)
        if not all(abs(a - b) <= allowed * abs(a) for a, b in pairs):
            raise DifferentStep(f"{first} and {other} have different losses")


# ---- measuring -----------------------------------------------------------------------------------


class TrainingClock:
    """The clocks of the examples: a sample is one iteration."""

    units = {"optimizer": "ms", "iteration": "ms"}  # noqa: RUF012

    def sampler(self, run: Any) -> Sampler:
        def take() -> Sample:
            with ForeignLoad() as load:
                run.step()
            return Sample((run.watch.times[-1], run.whole_watch.times[-1]), load.disturbed)

        return take


def add_times(report: rows.Report, trials: Mapping[str, Sequence[Trial]], **columns: Any) -> None:
    """Ours in turns with each of the others, and the share of each."""
    for pipeline, taken in trials.items():
        named = {**columns, "pipeline": OURS, "reference": pipeline}
        swapped = [trial.swapped() for trial in taken]
        kept = add_trials(report, TrainingClock.units, swapped, **named)
        for name, times in ((pipeline, [t.reference for t in kept]), (OURS, [t.own for t in kept])):
            shares = [100 * part / whole for part, whole in times]
            report.add("optimizer_share", "%", shares, pipeline=name, **columns)


def add_profile(report: rows.Report, run: Any, steps: int, path: Path, **columns: object) -> None:
    """What is counted in some iterations under the profiler, whose trace stays at ``path``."""
    activities = [ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(1 + steps):  # the profiler gets going in the first
            run.step()
    profiler.export_chrome_trace(str(path))
    events = profiler.events()
    optimizer, iterations = (ranges(events, name)[1:] for name in ("optimizer", "iteration"))
    counts = [operators(mark) for mark in optimizer]
    report.add("optimizer_operators", "count", counts, **columns)
    counts = [launches(events, mark) for mark in optimizer]
    if any(counts):
        report.add("optimizer_launches", "count", counts, **columns)
    both = zip(optimizer, iterations, strict=True)
    shares = [100 * part.cpu_time_total / whole.cpu_time_total for part, whole in both]
    report.add("optimizer_share_profiled", "%", shares, **columns)


def ranges(events: Iterable[Any], name: str) -> list[Any]:
    """Those that `torch.profiler.record_function(name)` left on the CPU."""
    return [e for e in events if e.name == name and e.device_type == DeviceType.CPU]


def operators(event: Any) -> int:
    """Called within a range, those that operators call included, as in the profiler's own table."""
    return sum(operators(child) + (not child.is_user_annotation) for child in event.cpu_children)


def launches(events: Iterable[Any], mark: Any) -> int:
    """On a GPU in the time of a range, which has to wait for it; marks of ranges are none."""
    span = mark.time_range
    return sum(
        span.start <= e.time_range.start < span.end
        for e in events
        if e.device_type != DeviceType.CPU and e.name not in MARKS
    )


# ---- the command ---------------------------------------------------------------------------------


def measure(case: Case, args: Any, report: rows.Report, bar: tqdm[Any]) -> None:
    bar.set_description(case.name)
    steps = MAX_WARM_UP + 2 * case.rounds + 2 + args.profiled  # ours is between all the others
    runs = start(case, (len(PIPELINES) - 1) * steps, args.device, args.quick)
    warm_up(runs)
    check_same_training(runs, case.dtype)
    backend = next(iter(runs[OURS].optimizer.backend.values()))
    if backend == "reference":
        raise Unavailable("fusedopt has only its reference backend here; see python -m fusedopt")
    numel = sum(param.numel() for param in runs[OURS].model.parameters())
    scaler = "with" if runs[OURS].scaler.is_enabled() else "without"
    note = f"{numel} params; {scaler} scaler; backend {backend}"
    others = {pipeline: run for pipeline, run in runs.items() if pipeline != OURS}
    trials = sandwich(runs[OURS], others, TrainingClock(), case.rounds, case.rounds, bar.update)
    add_times(report, trials, case=case.name, note=note)
    with tempfile.TemporaryDirectory() as folder:
        for pipeline, run in runs.items():
            path = (args.trace or Path(folder)) / f"{case.name}-{pipeline}.json"
            add_profile(report, run, args.profiled, path, case=case.name, pipeline=pipeline)


def parse(arguments: Sequence[str] | None) -> Any:
    parser = rows.parser("profile", __doc__)
    add = parser.add_argument
    add("--device", type=rows.device, default=torch.device("cpu"))
    add("--cases", nargs="+", metavar="CASE", help="see a run for the names")
    add("--rounds", type=rows.positive, help="timed iterations of each (default: by case)")
    add("--profiled", type=rows.positive, help="iterations under the profiler (default: 5)")
    add("--threads", type=rows.positive, help="default: torch's, one for each core")
    add("--trace", type=Path, metavar="DIR", help="keep the Chrome traces there")
    rows.add_options(parser, "small models, few rounds")
    args = parser.parse_args(arguments)
    known = all_cases(args.device)
    for name in args.cases or ():
        if name not in known:
            parser.error(f"no case {name} on {args.device.type}; there are {', '.join(known)}")
    names = args.cases or [name for name in known if not args.quick or "batch" not in name]
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else None)
    args.cases = [replace(known[name], rounds=rounds or known[name].rounds) for name in names]
    args.profiled = args.profiled or (2 if args.quick else 5)
    args.out = rows.destination(args, rows.gpu_name(args.device))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.trace is not None:
        args.trace.mkdir(parents=True, exist_ok=True)
    report = rows.Report(rows.provenance(rows.gpu_name(args.device)), args.out)
    problems: dict[str, Exception] = {}
    total = (len(PIPELINES) - 1) * sum(case.rounds for case in args.cases)
    with tqdm(total=total, unit="sample") as bar:
        for case in args.cases:
            try:
                measure(case, args, report, bar)
            except (Unavailable, DifferentStep) as error:
                problems[case.name] = error
    known = report.figures()
    print(f"{rows.wide(known, TIMES)}\n\n{rows.wide(known, PROFILED)}\n")
    for name, error in problems.items():
        print(f"{name} not measured: {error}")
    print(f"\n{rows.told(args.out)}")
    return int(any(isinstance(error, DifferentStep) for error in problems.values()))
