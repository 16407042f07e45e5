"""The two clocks: the host's, on a machine that other programs may be using, and a GPU's events."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from benchmarks.gpu.machine import Machine

MAX_FOREIGN_SHARE = 0.05
MIN_SAMPLE_S = 0.02
MAX_STEPS_PER_SAMPLE = 16
SMALL = 30_000_000  # elements: up to here a sample of a GPU's clock is the median of several steps
STEPS_OF_SMALL = 3
WARMUP = 3


class Steppable(Protocol):
    def prepare(self) -> None:
        """What happens between two steps; never timed."""

    def step(self) -> object:
        """What is timed."""


class Sample(NamedTuple):
    times: tuple[float, ...]  # one for each figure of the clock
    disturbed: bool = False


Sampler = Callable[[], Sample]


class Clock(Protocol):
    units: dict[str, str]  # of the figures that a sample has

    def sampler(self, pipeline: Steppable) -> Sampler: ...


class ForeignLoad:
    """Share of a stretch of time that other programs took away; 0.0 where /proc does not tell.

    The larger of two measures: how long our threads were ready to run and had no CPU, and how much
    CPU time was spent (or stolen by the host) outside this process, less the grain of that clock.
    """

    share = 0.0

    def __enter__(self) -> ForeignLoad:
        self._waiting, self._busy = waiting_seconds(), busy_seconds()
        self._own, self._start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        wall = time.perf_counter() - self._start
        own = time.process_time() - self._own
        grain = (os.cpu_count() or 1) / CLOCK_TICKS
        others = busy_seconds() - self._busy - own - grain
        waiting = waiting_seconds() - self._waiting
        self.share = max(0.0, others, waiting) / wall

    @property
    def disturbed(self) -> bool:
        return self.share > MAX_FOREIGN_SHARE


CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def busy_seconds() -> float:
    """CPU time of the whole machine that was neither idle nor waiting for a disk."""
    try:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / CLOCK_TICKS


def waiting_seconds() -> float:
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


class HostClock:
    """A sample is the median of as many steps as make up `MIN_SAMPLE_S`."""

    units = {"step": "ms"}  # noqa: RUF012

    def sampler(self, pipeline: Steppable) -> Sampler:
        quickest = min(step_ms(pipeline) for _ in range(2))
        steps = max(1, min(MAX_STEPS_PER_SAMPLE, round(1e3 * MIN_SAMPLE_S / quickest)))

        def take() -> Sample:
            with ForeignLoad() as load:
                ms = statistics.median(step_ms(pipeline) for _ in range(steps))
            return Sample((ms,), load.disturbed)

        return take


def step_ms(pipeline: Steppable) -> float:
    pipeline.prepare()
    start = time.perf_counter()
    pipeline.step()
    return 1e3 * (time.perf_counter() - start)


class EventClock:
    """A sample has three figures: the GPU's time, with all of the step in the queue before it
    starts and the caches cold; the wall's, from an idle GPU to an idle GPU; and the host's share of
    that, until everything is enqueued."""

    units = {"gpu": "ms", "wall": "ms", "host": "us"}  # noqa: RUF012

    def __init__(self, machine: Machine, numel: int) -> None:
        self._machine = machine
        self._steps = STEPS_OF_SMALL if numel <= SMALL and not machine.dry else 1

    def sampler(self, pipeline: Steppable) -> Sampler:
        warmup = range(1 if self._machine.dry else WARMUP)
        host_us = min(self._step(pipeline, 0.0)[2] for _ in warmup)
        hold_ms = 1.5e-3 * host_us + 0.2  # until a whole step is in the GPU's queue

        def take() -> Sample:
            steps = [self._step(pipeline, hold_ms) for _ in range(self._steps)]
            return Sample(tuple(map(statistics.median, zip(*steps, strict=True))))

        return take

    def _step(self, pipeline: Steppable, hold_ms: float) -> tuple[float, float, float]:
        pipeline.prepare()
        gpu_ms = self._machine.event_ms(pipeline.step, hold_ms)
        pipeline.prepare()
        self._machine.synchronize()
        start = time.perf_counter()
        pipeline.step()
        enqueued = time.perf_counter()
        self._machine.synchronize()
        return gpu_ms, 1e3 * (time.perf_counter() - start), 1e6 * (enqueued - start)
