"""A small model under the engines of torch, beside the same training in one process.

Every rank has the same batch, and there are 2 or 4 ranks. So the mean of the ranks' gradients has
the bits of one process, and so has every step that does not clip.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from tolerances import NORM_EPS_FLOAT32, assert_norm, assert_same_bits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import fusedopt

STEPS = 3
MEASURE = {"max_grad_norm": float("inf")}
CLIP = {"max_grad_norm": 0.05}  # below the norm of each step


class Model(nn.Module):
    """Rows that 2 and 4 ranks cannot share evenly; on some ranks there is nothing of `gain`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 5)
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.norm(self.up(x)).sin()) * self.gain
        return y


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(7)
    return Model().to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 6, generator=generator).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    """The gradients of the step are added to those that are there."""
    dtype = next(model.parameters()).dtype
    loss = model(batch(step, dtype)).float().square().mean()
    loss.backward()


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def messages(expected: int | None) -> Iterator[None]:
    """The block sends so many, of whatever kind; None: any number."""
    with CommDebugMode() as comm:
        yield
    counts = dict(comm.get_comm_counts())
    assert expected is None or comm.get_total_counts() == expected, counts


@contextmanager
def all_reduces(expected: int) -> Iterator[None]:
    """The block sends so many; other messages do not count."""
    with CommDebugMode() as comm:
        yield
    counts = dict(comm.get_comm_counts())
    assert sum(n for kind, n in counts.items() if "reduce" in str(kind)) == expected, counts


def same_everywhere(found: Any) -> None:
    """All ranks call this with the same value."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    assert all(each == found for each in everywhere), everywhere


def norm_of(params: Any) -> float:
    """Of whole gradients, in float64."""
    grads = [p.grad.detach().double().flatten() for p in params if p.grad is not None]
    return float(torch.cat(grads).norm())


class Beside:
    """One optimizer on a model under an engine, and one on the whole model.

    A subclass may say in `group` what else the sharded parameters' group has.

    Args:
        wrap: puts a model under the engine, maybe in place, and returns what is trained.
        options: of both optimizers.
        own: those of the sharded model's alone.
        single: the whole model.
        run: the backward pass of the sharded model.
        alone: that of the whole model. None: it gets the engine's gradients, for engines whose
            forward pass rounds in another way than that of the whole model.
    """

    group: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        wrap: Callable[[Any], nn.Module],
        options: dict[str, Any],
        single: nn.Module | None = None,
        run: Callable[[nn.Module, int], None] = backward,
        alone: Callable[[nn.Module, int], None] | None = backward,
        own: Callable[[Any], dict[str, Any]] = lambda model: {},
    ) -> None:
        self.single = make_model() if single is None else single
        self.model = wrap(copy.deepcopy(self.single))
        arguments: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, **options}
        groups = [{"params": list(self.model.parameters()), **self.group}]
        self.opt = fusedopt.FusedAdamW(groups, **arguments, **own(self.model))
        self.one = fusedopt.FusedAdamW(self.single.parameters(), **arguments)
        self.bits = options.get("max_grad_norm") != CLIP["max_grad_norm"]
        self.run, self.alone = run, alone

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        named = zip(self.model.named_parameters(), self.single.parameters(), strict=True)
        return ((name, param, twin) for (name, param), twin in named)

    def backward(self, step: int) -> None:
        self.run(self.model, step)
        if self.alone is not None:
            self.alone(self.single, step)
            return
        for _, param, twin in self.pairs():
            twin.grad = whole(param.grad)

    def step(self, messages_of_step: int) -> None:
        with messages(messages_of_step):
            self.opt.step()
        self.one.step()
        if self.opt.grad_norm is not None:
            assert_norm(self.opt.grad_norm, norm_of(self.single.parameters()))
        self.opt.zero_grad()
        self.one.zero_grad()

    def compare(self) -> None:
        for name, param, twin in self.pairs():
            self._equal(whole(param), twin, name)
            own, expected = self.opt.state[param], self.one.state[twin]
            assert own.keys() == expected.keys()
            for key, value in own.items():
                if isinstance(param, DTensor) and key != "step":
                    assert value.device_mesh == param.device_mesh
                    assert value.placements == param.placements
                    assert value._local_tensor.device == param._local_tensor.device
                self._equal(whole(value), expected[key], f"{key} of {name}")

    def _equal(self, value: Tensor, expected: Tensor, label: str) -> None:
        if self.bits:
            assert_same_bits(value, expected, label)
            return
        # Each step's coefficient is as right as its norm, and the next gradients depend on it.
        largest = float(expected.detach().abs().max())
        difference = float((value.detach() - expected.detach()).abs().max())
        assert difference <= STEPS * NORM_EPS_FLOAT32 * max(largest, 1e-30), label

    def train(self, messages_of_step: int = 1) -> list[float]:
        """The norms that this rank has found, if any."""
        norms = []
        for step in range(STEPS):
            self.backward(step)
            self.step(messages_of_step)
            if self.opt.grad_norm is not None:
                norms.append(float(self.opt.grad_norm))
        self.compare()
        return norms
