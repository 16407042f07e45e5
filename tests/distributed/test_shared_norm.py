"""One norm for all ranks: each element counts once, and every rank gets the same bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from sharded import INF, Twins, Whole, alike_everywhere, assert_rational, collectives, part
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import fusedopt

ROWS, COPIES = [Shard(0)], [Replicate()]


def check_norm(twins: Twins, step: int = 0, same_as_single: bool = False) -> None:
    twins.give(step)
    twins.optimizer.step()
    norm, coef = twins.optimizer.grad_norm, twins.optimizer.clip_coef
    alike_everywhere(norm, coef, twins.optimizer.found_inf)
    assert_rational(norm, [q.grad for q in twins.whole if q.grad is not None])
    if same_as_single:
        twins.single.step()
        assert torch.equal(norm, twins.single.grad_norm)
        assert torch.equal(coef, twins.single.clip_coef)


def norms_in_one_dimension(rank: int) -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    if world != 3:  # the shards are whole chunks
        check_norm(Twins(mesh, [Whole((64, 1024), ROWS)], max_grad_norm=1.0), same_as_single=True)
    unaligned = [Whole((5, 3), ROWS), Whole((1001, 33), ROWS), Whole((1,), ROWS)]
    unaligned += [Whole((7, 5), COPIES), Whole((9, 9), [Shard(1)], torch.bfloat16)]
    torch.set_num_threads(1 + rank % 3)
    try:
        for backend in ("auto", "reference", "mixed"):
            chosen = {"mixed": ("auto", "reference")[rank % 2]}.get(backend, backend)
            twins = Twins(mesh, unaligned, max_grad_norm=1.0, backend=chosen)
            for step in range(2):
                check_norm(twins, step)
            check_norm(Twins(mesh, [Whole((1,), ROWS)], backend=chosen))  # one rank has it all
            assert twins.optimizer.clip_coef < 1.0
            twins.optimizer.norm_type = INF
            twins.give(2)
            twins.optimizer.step()
            largest = max(float(q.grad.abs().max()) for q in twins.whole)
            assert twins.optimizer.grad_norm.item() == largest
            alike_everywhere(twins.optimizer.grad_norm, twins.optimizer.clip_coef)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_one_dimension(world: int) -> None:
    """Whole chunks: the bits of one process. Else the rational norm. Any threads and backends."""
    ranks.run(world, norms_in_one_dimension)


HSDP = [Whole((5, 3), [Replicate(), Shard(0)]), Whole((2, 2), [Replicate(), Replicate()])]
FSDP_AND_TP = [
    Whole((9, 3), [_StridedShard(0, split_factor=2), Shard(0)]),
    Whole((5, 6), [Shard(0), Shard(1)]),
    Whole((3,), [Shard(0), Replicate()]),
    Whole((3, 2), [Replicate(), Replicate()]),
]


def norms_in_two_dimensions(rank: int) -> None:
    for names, wholes in ((("replicate", "shard"), HSDP), (("dp", "tp"), FSDP_AND_TP)):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        for backend in ("auto", "reference"):
            twins = Twins(mesh, wholes, max_grad_norm=0.5, backend=backend)
            check_norm(twins)
            check_norm(twins, 1)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    # 16384 elements a rank: whole chunks, so the bits are those of one process.
    check_norm(Twins(mesh, [Whole((32, 1024), [Replicate(), Shard(0)])]), same_as_single=True)


def test_two_dimensions() -> None:
    """HSDP has the norm of one process, and not the root of two times it."""
    ranks.run(4, norms_in_two_dimensions)


# ---- messages ------------------------------------------------------------------------------------


def called_in(twins: Twins, step: int = 0) -> list[str]:
    twins.give(step)
    with collectives() as called:
        twins.optimizer.step()
    return list(called)


def messages_of_a_step(rank: int) -> None:
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mixed = [Whole((5, 3), COPIES), Whole((9,), ROWS), Whole((3,), ROWS)]
    for mesh, wholes in ((line, mixed), (square, FSDP_AND_TP)):
        for backend in ("auto", "reference"):
            twins = Twins(mesh, wholes, backend=backend)
            for step in range(2):
                assert called_in(twins, step) == ["allreduce_"], "whatever the dimensions"
            twins.optimizer.max_grad_norm = None
            assert called_in(twins) == [] and twins.optimizer.grad_norm is None
            twins.optimizer.skip_nonfinite = True
            assert called_in(twins) == ["allreduce_"]
            twins.optimizer.skip_nonfinite = False
            scaler = fusedopt.GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.ones(()))
            twins.give(5)
            with collectives() as called:
                scaler.step(twins.optimizer)
                scaler.update()
            assert called == ["allreduce_"], called
            twins.optimizer.max_grad_value = 0.1  # each element by itself
            assert called_in(twins) == []
            twins.optimizer.init_state()
            twins.optimizer.state_dict()
    # All gradients are there already, as under DDP: nothing to agree about.
    plain = Twins(line, [Whole((5, 3)), Whole((4,))], skip_nonfinite=True)
    assert called_in(plain) == []
    plain.single.step()
    assert torch.equal(*plain.norms())


def test_messages() -> None:
    """One a step, and none where nobody asked for a norm or a check."""
    ranks.run(4, messages_of_a_step)


# ---- inf and NaN ---------------------------------------------------------------------------------

BAD = (INF, -INF, math.nan)


def poison(param: Any, value: float) -> None:
    part(param.grad).view(-1)[-1] = value


def one_bad_element(rank: int) -> None:
    """On one rank, in one copy: other ranks cannot know of it by themselves."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    wholes = [Whole((9, 3), [Shard(0), Replicate()]), Whole((3, 2), [Replicate(), Replicate()])]
    for backends in ("auto",), ("reference",), ("auto", "reference"):
        for norm_type in (2.0, INF):
            options = {"norm_type": norm_type, "backend": backends[rank % len(backends)]}
            twins = Twins(square, wholes, skip_nonfinite=True, **options)
            skips_everywhere(rank, twins)
            if len(backends) == 1:  # two backends agree about norms, and not about all bits
                twins.check()


