"""Which ranks share a norm, and which of them counts what; what is ambiguous is refused."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from fake_ranks import fake_ranks
from harness import randn
from sharded import (
    INF,
    alike_everywhere,
    assert_rational,
    collectives,
    group_in,
    helped,
    norm_of,
    refused,
    remedies,
    trained,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from fusedopt import FusedAdamW, GradScaler

ROWS, COPIES = [Shard(0)], [Replicate()]


# ---- stages of a pipeline ------------------------------------------------------------------------


def stages(rank: int) -> None:
    """Each stage has its own parameters, on a part of the mesh that knows of no other stage."""
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = rank // 2
    grads = [randn((5, 3), 1), randn((4,), 2)], [randn((7,), 3)]
    all_grads = [*grads[0], *grads[1]]

    def params() -> list[Any]:
        return [trained(grad, root["dp"], ROWS) for grad in grads[stage]]

    optimizer, error = refused(params(), "'pp'", "norm_group")
    optimizer.norm_group = group_in(error)
    optimizer.step()
    alike_everywhere(optimizer.grad_norm)
    assert_rational(optimizer.grad_norm, all_grads)
    for given in (dist.group.WORLD, root, root["pp", "dp"]):
        norm = norm_of(params(), norm_group=given)
        alike_everywhere(norm)
        assert_rational(norm, all_grads)
    # Options of groups may differ from stage to stage. Those of the whole optimizer may not.
    norm_of([{"params": params(), "lr": 0.1 + stage}], norm_group=root)
    other = FusedAdamW(params(), norm_group=root, max_grad_norm=1.0 + stage)
    with pytest.raises(RuntimeError, match="the ranks' options differ"):
        other.step()
    # A norm of the stage alone, where it is said so.
    for given in (root["dp"], root.get_group("dp")):
        assert_rational(norm_of(params(), norm_group=given), grads[stage])
    # Set and cleared between two steps.
    optimizer = FusedAdamW(params(), norm_group=root, max_grad_norm=INF)
    optimizer.step()
    optimizer.norm_group = root["dp"]
    optimizer.step()
    assert_rational(optimizer.grad_norm, grads[stage])
    optimizer.norm_group = None
    with pytest.raises(RuntimeError, match="'pp'"):
        optimizer.step()
    optimizer.max_grad_norm = None
    optimizer.step()
    optimizer.max_grad_norm, optimizer.norm_group = INF, root
    optimizer.step()
    assert_rational(optimizer.grad_norm, all_grads)
    # Plain tensors of each rank: parts, as of FSDP1, unless it is said that all have the same.
    mine, same = randn((3,), 10 + rank), randn((2,), 9)
    groups = [{"params": [trained(mine)]}, {"params": [trained(same)], "replicated": True}]
    everything = [*(randn((3,), 10 + each) for each in range(4)), same]
    assert_rational(norm_of(groups, norm_group=root), everything)


def copies(rank: int) -> None:
    """Ranks along a dimension of the mesh that the parameters do not know hold the same ones."""
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    grads = [randn((5, 3), 1), randn((4,), 2)]

    def params() -> list[Any]:
        return [trained(grad, root["dp"], ROWS) for grad in grads]

    optimizer, error = refused(params(), "'cp'", "norm_group")
    optimizer.norm_group = group_in(error, 1, param=optimizer.param_groups[0]["params"][0])
    optimizer.step()
    assert_rational(optimizer.grad_norm, grads)
    # A norm of all ranks, so that they skip together.
    groups = [{"params": params(), "replicated": True}]
    if rank == 3:
        groups[0]["params"][0].grad._local_tensor[0] = INF
    optimizer = FusedAdamW(groups, max_grad_norm=INF, norm_group=root, skip_nonfinite=True)
    optimizer.step()
    assert optimizer.found_inf == 1
    optimizer.param_groups[0]["params"][0].grad = trained(grads[0], root["dp"], ROWS).grad
    optimizer.step()
    alike_everywhere(optimizer.grad_norm)
    assert_rational(optimizer.grad_norm, grads)


@pytest.mark.parametrize("rank", range(8))
def test_copies_in_each_stage_of_a_pipeline(rank: int) -> None:
    """The first copy of the norm's own ranks counts, and not the first one of the whole mesh."""
    names = f"pp{rank}", f"dp{rank}", f"cp{rank}"  # torch remembers equal meshes, of another rank
    with fake_ranks(8, rank):
        root = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=names)
        stage = root[names[1:]]._flatten()
        counts = {stage: rank % 2 == 0, dist.group.WORLD: rank in (0, 2)}
        for given, counted in counts.items():
            param = trained(randn((8, 4), 1), root[names[1]], ROWS)
            groups = [{"params": [param], "replicated": True}]
            found = FusedAdamW(groups, max_grad_norm=INF, norm_group=given)._ranks()
            assert found.uncounted == (frozenset() if counted else {0}), given


