"""Steps over DTensors: parameters and states have the bits of one process on the whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from sharded import CLIPPED, Twins, Whole, all_of, collectives, part
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.profiler import ProfilerActivity, profile

from fusedopt import FusedAdamW, FusedLion, FusedSGD

HALVES = (torch.bfloat16, torch.float16)
ROWS, COLUMNS, COPIES = [Shard(0)], [Shard(1)], [Replicate()]
# On four ranks (5, 3) has an empty shard, and (1,) has three.
WHOLES = [
    Whole((5, 3), ROWS),
    Whole((1,), ROWS),
    Whole((7, 64), ROWS),
    Whole((3, 7), COLUMNS),
    Whole((4, 2), COPIES),
    Whole((0, 3), ROWS),
    *(Whole((7, 5), ROWS, dtype) for dtype in HALVES),
    Whole((5,), COPIES, torch.bfloat16),
]
FSDP_AND_TP = [
    Whole((9, 3), [_StridedShard(0, split_factor=2), Shard(0)]),
    Whole((5, 6), [Shard(0), Shard(1)]),
    Whole((3,), [Shard(0), Replicate()]),
    Whole((7, 2), [Replicate(), Shard(0)]),
    Whole((6, 2), [_StridedShard(0, split_factor=2), Shard(0)], torch.bfloat16),
    Whole((2, 2), [Replicate(), Replicate()]),
]
RULES: list[tuple[Any, dict[str, Any]]] = [
    (FusedAdamW, {"amsgrad": True, "backend": "auto"}),
    (FusedAdamW, {"backend": "reference"}),
    (FusedSGD, {"momentum": 0.9, "nesterov": True}),
    (FusedSGD, {}),
    (FusedLion, {}),
]


def three_steps(twins: Twins) -> None:
    for step in range(3):
        twins.step(step)
        twins.check()
    if twins.optimizer.state[twins.params[0]]:
        counts = {float(own["step"]) for own in twins.optimizer.state.values()}
        assert counts == {3.0}, "where a shard is empty, too"


def as_in_one_process(rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for cls, options in RULES:
        three_steps(Twins(mesh, WHOLES, cls, **options))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_one_dimension(world: int) -> None:
    """Rows and columns, uneven and empty, replicas, halves with masters; every rule."""
    ranks.run(world, as_in_one_process)


def two_dimensions(rank: int) -> None:
    for names, wholes in (
        (
            ("replicate", "shard"),
            [Whole((5, 3), [Replicate(), Shard(0)]), Whole((3,), [Replicate(), Shard(0)])],
        ),
        (("dp", "tp"), FSDP_AND_TP),
    ):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        for cls, options in RULES[:3]:
            three_steps(Twins(mesh, wholes, cls, **options))


def test_hsdp_and_fsdp_with_tensor_parallelism() -> None:
    ranks.run(4, two_dimensions)


# ---- what belongs to the parameter ---------------------------------------------------------------


def state_is_sharded_like_its_parameter(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for make in (lambda each: each.step(0), lambda each: each.optimizer.init_state()):
        twins = Twins(mesh, FSDP_AND_TP)
        make(twins)
        n_bytes = 0
        for p in twins.params:
            own = twins.optimizer.state[p]
            masters = {"master_param"} if p.dtype in HALVES else set()
            assert own.keys() == {"step", "exp_avg", "exp_avg_sq"} | masters
            assert type(own["step"]) is torch.Tensor and own["step"].shape == ()
            for value in (own[name] for name in own if name != "step"):
                assert type(value) is DTensor and value.dtype == torch.float32
                assert value.device_mesh == p.device_mesh and value.placements == p.placements
                assert value.shape == p.shape and value.stride() == p.stride()
                assert part(value).shape == part(p).shape and not value.requires_grad
            n_bytes += part(own["exp_avg"]).nbytes
        footprint = twins.optimizer.memory_footprint()
        assert footprint["exp_avg"] == n_bytes
        assert footprint["param"] == sum(part(p).nbytes for p in twins.params)
        assert footprint["grad"] == sum(
            part(p.grad).nbytes for p in twins.params if p.grad is not None
        )


def versions_and_hooks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    twins = Twins(mesh, [Whole((5, 3), ROWS), Whole((3,), ROWS)])
    p, q = twins.params
    # torch's own fused step counts nothing on the local tensor.
    theirs = torch.nn.Parameter(p.detach().clone())
    theirs.grad = p.detach().clone()
    torch.optim.AdamW([theirs], fused=True).step()
    seen: list[Any] = []
    twins.optimizer.register_step_pre_hook(lambda opt, *_: seen.append(all_of(p.grad).clone()))
    twins.optimizer.register_step_post_hook(
        lambda opt, *_: seen.append(opt.state[p]["step"].item())
    )
    saved = (p * 2).sum()  # keeps p for the backward pass
    product = p * p
    locals_before = part(p)
    for step in range(2):
        versions = p._version, part(p)._version, q._version
        twins.step(step, without=[1])
        assert (p._version, part(p)._version) == (versions[0] + 1, part(theirs)._version)
        assert q._version == versions[2], "a parameter without gradient is not written"
        assert seen[-1] == step + 1 and torch.equal(seen[-2], twins.whole[0].grad)
    assert part(p) is locals_before
    with profile(activities=[ProfilerActivity.CPU]) as record:
        twins.step(2)
    twins.check()
    names = [event.name for event in record.events()]
    assert names.count("Optimizer.step#FusedAdamW.step") == 2  # over ranks, and alone
    saved.backward()  # the gradient of 2 * p needs no p
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def frozen_and_without_gradients(rank: int) -> None:
    """Also on one rank alone: its peers go on, and no rank waits."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    twins = Twins(mesh, [Whole((5, 3), ROWS), Whole((4,), ROWS), Whole((6,), ROWS)])
    p, q, r = twins.params
    for param in (q, twins.whole[1]):
        param.requires_grad_(False)
    twins.step(0, without=[1, 2])
    twins.step(1, without=[1])
    assert q not in twins.optimizer.state
    assert [float(twins.optimizer.state[each]["step"]) for each in (p, r)] == [2.0, 1.0]
    # Only rank 0 has a gradient of r; then rank 0 has none at all.
    twins.give(2, without=[1])
    mine = [part(each.grad).clone() for each in (p, r)]
    if rank > 0:
        r.grad = None
    before = part(r).clone()
    twins.optimizer.step()
    assert torch.equal(before, part(r)) is (rank > 0)
    assert twins.optimizer.state[r]["step"] == (2.0 if rank == 0 else 1.0)
    squares = mine[0].double().square().sum() + mine[1].double().square().sum() * (rank == 0)
    dist.all_reduce(squares)
    assert twins.optimizer.grad_norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-6)
    if rank == 0:
        p.grad = r.grad = None
    before = part(p).clone()
    twins.optimizer.step()
    assert torch.equal(before, part(p)) is (rank == 0)
    squares = mine[0].double().square().sum() * (rank > 0)
    dist.all_reduce(squares)
    assert twins.optimizer.grad_norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-6)


