"""One case: its pipelines are built, held to compute the same step, and timed in turns.

A round takes a sample of every pipeline, in random order. A sample reads three clocks: the GPU's,
with all of the step in the queue before it starts and the caches cold; the wall's, from an idle GPU
to an idle GPU; and the host's share of that, until everything is enqueued.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.machine import Machine
from benchmarks.param_sets import Gradients, make_params
from benchmarks.pipelines import (
    DifferentStep,
    Kind,
    Pipeline,
    Unavailable,
    compare_steps,
    take_checked_steps,
)
from benchmarks.timing import Spread, spread

SMALL = 30_000_000  # up to here a sample is the median of several steps
STEPS_OF_SMALL = 3
WARMUP = 3
MIN_ROUNDS = 5
BYTES_PER_PARAM = 18  # of one pipeline, gradients and tables included
BYTES_OF_TEMPORARIES = 28  # the largest pipeline's, the comparison's, the gradients' source


@dataclass
class Sample:
    gpu_ms: float
    wall_ms: float
    host_us: float


@dataclass
class Measured:
    """A pipeline in a case; ratios are its times over those of ours in the same round."""

    case: GpuCase
    pipeline: str
    kind: Kind
    note: str = ""
    wrong: bool = False
    samples: list[Sample] = field(default_factory=list)
    ours: list[Sample] = field(default_factory=list)
    launches: int | None = None

    def figure(self, clock: str) -> Spread | None:
        values = [getattr(sample, clock) for sample in self.samples]
        return spread(values) if values else None

    def ratio(self, clock: str) -> Spread | None:
        pairs = zip(self.samples, self.ours, strict=True)
        values = [getattr(own, clock) / getattr(other, clock) for own, other in pairs]
        return spread(values) if values else None


def measure_case(
    case: GpuCase,
    kinds: dict[str, Kind],
    machine: Machine,
    rounds: int,
    left: Callable[[], float],
    count_launches: bool,
) -> list[Measured]:
    """`count_launches` starts the profiler, after which the host may be slower for good."""
    grads = Gradients(case.shapes(), case.dtype, case.grads, machine.device)
    measured = {name: Measured(case, name, kinds[name]) for name in case.pipelines}
    for group in _groups(case, machine.free_bytes()):
        if measured[case.ours].wrong:
            break
        members = [measured[name] for name in group]
        _measure_group(members, grads, machine, rounds, left, count_launches)
        machine.release_memory()
    return list(measured.values())


def count_launches_anew(measured: Sequence[Measured], machine: Machine) -> None:
    """For pipelines that were measured before the profiler was to run: with new ones."""
    for item in measured:
        if item.samples and item.launches is None:
            case = item.case
            shapes = case.shapes()
            grads = Gradients(shapes, case.dtype, case.grads, machine.device)
            pipeline = item.kind.build(make_params(shapes, case.dtype, machine.device), grads)
            take_checked_steps(pipeline, grads)
            pipeline.prepare()
            item.launches = len(machine.launches(pipeline.step))


def _groups(case: GpuCase, free_bytes: int) -> Iterator[list[str]]:
    """Pipelines that are in memory together: ours with as many rivals as there is room for."""
    rivals = case.pipelines[1:]
    per_param = free_bytes / case.numel - BYTES_OF_TEMPORARIES
    room = max(1, int(per_param / BYTES_PER_PARAM) - 1)
    for first in range(0, len(rivals), room):
        yield [case.ours, *rivals[first : first + room]]


def _measure_group(
    group: Sequence[Measured],
    grads: Gradients,
    machine: Machine,
    rounds: int,
    left: Callable[[], float],
    count_launches: bool,
) -> None:
    ours = group[0]
    pipelines = _checked(group, grads, machine)
    if ours.pipeline not in pipelines:
        for item in group[1:]:
            item.note = item.note or f"not measured without {ours.pipeline}"
        return
    samples = _sample_in_turns(pipelines, ours.case.numel <= SMALL, machine, rounds, left)
    for item in group:
        if item.pipeline not in pipelines:
            continue
        pipeline = pipelines[item.pipeline]
        if not item.samples:  # ours is in every group; the first one's figures stand
            item.samples, item.ours = samples[item.pipeline], samples[ours.pipeline]
            item.note = pipeline.describe()
        if count_launches:
            pipeline.prepare()
            item.launches = len(machine.launches(pipeline.step))


def _checked(group: Sequence[Measured], grads: Gradients, machine: Machine) -> dict[str, Pipeline]:
    """New pipelines that have taken the checked steps, and agree with ours."""
    case = group[0].case
    shapes = case.shapes()
    start = [param.detach() for param in make_params(shapes, case.dtype, machine.device)]
    pipelines: dict[str, Pipeline] = {}
    for item in group:
        try:
            pipeline = item.kind.build(make_params(shapes, case.dtype, machine.device), grads)
            take_checked_steps(pipeline, grads)
            if pipelines:
                compare_steps(start, pipelines[case.ours], pipeline, item.kind.allowed)
        except Exception as error:  # a rival that fails must not take the others with it
            is_absent = isinstance(error, Unavailable)
            text = str(error) if is_absent else f"{type(error).__name__}: {error}"
            item.note = (text.splitlines() or ["no message"])[0][:200]
            item.wrong = isinstance(error, DifferentStep) or (
                not is_absent and item.pipeline.startswith("fusedopt")
            )
            if item is group[0]:
                item.wrong = True
                break
        else:
            pipelines[item.pipeline] = pipeline
    return pipelines


def _sample_in_turns(
    pipelines: dict[str, Pipeline],
    small: bool,
    machine: Machine,
    rounds: int,
    left: Callable[[], float],
) -> dict[str, list[Sample]]:
    holds = {name: _warm_up(pipeline, machine) for name, pipeline in pipelines.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in pipelines}
    rng = random.Random(0)
    steps = STEPS_OF_SMALL if small and not machine.dry else 1
    gc.collect()
    gc.disable()
    try:
        for round_index in range(rounds):
            if round_index >= MIN_ROUNDS and left() < 0:
                break
            for name in rng.sample(list(pipelines), len(pipelines)):
                taken = [_sample(pipelines[name], machine, holds[name]) for _ in range(steps)]
                samples[name].append(_median(taken))
    finally:
        gc.enable()
    return samples


def _warm_up(pipeline: Pipeline, machine: Machine) -> float:
    """How long the GPU has to be kept busy, in ms, until a whole step is in its queue."""
    rounds = 1 if machine.dry else WARMUP
    times = [_sample(pipeline, machine, 0.0).host_us for _ in range(rounds)]
    return 1.5e-3 * min(times) + 0.2


def _sample(pipeline: Pipeline, machine: Machine, hold_ms: float) -> Sample:
    pipeline.prepare()
    (gpu_ms,) = machine.event_ms([pipeline.step], hold_ms)
    pipeline.prepare()
    machine.synchronize()
    start = time.perf_counter()
    pipeline.step()
    enqueued = time.perf_counter()
    machine.synchronize()
    done = time.perf_counter()
    return Sample(gpu_ms, 1e3 * (done - start), 1e6 * (enqueued - start))


def _median(samples: Sequence[Sample]) -> Sample:
    return Sample(
        statistics.median(sample.gpu_ms for sample in samples),
        statistics.median(sample.wall_ms for sample in samples),
        statistics.median(sample.host_us for sample in samples),
    )
