"""The measuring loop: a case's pipelines are built, held to compute the same step, timed in turns.

A sample of a pipeline lies between two samples of another, the pivot, and its ratio is to their
mean, so that a slow drift of the machine cancels. A sample during which other programs had more
than a few percent of the time is disturbed and, while enough others remain, left out.
"""

from __future__ import annotations

import gc
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import pipelines
from benchmarks.cases import Case, Comparison
from benchmarks.clocks import Clock, Sample, Steppable
from benchmarks.param_sets import Gradients, make_params
from benchmarks.pipelines import DifferentStep, Kind, Pipeline, Unavailable
from benchmarks.rows import Report
from benchmarks.stream import STREAMS, Stream

BYTES_PER_PARAM = 18  # a pipeline's own: params, gradients of the last step, states, tables
BYTES_BESIDES = 32  # the gradients' source, the start, foreach's copies
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
    gc.collect()
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
    free = bench.free_bytes()
    missing = case.numel * (2 * BYTES_PER_PARAM + BYTES_BESIDES) - free
    if missing > 0:
        bench.progress(bench.rounds * len(case.comparisons))
        note = f"needs {missing / 2**30:.1f} GiB more memory than is free"
        return [Result(case, comparison, note=note) for comparison in case.comparisons]
    run = CaseRun(case, bench)
    for pivot, group in groups(case, free):
        run.measure(pivot, group)
    return [run.results[comparison] for comparison in case.comparisons]


def groups(case: Case, free_bytes: int) -> Iterator[tuple[str, list[Comparison]]]:
    """Comparisons that are measured together, and the pipeline that is in all of them: the pivot.

    A sample of the pivot lies between any two of the others, whose order is random. As many are in
    a group as there is memory for.
    """
    room = max(1, int((free_bytes / case.numel - BYTES_BESIDES) / BYTES_PER_PARAM) - 1)
    left = list(case.comparisons)
    while left:
        names = [name for c in left for name in (c.pipeline, c.reference) if name not in STREAMS]
        pivot = Counter(names).most_common(1)[0][0]
        together = [c for c in left if pivot in (c.pipeline, c.reference)]
        left = [c for c in left if c not in together]
        for first in range(0, len(together), room):
            yield pivot, together[first : first + room]


def _shares(rounds: int, numel: int, most: int = BUILDS) -> list[int]:
    """The rounds of each build."""
    wanted = min(most, BUILDS_OF_LARGE if numel > LARGE else BUILDS)
    builds = max(1, min(wanted, rounds // MIN_ROUNDS_OF_A_BUILD))
    return [rounds // builds + (build < rounds % builds) for build in range(builds)]


class CaseRun:
    """Collects the results of one case."""

    def __init__(self, case: Case, bench: Bench) -> None:
        self.results: dict[Comparison, Result] = {}
        self._case, self._bench = case, bench
        self._grads = Gradients(case.shapes(), case.dtype, case.grads, bench.device)
        self._agreed: set[str] = set()  # with another pipeline: then it may run against a stream

    def measure(self, pivot: str, group: Sequence[Comparison]) -> None:
        by_other = {c.reference if c.pipeline == pivot else c.pipeline: c for c in group}
        trials: dict[str, list[Trial]] = {name: [] for name in by_other}
        notes: dict[str, str] = {}
        for rounds in _shares(self._bench.rounds, self._case.numel, self._bench.builds):
            gc.collect()  # the last build's optimizers lie in cycles, and there may be room for one
            self._measure_one_build(pivot, by_other, rounds, trials, notes)
        for name in notes:
            comparison, taken = by_other[name], trials[name]
            if comparison.pipeline == pivot:
                taken = [trial.swapped() for trial in taken]
            self.results[comparison] = Result(self._case, comparison, taken, notes[name])

    def _measure_one_build(
        self, pivot: str, by_other: dict[str, Comparison], rounds: int,
        trials: dict[str, list[Trial]], notes: dict[str, str],
    ) -> None:  # fmt: skip
        """Adds `rounds` trials of each pipeline that can be built, and what is told of it."""
        bench = self._bench
        center: Pipeline | None = None
        others: dict[str, Pipeline | Stream] = {}
        for name, comparison in by_other.items():
            if comparison in self.results:  # it failed when it was first built
                continue
            bench.announce(f"{self._case.name}: {name} | {pivot}")
            try:
                center = center or self._stepped(pivot)
                others[name], allowed = self._agreeing(name, pivot, center)
                told = (center.describe(), others[name].describe(), allowed)
                notes[name] = "; ".join(filter(None, told))
            except Exception as error:  # a rival that fails must not take the others with it
                notes.pop(name, None)
                self._failed(comparison, name if center else pivot, error)
        if center is None or not others:
            return
        attempts = rounds * bench.attempts // bench.rounds
        clock, advance = bench.clock(self._case), lambda: bench.progress(1)
        taken = sandwich(center, others, clock, rounds, attempts, advance, bench.time_is_up)
        for name in taken:
            trials[name] += taken[name]

    def _stepped(self, name: str) -> Pipeline:
        pipeline = self._bench.kinds[name].build(self._params(), self._grads)
        pipelines.take_checked_steps(pipeline, self._grads)
        return pipeline

    def _agreeing(self, name: str, pivot: str, center: Pipeline) -> tuple[Pipeline | Stream, str]:
        """A new pipeline that has taken the checked steps as the pivot did, and what it allowed.

        A stream takes none: there the pivot has to agree with another pipeline.
        """
        if name in STREAMS:
            if pivot not in self._agreed:
                raise Unavailable(f"{pivot} agreed with no other pipeline")
            return STREAMS[name](self._case.numel), ""
        pipeline = self._stepped(name)
        allowed = max(self._bench.kinds[one].allowed for one in (name, pivot))
        start = [param.detach() for param in self._params()]
        excess = pipelines.compare_steps(start, center, pipeline, allowed)
        self._agreed |= {name, pivot}
        return pipeline, f"steps differ by {excess:.0f} x the tolerance" if allowed > 1.0 else ""

    def _params(self) -> list[Tensor]:
        return make_params(self._case.shapes(), self._case.dtype, self._bench.device)

    def _failed(self, comparison: Comparison, pipeline: str, error: Exception) -> None:
        absent = isinstance(error, Unavailable)
        text = str(error) if absent else f"{type(error).__name__}: {error}"
        note = (text.splitlines() or ["no message"])[0][:200]
        ours_failed = pipeline.startswith("fusedopt") and not absent
        wrong = isinstance(error, DifferentStep) or ours_failed
        self.results[comparison] = Result(self._case, comparison, note=note, wrong=wrong)
        self._bench.progress(self._bench.rounds)


def available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) << 10