@pytest.mark.parametrize("check", [stages, copies])
def test_dimensions_that_the_parameters_do_not_know(check: Any) -> None:
    ranks.run(4, check)


# ---- experts -------------------------------------------------------------------------------------


def experts(rank: int) -> None:
    dense_mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    expert_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "efsdp"))
    dense, expert = randn((5, 3), 1), randn((4, 3), 2)
    own = [randn((3, 2), 3 + each) for each in range(2)]  # of each group of experts

    def on_all() -> list[Any]:
        placements = [Shard(0), Shard(1)]
        return [trained(dense, dense_mesh, ROWS), trained(expert, expert_mesh, placements)]

    norm = norm_of(on_all())
    alike_everywhere(norm)
    assert_rational(norm, [dense, expert])
    # Each pair of ranks has experts of its own.
    column = rank // 2

    def on_part() -> list[Any]:
        return [trained(dense, dense_mesh, ROWS), trained(own[column], expert_mesh["efsdp"], ROWS)]

    first, second = on_part()
    groups = [{"params": [first]}, {"params": [second], "replicated": False}]
    norm = norm_of(groups)
    alike_everywhere(norm)
    assert_rational(norm, [dense, *own])
    optimizer, error = refused(on_part(), "param 1 of group 0", "a smaller mesh", "replicated")
    # Both pairs of ranks hold the same.
    first, second = trained(dense, dense_mesh, ROWS), trained(own[0], expert_mesh["efsdp"], ROWS)
    optimizer, error = refused([{"params": [first]}, {"params": [second]}], "a smaller mesh")
    assert_rational(helped(optimizer, error), [dense, own[0]])
    # It may be said otherwise later on, and counts from the next step on.
    optimizer.param_groups[-1]["replicated"] = False
    optimizer.step()
    assert_rational(optimizer.grad_norm, [dense, own[0], own[0]])
    # On meshes none of which has all ranks of the others.
    rows, columns = expert_mesh["efsdp"], expert_mesh["ep"]
    two = [trained(own[0], rows, ROWS), trained(own[1], columns, ROWS)]
    optimizer, error = refused(two, "lies on a part of its mesh", "'ep'")
    optimizer.norm_group = group_in(error)
    with pytest.raises(RuntimeError, match="a smaller mesh"):
        optimizer.step()


def test_experts() -> None:
    ranks.run(4, experts)


# ---- groups and meshes ---------------------------------------------------------------------------