def skips_everywhere(rank: int, twins: Twins) -> None:
    twins.step(0)
    before = [p.detach().clone() for p in twins.params]
    for at, (which, value) in enumerate((w, v) for w in range(2) for v in BAD):
        twins.give(1)
        if rank == 3:  # rank 2 counts what it has of the first parameter; rank 0 the second
            poison(twins.params[which], value)
        twins.optimizer.step()
        assert twins.optimizer.found_inf == 1 and twins.optimizer.skipped_steps == at + 1
        assert twins.optimizer.grad_norm.isnan().item() is math.isnan(value)
        assert not twins.optimizer.grad_norm.isfinite()
        assert all(map(torch.equal, map(part, before), map(part, twins.params)))
    twins.step(1)
    assert twins.optimizer.found_inf == 0


def test_a_bad_element_that_is_not_counted() -> None:
    ranks.run(4, one_bad_element)


def states_of(twins: Twins) -> list[Tensor]:
    own = [twins.optimizer.state[p] for p in twins.params]
    return [part(value).clone() for each in own for value in each.values()]


def the_scaler_skips_everywhere(rank: int) -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    wholes: Sequence[Whole] = [Whole((5, 3), ROWS), Whole((1,), ROWS), Whole((4,), COPIES)]
    for backend in ("auto", "reference"):
        twins = Twins(mesh, wholes, max_grad_norm=1.0, backend=backend)
        scaler = fusedopt.GradScaler("cpu", init_scale=4.0, growth_interval=100)
        scaler.scale(torch.ones(()))
        twins.give(0)
        scaler.step(twins.optimizer)
        scaler.update()
        before = [part(p).clone() for p in twins.params] + states_of(twins)
        twins.give(1)
        if rank == world - 1:
            poison(twins.params[2], INF)
        scaler.step(twins.optimizer)
        assert twins.optimizer.found_inf == 1
        scaler.update()
        assert scaler.get_scale() == 2.0 and twins.optimizer.skipped_steps == 1
        after = [part(p) for p in twins.params] + states_of(twins)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        # A flag that somebody has set on one rank counts everywhere, too; torch's scalers do so.
        twins.give(1)
        twins.optimizer.found_inf = torch.tensor(float(rank == 0))
        twins.optimizer.grad_scale = torch.tensor(2.0)
        twins.optimizer.step()
        assert twins.optimizer.found_inf == 1 and twins.optimizer.skipped_steps == 2
        # And so does a loss scale that is of no use.
        twins.optimizer.found_inf = torch.tensor(0.0)
        twins.optimizer.grad_scale = torch.tensor(0.0 if rank == world - 1 else 2.0)
        twins.optimizer.step()
        assert twins.optimizer.found_inf == 1 and twins.optimizer.skipped_steps == 3
        del twins.optimizer.found_inf, twins.optimizer.grad_scale
        after = [part(p) for p in twins.params] + states_of(twins)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_a_scaler_skips_everywhere(world: int) -> None:
    ranks.run(world, the_scaler_skips_everywhere)
