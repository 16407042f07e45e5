"""The harness itself: results in order, and a rank that fails or hangs is named."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist


def summed(rank: int, base: int) -> tuple[int, int]:
    number = torch.tensor(base + rank)
    dist.all_reduce(number)
    return rank, int(number)


def test_results_are_in_order() -> None:
    for world in (1, 2, 4, 2):
        total = sum(10 + r for r in range(world))
        assert ranks.run(world, summed, 10) == [(r, total) for r in range(world)]


def one_fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("the reason")


def test_a_rank_that_fails_is_named() -> None:
    with pytest.raises(AssertionError, match=r"(?s)ranks \[1\].*the reason"):
        ranks.run(2, one_fails)


def one_hangs(rank: int) -> None:
    import time

    time.sleep(30 * rank)


def test_a_rank_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.run(2, summed, 1)  # the processes have started
    monkeypatch.setattr(ranks, "SECONDS", 1.0)
    with pytest.raises(AssertionError, match=r"(?s)ranks \[1\].*no answer.*one_hangs"):
        ranks.run(2, one_hangs)
