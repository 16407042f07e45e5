"""Gradients that are partial sums, as tensor parallelism leaves them; torch's step adds them up."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from sharded import Twins, Whole, alike_everywhere, assert_rational, collectives, contents, part
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def partial(grad: Tensor, mesh: Any, rank: int, n: int) -> DTensor:
    """``grad`` as a sum over the ranks of the last dimension, in numbers that add up exactly."""
    mine = grad / n * (1 if rank % 2 else 3) / 2 if n == 2 else grad / n
    placements = [Replicate()] * (mesh.ndim - 1) + [Partial()]
    return DTensor.from_local(mine, mesh, placements, run_check=False)


def partial_sums(rank: int) -> None:
    """Tensor parallelism leaves them to norms; torch's own step adds them up silently."""
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")) if world == 4 else None
    for mesh in filter(None, (line, square)):
        copies = [Replicate()] * mesh.ndim
        wholes = [
            Whole((8, 2), [*copies[1:], Shard(0)]),
            Whole((6,), copies),
            Whole((2, 3), copies),
        ]
        for backend in ("auto", "reference"):
            twins = Twins(mesh, wholes, backend=backend)
            for step in range(2):
                twins.give(step)
                n = mesh.size(mesh.ndim - 1)
                for p, q in zip(twins.params[1:], twins.whole[1:], strict=True):
                    q.grad = (q.grad * 64).round() / 64
                    p.grad = partial(q.grad, mesh, rank, n)
                grads = [p.grad for p in twins.params]
                bits_before = [part(grad).clone() for grad in grads]
                with collectives() as called:
                    twins.optimizer.step()
                assert called == ["all_reduce", "allreduce_"], called
                for p, grad, before in zip(twins.params, grads, bits_before, strict=True):
                    assert p.grad is grad and torch.equal(part(grad), before)
                assert all(p.grad.placements[-1].is_partial() for p in twins.params[1:])
                twins.single.step()
                twins.check()
                alike_everywhere(twins.optimizer.grad_norm)
                assert_rational(twins.optimizer.grad_norm, [q.grad for q in twins.whole])
            twins.optimizer.max_grad_norm = None
            with collectives() as called:
                twins.optimizer.step()
            assert called == ["all_reduce"], called


@pytest.mark.parametrize("world", [2, 4])
def test_partial_sums(world: int) -> None:
    ranks.run(world, partial_sums)


def a_rank_fails(rank: int) -> None:
    """It takes part in the sums for which the others wait, and then says so."""
    mesh = init_device_mesh("cpu", (2,))
    for backend in ("auto", "reference"):
        twins = Twins(
            mesh, [Whole((8, 2), [Shard(0)]), Whole((6,), [Replicate()])], backend=backend
        )
        p, q = twins.params[1], twins.whole[1]
        groups = twins.optimizer.param_groups
        for step in range(3):  # before there is a plan, and after
            twins.give(step)
            q.grad = (q.grad * 64).round() / 64
            p.grad = partial(q.grad, mesh, rank, 2)
            before = contents(twins.optimizer)
            if rank == 0:
                groups[0]["eps"] = "small"
            words = "another rank refused" if rank else "Invalid eps value"
            with collectives() as called, pytest.raises(RuntimeError, match=words):
                twins.optimizer.step()
            assert called == ["all_reduce", "allreduce_"], called
            groups[0]["eps"] = 1e-8
            assert step == 0 or contents(twins.optimizer) == before
            twins.optimizer.step()
            twins.single.step()
            twins.check()


def test_a_rank_that_fails() -> None:
    ranks.run(2, a_rank_fails)
