"""In the processes of `python -m benchmarks distributed`: parameters that are DTensors, pipelines
over this rank's part of them, and a clock for which the slowest rank counts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt
from benchmarks.clocks import (
    CLOCK_TICKS,
    MAX_FOREIGN_SHARE,
    Sample,
    Sampler,
    Steppable,
    busy_seconds,
    waiting_seconds,
)
from benchmarks.param_sets import Gradients, Shape, make_params
from benchmarks.pipelines import ADAMW, MAX_GRAD_NORM, Ours, Pipeline


@dataclass(frozen=True)
class Layout:
    """A mesh, and how all parameters lie on it."""

    mesh: tuple[int, ...]
    placements: tuple[Any, ...]

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh)


LAYOUTS = {
    "fsdp-2": Layout((2,), (Shard(0),)),
    "fsdp-4": Layout((4,), (Shard(0),)),
    "hsdp-2x2": Layout((2, 2), (Replicate(), Shard(0))),
    "fsdp-tp-2x2": Layout((2, 2), (Shard(0), Shard(1))),
}


def local_shape(shape: Shape, layout: Layout, at: Sequence[int]) -> Shape:
    """Of the rank at ``at`` of the mesh: chunks as `torch.chunk` makes them."""
    local = list(shape)
    for size, place, placement in zip(layout.mesh, at, layout.placements, strict=True):
        if placement.is_shard():
            chunk = -(-local[placement.dim] // size)
            local[placement.dim] = max(0, min(chunk, local[placement.dim] - place * chunk))
    return tuple(local)


class Model:
    """This rank's part of a parameter list, as DTensors or as plain tensors of the same parts."""

    def __init__(self, shapes: Sequence[Shape], layout: Layout, mesh: Any) -> None:
        self.shapes, self.layout, self.mesh = shapes, layout, mesh
        at = mesh.get_coordinate()
        self.local_shapes = [local_shape(shape, layout, at) for shape in shapes]
        self.grads = ShardGradients(self.local_shapes)

    def plain(self) -> list[Tensor]:
        return make_params(self.local_shapes, torch.float32)

    def sharded(self) -> list[Tensor]:
        placements = self.layout.placements

        def whole(local: Tensor, shape: Shape) -> Tensor:
            stride = torch.empty(shape, device="meta").stride()
            made = DTensor.from_local(
                local.detach(), self.mesh, placements, run_check=False, shape=shape, stride=stride
            )
            return torch.nn.Parameter(made)

        return [whole(p, shape) for p, shape in zip(self.plain(), self.shapes, strict=True)]


class ShardGradients(Gradients):
    """As FSDP2 leaves them: new views into one buffer, refilled, and new DTensors around them."""

    def __init__(self, local_shapes: Sequence[Shape]) -> None:
        super().__init__(local_shapes, torch.float32, "views")
        self._buffer = torch.empty(sum(map(math.prod, local_shapes)))

    def backward(self, params: Sequence[Any]) -> None:
        numels = [source.numel() for source in self._sources]
        flat = self._buffer.split(numels)
        pairs = zip(flat, self._sources, strict=True)
        views = [view.view(source.shape) for view, source in pairs]
        torch._foreach_copy_(views, self._sources)
        for param, view in zip(params, views, strict=True):
            is_sharded = isinstance(param, DTensor)
            param.grad = DTensor(view, param._spec, requires_grad=False) if is_sharded else view


def local(tensor: Any) -> Tensor:
    part: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return part.detach()


def parts(tensors: Sequence[Any]) -> list[Tensor]:
    """The local ones of them that are not empty."""
    return [part for part in map(local, tensors) if part.numel() > 0]