def kinds_of_groups(rank: int) -> None:
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    grad = randn((9, 3), 1)
    flat = square._flatten("all")
    assert_rational(norm_of([trained(grad, flat, ROWS)]), [grad])
    both = [trained(grad, flat, ROWS), trained(grad, square, [Shard(0), Shard(1)])]
    assert_rational(norm_of(both), [grad, grad])
    pair = dist.new_group([0, 1])
    others = dist.new_group([2, 3])
    mine = pair if rank < 2 else others
    assert_rational(norm_of([trained(grad)], norm_group=mine), [grad, grad])
    columns = [DeviceMesh("cpu", [[each], [each + 1]]) for each in (0, 2)]
    assert_rational(norm_of([trained(grad)], norm_group=columns[rank // 2]), [grad, grad])
    # A group of other ranks only.
    given = DeviceMesh("cpu", [0, 1])
    if rank >= 2:
        optimizer, error = refused([trained(grad)], "no member on this rank", norm_group=given)
        for line in remedies(error):
            exec(line, {"optimizer": optimizer, "group": others})
        optimizer.step()
    else:
        norm_of([trained(grad)], norm_group=given)
    with pytest.raises(ValueError, match="Invalid norm_group value: 3; use a ProcessGroup"):
        FusedAdamW([trained(grad)], norm_group=3)
    optimizer = FusedAdamW([trained(grad)])
    with pytest.raises(ValueError, match="Invalid norm_group value"):
        optimizer.norm_group = [0, 1]


def test_groups_and_meshes() -> None:
    ranks.run(4, kinds_of_groups)


def test_a_mesh_without_a_group_of_its_own() -> None:
    """Of two dimensions, in a world of eight."""
    with fake_ranks(8):
        root = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
        mesh = root["dp", "tp"]
        params = [trained(randn((8, 4), 1), mesh, [Shard(0), Shard(1)])]
        optimizer, error = refused(params, "several dimensions and not all ranks", norm_group=mesh)
        assert remedies(error) == ["optimizer.norm_group = mesh._flatten()"]
        exec(remedies(error)[0], {"optimizer": optimizer, "mesh": mesh})
        assert dist.get_process_group_ranks(optimizer._ranks().group) == [0, 1, 2, 3]
        meshes = [DeviceMesh("cpu", part) for part in ([0, 1], [0, 2, 4])]
        two = [trained(randn((6,), i), part, ROWS) for i, part in enumerate(meshes)]
        optimizer, error = refused(two, "lies on DeviceMesh", "and other parameters on other ranks")
        assert group_in(error) is dist.group.WORLD
        with torch.device("meta"):  # a default device is none of ours
            refused(params, "'pp'")


def one_rank(rank: int) -> None:
    """A world of one shares with nobody."""
    mesh = init_device_mesh("cpu", (1,))
    grads = [randn((5, 3), 1), randn((4,), 2)]
    for given in (None, dist.group.WORLD, mesh):
        optimizer = FusedAdamW(
            [trained(g, mesh, ROWS) for g in grads], max_grad_norm=INF, norm_group=given
        )
        with collectives() as called:
            optimizer.step()
        assert called == []
        assert_rational(optimizer.grad_norm, grads)
        assert optimizer._ranks() is None and not optimizer._step_supports_amp_scaling


def test_a_world_of_one() -> None:
    ranks.run(1, one_rank)


# ---- what a group of ranks cannot share ----------------------------------------------------------


def outside(rank: int) -> None:
    """Ranks that the group lacks, copies of which no mesh knows, and stages that differ."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    grad, other = randn((8, 3), 1), randn((4,), 2)
    hsdp = [trained(grad, square, [Replicate(), Shard(0)])]
    optimizer, error = refused(hsdp, "norm_group has not all ranks", norm_group=square["shard"])
    exec(remedies(error)[0], {"torch": torch, "optimizer": optimizer})
    optimizer.step()
    assert_rational(optimizer.grad_norm, [grad])
    pairs = dist.new_group([0, 1]), dist.new_group([2, 3])
    alone = DeviceMesh.from_group(pairs[rank // 2], "cpu")
    copy = [{"params": [trained(grad, alone, ROWS)], "replicated": True}]
    optimizer, error = refused(copy, "has ranks outside of", norm_group=dist.group.WORLD)
    exec(remedies(error)[0], {"optimizer": optimizer})
    optimizer.step()
    assert_rational(optimizer.grad_norm, [grad, grad])
    # What one stage alone says that all ranks hold; then a tensor of which it says nothing.
    stage = [{"params": [trained(grad, square["shard"], ROWS)]}]
    for key, own, others in (
        ({"replicated": True}, "the ranks' options differ", "the ranks' options differ"),
        ({}, "plain tensor beside DTensors", "another rank refused this step"),
        ({"replicated": "yes"}, "use True or False", "another rank refused this step"),
    ):
        more = [{"params": [trained(other)], **key}] if rank >= 2 else []
        optimizer = FusedAdamW([*stage, *more], max_grad_norm=INF, norm_group=square)
        with pytest.raises(RuntimeError, match=own if more else others):
            optimizer.step()


def test_what_a_group_cannot_share() -> None:
    ranks.run(4, outside)


def unscaled(rank: int) -> None:
    """Before the step, by our scaler: still one message, also where a rank has no gradients."""
    mesh = init_device_mesh("cpu", (2,))
    param = trained(randn((8, 3), 1), mesh, ROWS)
    optimizer = FusedAdamW([param], max_grad_norm=INF)
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for grad in (param.grad, None if rank else param.grad):
        param.grad = grad
        with collectives() as called:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        assert called == ["allreduce_"]


def test_unscaling_sends_nothing() -> None:
    ranks.run(2, unscaled)
