"""Interleaved timing on a machine that other programs may be using.

A sample of a candidate lies between two samples of the reference and is divided by their mean, so
a slow drift of the machine cancels. A sample during which other programs had more than
`MAX_FOREIGN_SHARE` of the time is flagged as disturbed and, while enough others remain, left out.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MAX_FOREIGN_SHARE = 0.05
MIN_SAMPLE_S = 0.02
MAX_STEPS_PER_SAMPLE = 16


class Steppable(Protocol):
    def prepare(self) -> None:
        """What happens between two steps; never timed."""

    def step(self) -> object:
        """What is timed."""


class ForeignLoad:
    """Share of a stretch of time that other programs took away; 0.0 where /proc does not tell.

    The larger of two measures: how long our threads were ready to run and had no CPU, and how much
    CPU time was spent (or stolen by the host) outside this process, less the grain of that clock.
    """

    share = 0.0

    def __enter__(self) -> ForeignLoad:
        self._waiting, self._busy = _waiting_seconds(), _busy_seconds()
        self._own, self._start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        wall = time.perf_counter() - self._start
        own = time.process_time() - self._own
        grain = (os.cpu_count() or 1) / _CLOCK_TICKS
        others = _busy_seconds() - self._busy - own - grain
        waiting = _waiting_seconds() - self._waiting
        self.share = max(0.0, others, waiting) / wall


_CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _busy_seconds() -> float:
    """CPU time of the whole machine that was neither idle nor waiting for a disk."""
    try:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / _CLOCK_TICKS


def _waiting_seconds() -> float:
    total = 0
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return 0.0
    for thread in threads:
        try:
            with open(f"/proc/self/task/{thread}/schedstat") as file:
                total += int(file.read().split()[1])
        except (OSError, IndexError):
            continue  # the thread ended, or the kernel keeps no such statistics
    return total * 1e-9


@dataclass(frozen=True)
class Sample:
    seconds: float
    disturbed: bool


@dataclass(frozen=True)
class Trial:
    """One sample of a candidate and the mean of the reference's samples on both sides."""

    seconds: float
    reference_seconds: float
    disturbed: bool

    @property
    def ratio(self) -> float:
        return self.reference_seconds / self.seconds

    def swapped(self) -> Trial:
        """The reference against the candidate."""
        return Trial(self.reference_seconds, self.seconds, self.disturbed)


def timed_step(pipeline: Steppable) -> float:
    pipeline.prepare()
    start = time.perf_counter()
    pipeline.step()
    return time.perf_counter() - start


class Sampler:
    """Takes samples of one pipeline: the median of as many steps as make up `MIN_SAMPLE_S`."""

    def __init__(self, pipeline: Steppable) -> None:
        self._pipeline = pipeline
        quickest = min(timed_step(pipeline) for _ in range(2))
        self._steps = max(1, min(MAX_STEPS_PER_SAMPLE, round(MIN_SAMPLE_S / quickest)))

    def __call__(self) -> Sample:
        with ForeignLoad() as load:
            seconds = statistics.median(timed_step(self._pipeline) for _ in range(self._steps))
        return Sample(seconds, load.share > MAX_FOREIGN_SHARE)


def sandwich(
    reference: Steppable,
    candidates: Mapping[str, Steppable],
    rounds: int,
    attempts: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[Trial]]:
    """Time every candidate `rounds` times, in random order, each between samples of the reference.

    Disturbed samples are taken again as long as a candidate has had fewer than `attempts`.
    """
    take_reference = Sampler(reference)
    takes = {name: Sampler(candidate) for name, candidate in candidates.items()}
    trials: dict[str, list[Trial]] = {name: [] for name in candidates}
    rng = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        before = take_reference()
        for round_index in range(attempts):
            names = [name for name in takes if _undisturbed(trials[name]) < rounds]
            for name in rng.sample(names, len(names)):
                middle = takes[name]()
                after = take_reference()
                trials[name].append(_trial(before, middle, after))
                before = after
                if round_index < rounds:
                    progress()
    finally:
        gc.enable()
    return trials


def _trial(before: Sample, middle: Sample, after: Sample) -> Trial:
    disturbed = before.disturbed or middle.disturbed or after.disturbed
    return Trial(middle.seconds, (before.seconds + after.seconds) / 2, disturbed)


def _undisturbed(trials: Sequence[Trial]) -> int:
    return sum(not trial.disturbed for trial in trials)


@dataclass(frozen=True)
class Spread:
    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Summary:
    ms: Spread
    reference_ms: Spread
    ratio: Spread
    samples: int
    disturbed: int
    quiet: bool


def summarize(trials: Sequence[Trial]) -> Summary:
    """Over the undisturbed samples; over all of them, and not `quiet`, where too few were."""
    clean = [trial for trial in trials if not trial.disturbed]
    quiet = len(clean) >= max(3, len(trials) // 4) or len(clean) == len(trials)
    used = clean if quiet else list(trials)
    return Summary(
        ms=spread([1e3 * trial.seconds for trial in used]),
        reference_ms=spread([1e3 * trial.reference_seconds for trial in used]),
        ratio=spread([trial.ratio for trial in used]),
        samples=len(used),
        disturbed=len(trials) - len(clean),
        quiet=quiet,
    )


def spread(values: Sequence[float]) -> Spread:
    return Spread(*(float(value) for value in np.percentile(values, [20, 50, 80])))
