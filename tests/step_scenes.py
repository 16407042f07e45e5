"""Small optimizers with a row of every kind, on every backend that the CPU can run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda_shim
import pytest
import torch
from conftest import require_cpu_backend
from protocol_helpers import OPTIMIZERS
from torch import Tensor

BACKENDS = ["cpu", "reference", "cuda"]


@pytest.fixture(params=BACKENDS)
def served_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name for `backend=`; CUDA's kernels run in the shim."""
    if request.param == "cpu":
        require_cpu_backend()
    if request.param == "cuda":
        for _ in cuda_shim.fixture():
            yield "cuda"
        return
    yield request.param


class Scene:
    """An optimizer after two steps, with gradients for the next."""

    def __init__(self, kind: str, backend: str, **options: Any) -> None:
        gen = torch.Generator().manual_seed(7)
        cls, kwargs = OPTIMIZERS[kind]
        gaps = torch.randn(4, 6, generator=gen)[:, ::2]
        more_gaps = torch.randn(3, 4, generator=gen).to(torch.bfloat16)[:, ::2]
        self.params = [
            torch.nn.Parameter(t)
            for t in (
                torch.randn(5, 3, generator=gen),
                gaps,
                torch.randn(9, generator=gen).half(),
                more_gaps,
                torch.randn(4, generator=gen),  # without a gradient
                torch.randn(2, generator=gen),
            )
        ]
        groups = [{"params": self.params[:3]}, {"params": self.params[3:], "lr": 0.05}]
        self.opt: Any = cls(groups, **{**kwargs, **options}, backend=backend)
        for step in range(2):
            self.give(step)
            self.opt.step()
        self.give(2)

    def give(self, step: int) -> None:
        gen = torch.Generator().manual_seed(100 + step)
        for param in self.params:
            grad = torch.randn(param.shape, generator=gen).to(param.dtype)
            param.grad = grad if param is not self.params[4] else None
        last = self.params[-1]
        last.grad = last.grad.repeat(2, 1).t()[:, 0]  # of another layout

    def values(self) -> dict[str, Tensor]:
        """All that a step moves, copied."""
        found = {f"param {i}": p.detach().clone() for i, p in enumerate(self.params)}
        for i, p in enumerate(self.params):
            own = self.opt.state.get(p, {})
            found |= {f"{name} of {i}": value.clone() for name, value in own.items()}
        found["skipped_steps"] = self.opt.skipped_steps
        return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    keys = one.keys() | other.keys()
    return sorted(
        k for k in keys if k not in one or k not in other or not torch.equal(one[k], other[k])
    )
