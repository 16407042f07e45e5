"""The measuring loop: a case's pipelines are built, held to compute the same step, timed in turns.

A sample of a pipeline lies between two samples of another, the reference, and its ratio is to their
mean, so that a slow drift of the machine cancels. A sample during which other programs had more
than a few percent of the time is disturbed and, while enough others remain, left out.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import pipelines
from benchmarks.cases import Case, Comparison
from benchmarks.clocks import Clock, Sample, Steppable
from benchmarks.param_sets import Gradients, make_params
from benchmarks.pipelines import DifferentStep, Kind, Pipeline, Unavailable
from benchmarks.rows import Report
from benchmarks.stream import STREAMS, Stream

# At the peak, of two pipelines: params, gradients of the last step, states and tables of each; the
# gradients' source, the start, foreach's copies.
BYTES_PER_PARAM = 2 * 18 + 32
# On a CPU pipelines are made anew so many times: where their tensors lie is part of the spread.
BUILDS, BUILDS_OF_LARGE = 5, 2
LARGE = 20_000_000  # elements: these take their time to make, and vary less
MIN_ROUNDS_OF_A_BUILD = 2
MIN_ROUNDS = 5  # also where the time is up


class Trial(NamedTuple):
    """The times of a sample, and the means of those of the reference on both sides."""

    own: tuple[float, ...]
    reference: tuple[float, ...]
    disturbed: bool = False

    @classmethod
    def between(cls, before: Sample, middle: Sample, after: Sample) -> Trial:
        means = ((a + b) / 2 for a, b in zip(before.times, after.times, strict=True))
        disturbed = before.disturbed or middle.disturbed or after.disturbed
        return cls(middle.times, tuple(means), disturbed)

    def swapped(self) -> Trial:
        return Trial(self.reference, self.own, self.disturbed)


def sandwich(
    reference: Steppable, candidates: Mapping[str, Steppable], clock: Clock, rounds: int,
    attempts: int, progress: Callable[[], object] = lambda: None,
    time_is_up: Callable[[], bool] = lambda: False,
) -> dict[str, list[Trial]]:  # fmt: skip
    """Time every candidate `rounds` times, in random order, each between samples of the reference.

    Disturbed samples are taken again as long as a candidate has had fewer than `attempts`.
    """
    take_reference = clock.sampler(reference)
    takes = {name: clock.sampler(candidate) for name, candidate in candidates.items()}
    trials: dict[str, list[Trial]] = {name: [] for name in candidates}
    rng = random.Random(0)
    gc.disable()
    try:
        before = take_reference()
        for round_index in range(attempts):
            if round_index >= MIN_ROUNDS and time_is_up():
                break
            names = [n for n in takes if sum(not t.disturbed for t in trials[n]) < rounds]
            for name in rng.sample(names, len(names)):
                middle = takes[name]()
                after = take_reference()
                trials[name].append(Trial.between(before, middle, after))
                before = after
                if round_index < rounds:
                    progress()
    finally:
        gc.enable()
    return trials


def add_trials(
    report: Report, units: Mapping[str, str], trials: Sequence[Trial],
    scales: Sequence[float] = (1.0, 1.0), **columns: object,
) -> list[Trial]:  # fmt: skip
    """A row for each figure of a clock; times are multiplied by a scale for each side.

    Of the undisturbed trials, which are given back. It is all of them, and the rows are not
    `quiet`, where too few were undisturbed.
    """
    clean = [trial for trial in trials if not trial.disturbed]
    quiet = len(clean) >= max(3, len(trials) // 4) or len(clean) == len(trials)
    used = clean if quiet else list(trials)
    said = {"disturbed": len(trials) - len(clean), "quiet": int(quiet)}
    for index, (figure, unit) in enumerate(units.items()):
        sides = ([s * trial[side][index] for trial in used] for side, s in enumerate(scales))
        report.add(figure, unit, *sides, **said, **columns)
    return used


@dataclass
class Bench:
    """What cases are measured with."""

    clock: Callable[[Case], Clock]
    kinds: Mapping[str, Kind]
    rounds: int
    attempts: int
    device: torch.device | str = "cpu"
    builds: int = BUILDS
    free_bytes: Callable[[], int] = lambda: available_bytes()
    progress: Callable[[int], object] = lambda count: None
    announce: Callable[[str], object] = lambda text: None
    time_is_up: Callable[[], bool] = lambda: False

    def shares(self, numel: int) -> list[int]:
        """The rounds of each build."""
        wanted = min(self.builds, BUILDS_OF_LARGE if numel > LARGE else BUILDS)
        builds = max(1, min(wanted, self.rounds // MIN_ROUNDS_OF_A_BUILD))
        return [len(range(build, self.rounds, builds)) for build in range(builds)]


@dataclass
class Result:
    """A comparison that was measured, or the note why not."""

    case: Case
    comparison: Comparison
    trials: list[Trial] = field(default_factory=list)
    note: str = ""
    wrong: bool = False

    def add_to(self, report: Report, bench: Bench, **columns: object) -> None:
        """A row for each figure of the clock."""
        if not self.trials:
            return
        case, pair = self.case, self.comparison
        reference = bench.kinds.get(pair.reference)
        add_trials(
            report, bench.clock(case).units, self.trials, case=case.name, params=case.numel,
            tensors=len(case.shapes()), grads=case.grads, note=self.note,
            dtype=str(case.dtype).removeprefix("torch."),
            pipeline=pair.pipeline, reference=pair.reference,
            bytes_per_param=bench.kinds[pair.pipeline].bytes_per_param,
            reference_bytes=reference.bytes_per_param if reference else 32, **columns,
        )  # fmt: skip


def run_case(case: Case, bench: Bench) -> list[Result]:
    missing = case.numel * BYTES_PER_PARAM - bench.free_bytes()
    if missing > 0:
        bench.progress(bench.rounds * len(case.comparisons))
        note = f"needs {missing / 2**30:.1f} GiB more memory than is free"
        return [Result(case, comparison, note=note) for comparison in case.comparisons]
    grads = Gradients(case.shapes(), case.dtype, case.grads, bench.device)
    agreed: set[str] = set()  # with another pipeline: then they may run against a stream
    return [_compare(case, comparison, bench, grads, agreed) for comparison in case.comparisons]


def _compare(
    case: Case, comparison: Comparison, bench: Bench, grads: Gradients, agreed: set[str]
) -> Result:
    """Timed in turns with each other, several times with pipelines that are made anew."""
    result = Result(case, comparison)
    names = comparison.pipeline, comparison.reference
    building = names[0]
    for rounds in bench.shares(case.numel):
        gc.collect()  # the last build's optimizers lie in cycles, and there may be room for one
        bench.announce(f"{case.name}: {' | '.join(names)}")
        try:
            pair: list[Pipeline | Stream] = []
            for building in names:
                if building not in STREAMS:
                    params = make_params(case.shapes(), case.dtype, bench.device)
                    pair.append(bench.kinds[building].build(params, grads))
                    pipelines.take_checked_steps(pair[-1], grads)
                elif names[0] in agreed:
                    pair.append(STREAMS[building](case.numel))
                else:  # it takes no steps that could be compared
                    raise Unavailable(f"{names[0]} agreed with no other pipeline")
            told = [one.describe() for one in pair]
            if names[1] not in STREAMS:
                start = make_params(case.shapes(), case.dtype, bench.device)
                allowed = max(bench.kinds[name].allowed for name in names)
                excess = pipelines.compare_steps([p.detach() for p in start], *pair, allowed)
                told += [f"steps differ by {excess:.0f} x the tolerance"] if allowed > 1.0 else []
                agreed |= {*names}
        except Exception as error:  # a rival that fails must not take the others with it
            absent = isinstance(error, Unavailable)
            text = str(error) if absent else f"{type(error).__name__}: {error}"
            note = (text.splitlines() or ["no message"])[0][:200]
            ours_failed = building.startswith("fusedopt") and not absent
            bench.progress(bench.rounds)
            wrong = isinstance(error, DifferentStep) or ours_failed
            return Result(case, comparison, note=note, wrong=wrong)
        result.note = "; ".join(filter(None, told))
        attempts = rounds * bench.attempts // bench.rounds
        clock, advance = bench.clock(case), lambda: bench.progress(1)
        own, reference = pair
        taken = sandwich(reference, {"": own}, clock, rounds, attempts, advance, bench.time_is_up)
        result.trials += taken[""]
    return result


def available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) << 10
