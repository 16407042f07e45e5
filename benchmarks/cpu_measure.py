"""One case on the CPU: its pipelines are built, held to compute the same step, timed in turns."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from benchmarks.cases import Case, Comparison
from benchmarks.param_sets import Gradients, make_params
from benchmarks.pipelines import (
    DifferentStep,
    Pipeline,
    Unavailable,
    compare_steps,
    take_checked_steps,
)
from benchmarks.registry import KINDS
from benchmarks.report import Result
from benchmarks.stream import STREAMS, Stream
from benchmarks.timing import Trial, sandwich, summarize

BYTES_PER_PARAM = 16  # a pipeline's own: params, gradients of the last step, states
BYTES_BESIDES = 32  # the gradients' source, the start, foreach's copies
# Pipelines are made anew so many times: where their tensors lie in memory is part of the spread.
BUILDS, BUILDS_OF_LARGE = 5, 2
LARGE = 20_000_000  # elements: these take their time to make, and vary less
MIN_ROUNDS_OF_A_BUILD = 2


class Progress:
    """The bar, and how many samples of each comparison are wanted and at most taken."""

    def __init__(self, cases: Sequence[Case], rounds: int, attempts: int) -> None:
        self.rounds, self.attempts = rounds, attempts
        total = rounds * sum(len(case.comparisons) for case in cases)
        self._bar: tqdm[Any] = tqdm(total=total, unit="sample", disable=None)  # None: no terminal

    def announce(self, case: Case, pipeline: str, pivot: str) -> None:
        self._bar.set_description(f"{case.name}: {pipeline} | {pivot}")

    def advance(self, count: int = 1) -> None:
        self._bar.update(count)

    def close(self) -> None:
        self._bar.close()


def run_case(case: Case, kind_of_grads: str, progress: Progress) -> list[Result]:
    free = available_bytes()
    missing = case.numel * (2 * BYTES_PER_PARAM + BYTES_BESIDES) - free
    if missing > 0:
        progress.advance(progress.rounds * len(case.comparisons))
        note = f"needs {missing / 2**30:.1f} GiB more memory than is free"
        return [Result(case, comparison, note=note) for comparison in case.comparisons]
    run = CaseRun(case, kind_of_grads, progress)
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


def _shares(rounds: int, numel: int) -> list[int]:
    """The rounds of each build."""
    wanted = BUILDS_OF_LARGE if numel > LARGE else BUILDS
    builds = max(1, min(wanted, rounds // MIN_ROUNDS_OF_A_BUILD))
    return [rounds // builds + (build < rounds % builds) for build in range(builds)]


class CaseRun:
    """Collects the results of one case."""

    def __init__(self, case: Case, kind_of_grads: str, progress: Progress) -> None:
        self.results: dict[Comparison, Result] = {}
        self._case, self._progress = case, progress
        self._grads = Gradients(case.shapes(), case.dtype, kind_of_grads)
        self._agreed: set[str] = set()  # with another pipeline: then it may run against a stream

    def measure(self, pivot: str, group: Sequence[Comparison]) -> None:
        by_other = {c.reference if c.pipeline == pivot else c.pipeline: c for c in group}
        trials: dict[str, list[Trial]] = {name: [] for name in by_other}
        notes: dict[str, str] = {}
        for rounds in _shares(self._progress.rounds, self._case.numel):
            gc.collect()  # the last build's optimizers lie in cycles, and there may be room for one
            self._measure_one_build(pivot, by_other, rounds, trials, notes)
        for name in notes:
            comparison, taken = by_other[name], trials[name]
            swapped = comparison.pipeline == pivot
            summary = summarize([trial.swapped() for trial in taken] if swapped else taken)
            self.results[comparison] = Result(self._case, comparison, summary, notes[name])

    def _measure_one_build(
        self,
        pivot: str,
        by_other: dict[str, Comparison],
        rounds: int,
        trials: dict[str, list[Trial]],
        notes: dict[str, str],
    ) -> None:
        """Adds `rounds` trials of each pipeline that can be built, and what is told of it."""
        center: Pipeline | None = None
        others: dict[str, Pipeline | Stream] = {}
        for name, comparison in by_other.items():
            if comparison in self.results:  # it failed when it was first built
                continue
            self._progress.announce(self._case, name, pivot)
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
        attempts = rounds * self._progress.attempts // self._progress.rounds
        taken = sandwich(center, others, rounds, attempts, self._progress.advance)
        for name in taken:
            trials[name] += taken[name]

    def _stepped(self, name: str) -> Pipeline:
        pipeline = KINDS[name].build(self._params(), self._grads)
        take_checked_steps(pipeline, self._grads)
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
        allowed = max(KINDS[name].allowed, KINDS[pivot].allowed)
        start = [param.detach() for param in self._params()]
        excess = compare_steps(start, center, pipeline, allowed)
        self._agreed |= {name, pivot}
        return pipeline, f"steps differ by {excess:.0f} x the tolerance" if allowed > 1.0 else ""

    def _params(self) -> list[Tensor]:
        return make_params(self._case.shapes(), self._case.dtype)

    def _failed(self, comparison: Comparison, pipeline: str, error: Exception) -> None:
        absent = isinstance(error, Unavailable)
        text = str(error) if absent else f"{type(error).__name__}: {error}"
        note = (text.splitlines() or ["no message"])[0][:200]
        ours_failed = pipeline.startswith("fusedopt") and not absent
        wrong = isinstance(error, DifferentStep) or ours_failed
        self.results[comparison] = Result(self._case, comparison, note=note, wrong=wrong)
        self._progress.advance(self._progress.rounds)


def available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) << 10