class Parts:
    """This rank's parts of a pipeline, as `compare_steps` wants them."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.params, self._updated = parts(pipeline.params), parts(pipeline.updated())

    def updated(self) -> list[Tensor]:
        return self._updated


# ---- pipelines -----------------------------------------------------------------------------------


class OursWithoutNorm(Ours):
    """No clip, no scaler, no message."""

    def step(self) -> None:
        self.optimizer.step()


class TorchWithoutNorm(Pipeline):
    def step(self) -> None:
        self.optimizer.step()


def _ours(model: Model, *, plain: bool, norm: bool, scaler: bool, shares: bool) -> Pipeline:
    options: dict[str, Any] = {"max_grad_norm": MAX_GRAD_NORM} if norm else {}
    if shares:
        options["norm_group"] = dist.group.WORLD
    make = partial(fusedopt.FusedAdamW, **options, **ADAMW)
    kind = Ours if norm or scaler else OursWithoutNorm
    params = model.plain() if plain else model.sharded()
    return kind(params, model.grads, make, partial(fusedopt.GradScaler, enabled=scaler))


def _torch(model: Model, *, plain: bool, norm: bool, scaler: bool) -> Pipeline:
    make = partial(torch.optim.AdamW, fused=True, **ADAMW)
    kind = Pipeline if norm else TorchWithoutNorm
    params = model.plain() if plain else model.sharded()
    return kind(params, model.grads, make, partial(torch.amp.GradScaler, enabled=scaler))


_ALL = {"norm": True, "scaler": True}
_BF16 = {"norm": True, "scaler": False}  # bf16 compute, fp32 params and gradients: no scaler
_BARE = {"norm": False, "scaler": False}
# By name: over DTensors, or over plain tensors of the same local shapes.
PIPELINES: dict[str, Callable[[Model], Pipeline]] = {
    "fusedopt_adamw": partial(_ours, plain=False, shares=False, **_ALL),
    "fusedopt_adamw_no_scaler": partial(_ours, plain=False, shares=False, **_BF16),
    "fusedopt_adamw_no_norm": partial(_ours, plain=False, shares=False, **_BARE),
    "fusedopt_adamw_no_norm_plain": partial(_ours, plain=True, shares=False, **_BARE),
    "fusedopt_adamw_no_scaler_plain": partial(_ours, plain=True, shares=False, **_BF16),
    "fusedopt_adamw_no_scaler_plain_group": partial(_ours, plain=True, shares=True, **_BF16),
    "adamw_fused": partial(_torch, plain=False, **_ALL),
    "adamw_fused_no_scaler": partial(_torch, plain=False, **_BF16),
    "adamw_fused_no_norm": partial(_torch, plain=False, **_BARE),
    "adamw_fused_no_norm_plain": partial(_torch, plain=True, **_BARE),
    "adamw_fused_no_scaler_plain": partial(_torch, plain=True, **_BF16),
}


# ---- the clock -----------------------------------------------------------------------------------

SAMPLE_S = 0.15  # long enough that the grain of /proc/stat, 20 ms, shows a few percent of others
MAX_STEPS = 40


def gathered(value: Any) -> list[Any]:
    """What each rank gives, in order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class RanksClock:
    """All ranks start a step together, and it takes as long as the slowest of them."""

    units = {"step": "ms"}  # noqa: RUF012

    def sampler(self, pipeline: Steppable) -> Sampler:
        quickest = max(gathered(min(_step_ms(pipeline) for _ in range(2))))
        steps = max(1, min(MAX_STEPS, round(1e3 * SAMPLE_S / quickest)))

        def take() -> Sample:
            start, busy, waiting = time.perf_counter(), busy_seconds(), waiting_seconds()
            own = time.process_time()
            times = [_step_ms(pipeline) for _ in range(steps)]
            wall, busy = time.perf_counter() - start, busy_seconds() - busy
            own, waiting = time.process_time() - own, waiting_seconds() - waiting
            every = gathered((times, own, waiting))
            slowest = [max(of_ranks) for of_ranks in zip(*(each[0] for each in every), strict=True)]
            others = busy - sum(each[1] for each in every) - 2 / CLOCK_TICKS
            # A rank has gloo's threads besides its own. Without a CPU to spare, they wait for each
            # other.
            crowded = len(every) >= torch.multiprocessing.cpu_count()
            most = max(others, 0.0 if crowded else max(each[2] for each in every))
            disturbed = any(gathered(most / wall > MAX_FOREIGN_SHARE))
            return Sample((statistics.median(slowest),), disturbed)

        return take


def _step_ms(pipeline: Steppable) -> float:
    pipeline.prepare()
    dist.barrier()
    start = time.perf_counter()
    pipeline.step()
    return 1e3 * (time.perf_counter() - start)
