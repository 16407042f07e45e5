"""Ranks in one process: optimizers that step in threads of their own and add up their words.

The first rank is on the device, the second on the CPU. Their twins are both on the CPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import CHUNK
from gpu_helpers import backend, by_speed, device, moved
from gpu_twins import SCALARS, assert_pairs_agree, everything
from harness import FUSED, make_param, randn, set_grad
from torch import Tensor

from fusedopt import (
    agreement as agreement_module,
    optimizer as optimizer_module,
    shared as shared_module,
)
from fusedopt.plan.exchange import Ranks, ranks_of

SECONDS = 60.0  # that a rank waits for the other
Grads = Sequence[Tensor | None]


class Meeting:
    """Where ranks add up their words.

    Attributes:
        messages: the words of each rank, of all messages so far.
    """

    def __init__(self, size: int) -> None:
        self.size, self.messages = size, list[list[list[int]]]()
        self._words: list[list[int]] = [[] for _ in range(size)]
        self._barrier = threading.Barrier(size, timeout=SECONDS)

    def total(self, number: int, words: list[int], largest: bool) -> list[int]:
        self._words[number] = words
        if self._barrier.wait() == 0:
            self.messages.append(list(self._words))
        columns = zip(*self._words, strict=True)
        total = [max(column) if largest else sum(column) for column in columns]
        self._barrier.wait()  # all have read
        return total


class Met(Ranks):
    """One of the ranks of a meeting."""

    def __init__(self, meeting: Meeting, number: int, uncounted: Sequence[int] = ()) -> None:
        self.meeting, self.number, self.size = meeting, number, meeting.size
        self.uncounted, self.is_mixed = frozenset(uncounted), False
        self.compares_groups, self.joined, self.device_type = True, False, None
        self._known, self.replicated, self.n_held_by_all = (None, 0), [], 0

    def add_up(self, words: Tensor, norm_type: float) -> None:
        self.joined = True
        words.copy_(
            torch.tensor(self.meeting.total(self.number, words.tolist(), norm_type == float("inf")))
        )


def share(monkeypatch: pytest.MonkeyPatch, ranks: Callable[[Any], Any]) -> None:
    """``ranks(first parameter)`` are the ranks of an optimizer; None: those that it has anyway."""

    def found(groups: Any, *others: Any) -> Any:
        own = ranks(groups[0]["params"][0])
        return ranks_of(groups, *others) if own is None else own

    for module in (agreement_module, optimizer_module, shared_module):
        monkeypatch.setattr(module, "ranks_of", found)


class Pair:
    """Two optimizers that share a norm.

    Attributes:
        errors: what the last step of each has raised.
    """

    def __init__(
        self,
        values: Sequence[Sequence[Tensor]],
        backends: Sequence[str],
        devices: Sequence[Sequence[torch.device]],
        options: dict[str, Any],
        uncounted: Sequence[Sequence[int]] = ((), ()),
        rule: str = "adamw",
    ) -> None:
        self.meeting = Meeting(len(values))
        self.params = [
            [make_param(moved(value, where)) for value, where in zip(own, places, strict=True)]
            for own, places in zip(values, devices, strict=True)
        ]
        self.ranks = [Met(self.meeting, k, own) for k, own in enumerate(uncounted)]
        self.opts = [
            FUSED[rule](own, lr=0.1, backend=name, **options)
            for own, name in zip(self.params, backends, strict=True)
        ]
        self.errors: list[Exception | None] = [None] * len(values)

    def ranks_at(self, param: Tensor) -> Met | None:
        owners = [own for own in range(len(self.params)) if self.params[own][0] is param]
        return self.ranks[owners[0]] if owners else None

    def give(self, grads: Sequence[Grads]) -> None:
        for params, own in zip(self.params, grads, strict=True):
            for param, grad in zip(params, own, strict=True):
                set_grad(param, None if grad is None else moved(grad, param.device))

    def set(self, name: str, values: Sequence[float | None]) -> None:
        """What a GradScaler leaves on the optimizers, or with None takes away."""
        for optimizer, params, value in zip(self.opts, self.params, values, strict=True):
            with contextlib.suppress(AttributeError):
                delattr(optimizer, name)
            if value is not None:
                setattr(optimizer, name, torch.tensor(value, device=params[0].device))

    def step(self) -> list[Exception | None]:
        def one(rank: int) -> Exception | None:
            try:
                self.opts[rank].step()
            except RuntimeError as error:
                return error
            return None

        with ThreadPoolExecutor(len(self.opts)) as pool:
            self.errors = list(pool.map(one, range(len(self.opts))))
        return self.errors

    def bits(self) -> list[Tensor]:
        """Copies of everything that a step may change."""
        tensors = []
        for optimizer, params in zip(self.opts, self.params, strict=True):
            states = [t for p in params for t in optimizer.state.get(p, {}).values()]
            tensors += [t.detach().cpu().clone() for t in (*params, *states)]
            tensors.append(optimizer.skipped_steps.cpu())
        return tensors


def lengths() -> list[list[int]]:
    """Of the tensors of each rank."""
    large = by_speed(3 * CHUNK + 1, 2 * CHUNK + 1, 300)
    return [[17, large, 0, 300], [9, by_speed(CHUNK + 5, CHUNK + 5, 40)]]


def values_of_ranks() -> list[list[Tensor]]:
    dtypes = (torch.float32, torch.float16)
    return [
        [randn(n, 10 * rank + k, dtypes[k % 2]) for k, n in enumerate(own)]
        for rank, own in enumerate(lengths())
    ]


def grads_of_ranks(step: int) -> list[list[Tensor]]:
    return [
        [randn(v.numel(), 100 * step + 10 * rank + k, v.dtype, 0.1) for k, v in enumerate(own)]
        for rank, own in enumerate(values_of_ranks())
    ]


class Pairs:
    """One pair whose first rank is on the device, and its twin on the CPU."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        devices: Sequence[torch.device] | None = None,
        uncounted: Sequence[Sequence[int]] = ((), ()),
        **options: Any,
    ) -> None:
        values = values_of_ranks()
        on_cpu = [[torch.device("cpu")] * len(own) for own in values]
        places = [list(devices or [device()] * len(values[0])), on_cpu[1]]
        options = {"skip_nonfinite": True, "weight_decay": 0.1, **options}
        self.ours = Pair(values, (backend(), "cpu"), places, options, uncounted)
        self.twin = Pair(values, ("cpu", "cpu"), on_cpu, options, uncounted)
        self.both = (self.ours, self.twin)
        share(monkeypatch, lambda p: self.ours.ranks_at(p) or self.twin.ranks_at(p))

    def step(self, grads: Sequence[Grads] | None = None) -> None:
        for pair in self.both:
            if grads is not None:
                pair.give(grads)
            pair.step()

    def run(self, grads: Sequence[Grads]) -> None:
        self.step(grads)
        assert self.ours.errors == self.twin.errors == [None, None]
        self.check()

    def alone(self, grads: Sequence[Grads]) -> None:
        """A step of optimizers that share no norm."""
        shared = [opt._shared for pair in self.both for opt in pair.opts]
        ranks = [each.ranks for each in shared]
        for each in shared:
            each.ranks = None
        self.step(grads)
        for each, own in zip(shared, ranks, strict=True):
            each.ranks = own

    def set(self, name: str, values: Sequence[float | None]) -> None:
        for pair in self.both:
            pair.set(name, values)

    def check(self) -> None:
        """The messages, rank by rank and word by word; and all that the steps have changed."""
        assert self.ours.meeting.messages == self.twin.meeting.messages
        ours, twin = self.ours, self.twin
        for rank in range(2):
            assert_pairs_agree(
                everything(ours.opts[rank], ours.params[rank], twin.opts[rank], twin.params[rank])
            )
        for name in SCALARS:
            found = [getattr(each, name) for each in ours.opts]
            if found == [None, None]:
                continue
            found = [value.cpu() for value in found]
            torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
