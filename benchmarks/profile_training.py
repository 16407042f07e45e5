"""The share of the optimizer in the examples' training: torch.optim against fusedopt.

python -m benchmarks profile            rows go to benchmarks/results/local
python -m benchmarks profile --quick    small models in a few rounds, printed only

The optimizer is everything from the end of backward() to the end of scaler.update(). Times and
shares come from runs without the profiler, in turns in one process; the operators from a few more
iterations under it. docs/training.md tells what the figures mean.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks import arguments as args_of
from benchmarks.arguments import device, gpu_name, positive
from benchmarks.clocks import ForeignLoad, Sample, Sampler
from benchmarks.measure import Trial, add_trials, sandwich
from benchmarks.pipelines import DifferentStep, Unavailable
from benchmarks.rows import ROOT, Report, add_options, destination, provenance, told, wide

TIMES = ("optimizer", "iteration", "optimizer_share", "optimizer_ratio", "iteration_ratio")
PROFILED = ("optimizer_operators", "optimizer_launches", "optimizer_share_profiled")
QUICK_ROUNDS = 4
TOP = 4  # operators that are named
OUTSIDE = "outside torch's operators"  # Python, and native code that torch knows nothing of
MARKS = ("iteration", "forward", "backward", "optimizer")  # ranges that the examples mark
OURS = "fusedopt"
PIPELINES = ("torch_fused", "torch_foreach", OURS)
WARM_UP = 3  # iterations; state is made in the first
MAX_WARM_UP = 20
# After the warm-up, of the loss: rounding to half multiplies differences in the last bits.
SAME_LOSS = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}
# In each example: its data, and its training with torch.optim and with fusedopt.
_PARTS = {
    "train_digits": ("Digits", "torch_training", "fused_training"),
    "train_char_transformer": ("Text", "TorchTraining", "FusedTraining"),
}


# ---- the examples' training ----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    example: str
    dtype: str
    rounds: int
    options: tuple[str, ...] = ()
    quick_options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.example}-{self.dtype}" + "".join(self.options).replace("--", "-")


_SMALL = ("--layers", "1", "--width", "64")


def all_cases(device: torch.device) -> dict[str, Case]:
    """On a CPU fp16 is left out: its convolutions and matrix products take seconds there."""
    on_gpu = device.type == "cuda"
    text = "train_char_transformer"
    cases = [
        Case("train_digits", "fp16" if on_gpu else "bf16", 80),
        Case(text, "fp32", 40, quick_options=_SMALL),
        Case(text, "fp32", 12, ("--batch", "32"), _SMALL),
        Case(text, "bf16", 20, quick_options=_SMALL),
    ]
    if on_gpu:
        cases.append(Case(text, "fp16", 40, quick_options=_SMALL))
    return {case.name: case for case in cases}


def start(case: Case, steps: int, device: torch.device, quick: bool) -> dict[str, Any]:
    """The example's training with every pipeline, from the same seed, for at most so many steps."""
    example = _load(case.example)
    data_class, *makers = (getattr(example, part) for part in _PARTS[case.example])
    options = [*case.options, *(case.quick_options if quick else ())]
    options += ["--dtype", case.dtype, "--device", str(device), "--steps", str(steps)]
    data = data_class(example.parse_arguments(options))
    runs = {}
    for pipeline in PIPELINES:
        baseline = ["--baseline", pipeline.removeprefix("torch_")] if pipeline != OURS else []
        parsed = example.parse_arguments([*options, *baseline])
        runs[pipeline] = makers[pipeline == OURS](parsed, data)
    return runs


