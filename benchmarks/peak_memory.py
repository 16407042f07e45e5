"""Peak memory of a pipeline's first two steps in this process, which should be a new one."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import fusedopt
from benchmarks.param_sets import LISTS, Gradients, make_params
from benchmarks.pipelines import (
    ADAMW,
    MAX_GRAD_NORM,
    Ours,
    Pipeline,
    TorchOpsMasters,
    compare_steps,
    take_checked_steps,
    torch_adamw,
)

INIT_STATE = "fusedopt_init_state"  # opt.init_state() before the first step
PIPELINES = ("torch_foreach", "torch_fused", "fusedopt", INIT_STATE)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP_LIST = "gpt-1M"


@dataclass(frozen=True)
class Job:
    """One measurement, in values that JSON can carry."""

    params: str
    dtype: str
    pipeline: str
    device: str
    threads: int


@dataclass(frozen=True)
class Peaks:
    """Bytes above those of parameters and gradients; `added` above those just before the step."""

    first_peak: int
    first_added: int
    second_peak: int
    second_added: int


class Meter(Protocol):
    name: str
    exact: bool  # no: a lower bound

    def now(self) -> int: ...

    def reset_peak(self) -> None: ...

    def peak(self) -> int: ...


class Resident:
    """What Linux counts as resident."""

    name, exact = "resident", True

    def now(self) -> int:
        return self._status("VmRSS")

    def reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._status("VmHWM")

    @staticmethod
    def _status(field: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


class LargestEver:
    """The peak since the process began, which cannot be reset: misses what an older peak hides."""

    name, exact = "resident", False

    def now(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def reset_peak(self) -> None:
        pass

    def peak(self) -> int:
        return self.now()


class CudaAllocated:
    """What torch's allocator has given to tensors."""

    name, exact = "allocated", True

    def now(self) -> int:
        return int(torch.cuda.memory_allocated())

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated())


class CudaReserved(CudaAllocated):
    """What torch's allocator holds of the GPU: what nvidia-smi shows, and runs out."""

    name = "reserved"

    def now(self) -> int:
        return int(torch.cuda.memory_reserved())

    def peak(self) -> int:
        return int(torch.cuda.max_memory_reserved())


def meters(device: torch.device) -> list[Meter]:
    if device.type == "cuda":
        return [CudaAllocated(), CudaReserved()]
    try:
        Resident().reset_peak()
        Resident().peak()
    except (OSError, StopIteration):
        return [LargestEver()]
    return [Resident()]


def build(job: Job, params: list[Tensor], grads: Gradients) -> Pipeline:
    if job.pipeline.startswith("fusedopt"):
        ours: Callable[[list[Tensor]], Any] = lambda p: fusedopt.FusedAdamW(  # noqa: E731
            p, max_grad_norm=MAX_GRAD_NORM, **ADAMW
        )
        pipeline = Ours(params, grads, ours, fusedopt.GradScaler)
        if job.pipeline == INIT_STATE:
            pipeline.optimizer.init_state()
        return pipeline
    make = torch_adamw(**{job.pipeline.removeprefix("torch_"): True})
    kind = Pipeline if params[0].dtype == torch.float32 else TorchOpsMasters
    return kind(params, grads, make)


def start(job: Job, name: str) -> tuple[list[Tensor], Gradients]:
    """Parameters of the list ``name``, with gradients as backward() leaves them."""
    shapes, dtype = LISTS[name](), DTYPES[job.dtype]
    params = make_params(shapes, dtype, job.device)
    grads = Gradients(shapes, dtype, device=job.device)
    grads.backward(params)
    return params, grads


def check_same_step(dtype: str, pipelines: Sequence[str], device: torch.device) -> None:
    """Hold the pipelines to one step of a small list; raises DifferentStep."""
    shapes = LISTS[WARM_UP_LIST]()

    def new_params() -> list[Tensor]:
        return make_params(shapes, DTYPES[dtype], device)

    grads = Gradients(shapes, DTYPES[dtype], device=device)
    jobs = (Job(WARM_UP_LIST, dtype, name, str(device), 1) for name in pipelines)
    built = [build(job, new_params(), grads) for job in jobs]
    for pipeline in built:
        take_checked_steps(pipeline, grads)
    start = [param.detach() for param in new_params()]
    for other in built[1:]:
        compare_steps(start, built[0], other)


def warm_up(job: Job) -> None:
    """Two steps on a small list, so that code, threads and lazy imports are in memory already."""
    pipeline = build(job, *start(job, WARM_UP_LIST))
    pipeline.step()
    pipeline.prepare()
    pipeline.step()


def release_unused(device: torch.device) -> None:
    """Give back what allocators keep for later, so that every peak is of memory in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def measure(job: Job) -> dict[str, Any]:
    """Bytes of parameters, gradients and state, and by meter the `Peaks`."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    own = meters(device)
    warm_up(job)
    params, grads = start(job, job.params)
    release_unused(device)
    before = [meter.now() for meter in own]
    own[0].reset_peak()
    pipeline = build(job, params, grads)
    built = [meter.peak() for meter in own]
    first_start, first = _step(pipeline, own)
    states = state_bytes(pipeline)
    pipeline.prepare()
    release_unused(device)
    second_start, second = _step(pipeline, own)
    peaks = {
        meter.name: Peaks(
            first_peak=max(built[i], first[i]) - before[i],
            first_added=first[i] - first_start[i],
            second_peak=second[i] - before[i],
            second_added=second[i] - second_start[i],
        )
        for i, meter in enumerate(own)
    }
    return {
        "param_bytes": sum(param.nbytes for param in params),
        "state_bytes": states,
        "backend": pipeline.backend() if isinstance(pipeline, Ours) else "",
        "exact": all(meter.exact for meter in own),
        "peaks": {name: vars(peak) for name, peak in peaks.items()},
    }


def _step(pipeline: Pipeline, own: Sequence[Meter]) -> tuple[list[int], list[int]]:
    start_bytes = [meter.now() for meter in own]
    own[0].reset_peak()
    pipeline.step()
    return start_bytes, [meter.peak() for meter in own]


def state_bytes(pipeline: Pipeline) -> int:
    """What has to stay from step to step: the optimizer's state and the masters."""
    states = pipeline.optimizer.state.values()
    kept = [value for own in states for value in own.values() if isinstance(value, Tensor)]
    if isinstance(pipeline, TorchOpsMasters):
        kept += pipeline.masters
    return sum(tensor.nbytes for tensor in kept)
