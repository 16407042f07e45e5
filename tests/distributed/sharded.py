"""Parameters that are spread over ranks, and the same training in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import randn
from tolerances import assert_same_bits, bits
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt

INF = float("inf")
ULPS = 2.0  # of fp32, that a norm may be away from the rational one
CLIPPED: dict[str, Any] = {"lr": 0.1, "max_grad_norm": INF}


class Whole(NamedTuple):
    """A parameter as one process would have it, and how it is spread."""

    shape: tuple[int, ...]
    placements: Sequence[Any] | None = None  # None: a plain tensor
    dtype: torch.dtype = torch.float32


def spread(value: Tensor, mesh: Any, placements: Sequence[Any] | None) -> Tensor:
    """A copy of ``value``. All ranks have the same, so nothing is sent."""
    if placements is None:
        return value.clone()
    if any(isinstance(each, _StridedShard) for each in placements):
        return strided(value, mesh)
    return distribute_tensor(value.clone(), mesh, placements, src_data_rank=None)


def strided(value: Tensor, mesh: Any) -> Tensor:
    """FSDP over tensor parallelism of the same dimension: the inner dimension cuts first."""
    dp, tp = mesh["dp"], mesh["tp"]
    mine = distribute_tensor(value.clone(), tp, [Shard(0)], src_data_rank=None)._local_tensor
    mine = distribute_tensor(mine, dp, [Shard(0)], src_data_rank=None)._local_tensor
    placements = [_StridedShard(0, split_factor=tp.size()), Shard(0)]
    return DTensor.from_local(
        mine, mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def all_of(tensor: Tensor) -> Tensor:
    """The whole tensor. All ranks have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def part(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _as_fsdp_leaves_it(grad: Tensor, param: Any) -> Tensor:
    """Of the parameter's own spec, and a view of a buffer."""
    if not isinstance(grad, DTensor):
        return grad
    local = grad._local_tensor
    buffer = torch.empty(3 + local.numel(), dtype=local.dtype)
    view = buffer[3:].view(local.shape).copy_(local)
    return DTensor(view, param._spec, requires_grad=False)


class Twins:
    """An optimizer over ranks, and its twin over the whole tensors in this process alone."""

    def __init__(
        self,
        mesh: Any,
        wholes: Sequence[Whole],
        cls: Any = fusedopt.FusedAdamW,
        groups: Callable[[list[Any]], Any] | None = None,
        norm_group: Any = None,
        **options: Any,
    ) -> None:
        self.mesh, self.wholes = mesh, wholes
        values = [randn(whole.shape, 1 + i, whole.dtype) for i, whole in enumerate(wholes)]
        self.whole = [torch.nn.Parameter(value.clone()) for value in values]
        self.params = [
            torch.nn.Parameter(spread(value, mesh, whole.placements))
            for value, whole in zip(values, wholes, strict=True)
        ]
        arguments = {**CLIPPED, **options}
        made = groups or (lambda params: params)
        self.single = cls(self.whole, **arguments)
        self.optimizer = cls(made(self.params), norm_group=norm_group, **arguments)

    def give(self, step: int, without: Sequence[int] = (), scale: float = 1.0) -> None:
        """A gradient to each parameter but those of ``without``."""
        for i, (p, q, whole) in enumerate(zip(self.params, self.whole, self.wholes, strict=True)):
            p.grad = q.grad = None
            if i not in without:
                q.grad = randn(whole.shape, 1000 * step + i, whole.dtype, scale)
                grad = spread(q.grad, self.mesh, whole.placements)
                p.grad = _as_fsdp_leaves_it(grad, p) if i % 2 == 0 else grad

    def step(self, step: int, **how: Any) -> None:
        self.give(step, **how)
        self.optimizer.step()
        self.single.step()

    def check(self) -> None:
        """Bits of parameters, states and step counts."""
        for i, (p, q) in enumerate(zip(self.params, self.whole, strict=True)):
            assert_same_bits(all_of(p), q, f"param {i}")
            own, single = self.optimizer.state[p], self.single.state[q]
            assert own.keys() == single.keys()
            for name, value in own.items():
                assert_same_bits(all_of(value), single[name], f"{name} of param {i}")

    def norms(self) -> tuple[Tensor, Tensor]:
        return self.optimizer.grad_norm, self.single.grad_norm


def contents(optimizer: Any) -> list[Any]:
    """Bits of all that a step may move, on this rank; versions of the parameters, too."""
    found: list[Any] = [optimizer.skipped_steps.item()]
    for group in optimizer.param_groups:
        for p in group["params"]:
            found += [p._version, part(p)._version, bits(part(p)).tolist()]
            for name, value in optimizer.state.get(p, {}).items():
                found += [name, id(value), bits(part(value)).tolist()]
    return found


def alike_everywhere(*tensors: Tensor) -> None:
    """The same bits on all ranks."""
    mine = [bits(tensor).tolist() for tensor in tensors]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    assert all(each == mine for each in found), found


def rational_norm(grads: Iterable[Tensor]) -> float:
    """The root of the exact sum of squares."""
    values = (Fraction(x) for grad in grads for x in grad.double().reshape(-1).tolist())
    total = sum((x * x for x in values), Fraction(0))
    scale = 1 << 200
    return math.isqrt(total.numerator * scale * scale // total.denominator) / scale


def assert_rational(norm: Tensor, grads: Iterable[Tensor]) -> None:
    exact = rational_norm(grads)
    ulp = float(np.spacing(np.float32(exact)))
    assert abs(float(norm) - exact) <= ULPS * ulp, (float(norm), exact)


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        space, name = function.namespace, function._opname
        if "c10d" in space and "wait" not in name and not name.startswith("_wrap"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Names of the collectives that start, of ``torch.distributed`` and of DTensors."""
    with _Collectives() as mode:
        yield mode.names


def remedies(error: BaseException) -> list[str]:
    """The lines of code in an error's message."""
    return str(error).split("`")[1::2]


def trained(value: Tensor, mesh: Any = None, placements: Sequence[Any] | None = None) -> Any:
    """A parameter whose gradient is ``value``."""
    param = torch.nn.Parameter(spread(torch.zeros_like(value), mesh, placements))
    param.grad = spread(value, mesh, placements)
    return param


def norm_of(groups: Any, **options: Any) -> Tensor:
    """The norm that a step finds; one message."""
    optimizer = fusedopt.FusedAdamW(groups, max_grad_norm=INF, **options)
    with collectives() as called:
        optimizer.step()
    assert called == ["allreduce_"], called
    assert optimizer.grad_norm is not None
    return optimizer.grad_norm


def refused(groups: Any, *words: str, **options: Any) -> tuple[Any, RuntimeError]:
    """Nothing moves, and nothing is sent but a vote against the step, for ranks that may wait."""
    optimizer = fusedopt.FusedAdamW(groups, max_grad_norm=INF, **options)
    before = contents(optimizer)
    with collectives() as called, pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert called in ([], ["allreduce_"]) and contents(optimizer) == before
    for each in words:
        assert each in str(caught.value), (each, str(caught.value))
    return optimizer, caught.value


def helped(optimizer: Any, error: RuntimeError, lines: slice = slice(None), **names: Any) -> Tensor:
    """The norm of the step after the line in the message."""
    for line in remedies(error)[lines]:
        exec(line, {"torch": torch, "optimizer": optimizer, **names})
    optimizer.step()
    norm: Tensor = optimizer.grad_norm
    alike_everywhere(norm)
    return norm


def group_in(error: RuntimeError, line: int = 0, **names: Any) -> Any:
    """The argument that a line in the message names."""
    found: dict[str, Any] = {"torch": torch, **names}
    exec(remedies(error)[line], found)
    return found["norm_group"]