def a_replaced_local_tensor(rank: int) -> None:
    """As FSDP2 does when it resets its sharded parameters."""
    mesh = init_device_mesh("cpu", (2,))
    for backend in ("auto", "reference"):
        twins = Twins(mesh, [Whole((5, 3), ROWS), Whole((40, 3), ROWS)], backend=backend)
        for step in range(3):
            twins.step(step)
            for p in twins.params:
                former = part(p)
                p._local_tensor = former.clone()
                former.fill_(float("nan"))
                for name in ("exp_avg", "exp_avg_sq"):
                    state = twins.optimizer.state[p][name]
                    former = part(state)
                    state._local_tensor = former.clone()
                    former.fill_(float("nan"))
            twins.check()


def a_gradient_that_is_still_on_its_way(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    twins = Twins(mesh, [Whole((6, 3), ROWS)])
    for step in range(2):
        twins.give(step)
        p = twins.params[0]
        local = all_reduce(
            part(p.grad), "sum", dist.new_group([rank], use_local_synchronization=True)
        )
        assert type(local) is AsyncCollectiveTensor
        p.grad = DTensor(local, p._spec, requires_grad=False)
        twins.optimizer.step()
        twins.single.step()
        twins.check()


def groups_that_are_added(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    twins = Twins(mesh, [Whole((5, 3)), Whole((7,), ROWS), Whole((5,), ROWS)])
    first = [{"params": own[:1], "replicated": True} for own in (twins.params, twins.whole)]
    optimizer, single = (FusedAdamW([group], **CLIPPED) for group in first)
    twins.optimizer, twins.single = optimizer, single
    twins.give(0)
    with collectives() as called:
        optimizer.step()
    assert called == []
    single.step()
    for each, own in ((optimizer, twins.params), (single, twins.whole)):
        each.add_param_group({"params": own[1:], "lr": 0.2})
    twins.give(1)
    with collectives() as called:
        optimizer.step()
    assert called == ["allreduce_"]
    single.step()
    twins.check()
    assert torch.equal(*twins.norms())


@pytest.mark.parametrize(
    "check",
    [
        versions_and_hooks,
        frozen_and_without_gradients,
        a_replaced_local_tensor,
        a_gradient_that_is_still_on_its_way,
        groups_that_are_added,
    ],
)
def test_on_two_ranks(check: Any) -> None:
    ranks.run(2, check)


def test_state_and_what_it_takes() -> None:
    ranks.run(4, state_is_sharded_like_its_parameter)