def _load(example: str) -> ModuleType:
    """The examples find each other as scripts do, by their folder on the path."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(example)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error}; pip install 'fusedopt[examples]'") from error


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


def add_times(report: Report, trials: Mapping[str, Sequence[Trial]], **columns: object) -> None:
    """Ours in turns with each of the others, and the share of each."""
    for pipeline, taken in trials.items():
        named = {**columns, "pipeline": OURS, "reference": pipeline}
        swapped = [trial.swapped() for trial in taken]
        kept = add_trials(report, TrainingClock.units, swapped, **named)
        for name, times in ((pipeline, [t.reference for t in kept]), (OURS, [t.own for t in kept])):
            shares = [100 * part / whole for part, whole in times]
            report.add("optimizer_share", "%", shares, pipeline=name, **columns)


class Range(NamedTuple):
    """One range: its length, and by name the calls of operators and the times they took themselves.

    Calls include those that operators make of each other, as in the profiler's own table. On a
    GPU also what ran there.
    """

    ms: float
    operators: Counter[str]
    self_ms: Counter[str]
    launches: Counter[str]
    device_ms: Counter[str]


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
    events = profiler.events()
    return read_ranges(events, "optimizer")[1:], read_ranges(events, "iteration")[1:]


def read_ranges(events: Iterable[Any], name: str) -> list[Range]:
    """What lies within the ranges that `torch.profiler.record_function(name)` left.

    Work on a GPU belongs to the range in whose time it ran, so the range has to wait for it.
    """
    events = sorted(events, key=lambda event: event.time_range.start)
    named = [
        event for event in events if event.name == name and event.device_type == DeviceType.CPU
    ]
    return [_range(events, outer) for outer in named]


def _range(events: Sequence[Any], outer: Any) -> Range:
    span = outer.time_range
    inside = [e for e in events if span.start <= e.time_range.start < span.end and e is not outer]
    own = [e for e in inside if e.device_type == DeviceType.CPU and e.thread == outer.thread]
    operators = [e for e in own if not e.is_user_annotation and e.name not in MARKS]
    on_device = [e for e in inside if e.device_type != DeviceType.CPU and e.name not in MARKS]
    self_ms, device_ms = Counter({OUTSIDE: outer.self_cpu_time_total / 1e3}), Counter[str]()
    for event in operators:
        self_ms[event.name] += event.self_cpu_time_total / 1e3
    for event in on_device:
        device_ms[event.name] += event.time_range.elapsed_us() / 1e3
    calls, launches = (Counter(e.name for e in some) for some in (operators, on_device))
    return Range(span.elapsed_us() / 1e3, calls, self_ms, launches, device_ms)


def add_profile(
    report: Report, case: str, pipeline: str, steps: Sequence[Range], iterations: Sequence[Range]
) -> None:
    columns = {"case": case, "pipeline": pipeline}
    top = _top([step.self_ms for step in steps], [step.operators for step in steps])
    counts = [step.operators.total() for step in steps]
    report.add("optimizer_operators", "count", counts, note=top, **columns)
    launches = [step.launches.total() for step in steps]
    if any(launches):
        top = _top([step.device_ms for step in steps], [step.launches for step in steps])
        report.add("optimizer_launches", "count", launches, note=top, **columns)
    shares = [100 * part.ms / whole.ms for part, whole in zip(steps, iterations, strict=True)]
    report.add("optimizer_share_profiled", "%", shares, **columns)


def _top(times: Sequence[Counter[str]], calls: Sequence[Counter[str]]) -> str:
    """What took most time, per step: `aten::mul_ 3x 0.12 ms`."""
    n_steps = len(times)
    all_calls: Counter[str] = sum(calls, Counter())
    entries = []
    for name, ms in sum(times, Counter()).most_common(TOP):
        count = f" {all_calls[name] / n_steps:g}x" if name in all_calls else ""
        entries.append(f"{name}{count} {ms / n_steps:.3f} ms")
    return "; ".join(entries)


def measure(case: Case, args: argparse.Namespace, report: Report, bar: tqdm[Any]) -> None:
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else case.rounds)
    bar.set_description(case.name)
    steps = MAX_WARM_UP + 2 * rounds + 2 + args.profiled  # ours is between all the others
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
    trials = sandwich(runs[OURS], others, TrainingClock(), rounds, rounds, bar.update)
    add_times(report, trials, case=case.name, note=note)
    with tempfile.TemporaryDirectory() as folder:
        for pipeline, run in runs.items():
            path = (args.trace or Path(folder)) / f"{case.name}-{pipeline}.json"
            add_profile(report, case.name, pipeline, *profile_steps(run, args.profiled, path))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = args_of.parser("profile", __doc__)
    add = parser.add_argument
    add("--device", type=device, default=torch.device("cpu"))
    add("--cases", nargs="+", metavar="CASE", help="see a run for the names")
    add("--rounds", type=positive, help="timed iterations of each (default: by case)")
    add("--profiled", type=positive, help="iterations under the profiler (default: 5)")
    add("--threads", type=positive, help="default: torch's, one for each core")
    add("--trace", type=Path, metavar="DIR", help="keep the Chrome traces there")
    add_options(parser, "small models, few rounds")
    args = parser.parse_args(arguments)
    names = list(all_cases(args.device))
    args.cases = args.cases or [name for name in names if not args.quick or "batch" not in name]
    for name in args.cases:
        if name not in names:
            parser.error(f"no case {name} on {args.device.type}; there are {', '.join(names)}")
    args.profiled = args.profiled or (2 if args.quick else 5)
    args.out = destination(args, gpu_name(args.device))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.trace is not None:
        args.trace.mkdir(parents=True, exist_ok=True)
    report = Report(provenance(gpu_name(args.device)), args.out)
    cases = [all_cases(args.device)[name] for name in args.cases]
    rounds = [args.rounds or (QUICK_ROUNDS if args.quick else case.rounds) for case in cases]
    problems: dict[str, Exception] = {}
    with tqdm(total=(len(PIPELINES) - 1) * sum(rounds), unit="sample") as bar:
        for case in cases:
            try:
                measure(case, args, report, bar)
            except (Unavailable, DifferentStep) as error:
                problems[case.name] = error
    print_report(report)
    for name, error in problems.items():
        print(f"{name} not measured: {error}")
    print(f"\n{told(args.out)}")
    return int(any(isinstance(error, DifferentStep) for error in problems.values()))


def print_report(report: Report) -> None:
    known = report.figures()
    print(f"{wide(known, TIMES)}\n\n{wide(known, PROFILED)}\n")
    for row in report.rows:
        if row["unit"] == "count":
            print(f"{row['case']}, {row['pipeline']}, {row['figure']}: {row['note']}")
