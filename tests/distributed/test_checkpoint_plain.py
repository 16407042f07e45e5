"""Checkpoints of sharded models by state_dict() and load_state_dict() alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from checkpoint_helpers import remedy_in, traced
from checkpoint_runs import (
    KINDS,
    Values,
    assert_same,
    build,
    build_model,
    full,
    give_grads,
    train,
    values,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fusedopt


def plain_run(kind: str, dtype: torch.dtype, whose: Any = None, **options: Any) -> Any:
    """Model, optimizer and checkpoint of one process after two steps."""
    model, optimizer = build(kind, dtype, 0, shard=False)
    if whose is not None:
        optimizer = whose(model.parameters(), **KINDS[kind][1], **options)
    train(model, optimizer, 0, 1)
    return model, optimizer, copy.deepcopy(optimizer.state_dict())


def like(model: Any, source: Any) -> None:
    """Give ``model`` the values of a plain model."""
    with torch.no_grad():
        for param, value in zip(model.parameters(), source.parameters(), strict=True):
            if isinstance(param, DTensor):
                param.copy_(
                    distribute_tensor(
                        value, param.device_mesh, param.placements, src_data_rank=None
                    )
                )
            else:
                param.copy_(value)


def states(values: Values) -> Values:
    return {key: value for key, value in values.items() if key[1] != "param"}


# ---- the same ranks, and a checkpoint of one process ---------------------------------------------


def saved_by_each_rank(rank: int, folder: str) -> None:
    for kind, dtype in [("adamw", torch.bfloat16), ("sgd", torch.float32)]:
        model, optimizer = build(kind, dtype, 0)
        train(model, optimizer, 0, 1)
        weights = [p.detach().clone() for p in model.parameters()]
        torch.save((weights, optimizer.state_dict()), Path(folder, f"{kind}{rank}"))
        train(model, optimizer, 2)
        torch.save(values(model, optimizer), Path(folder, f"{kind}-next{rank}"))


def loaded_by_each_rank(rank: int, folder: str) -> None:
    """In another process group: the mesh of the checkpoint is equal, and not the same object."""
    for kind, dtype in [("adamw", torch.bfloat16), ("sgd", torch.float32)]:
        model, optimizer = build(kind, dtype, 7)
        weights, saved = torch.load(Path(folder, f"{kind}{rank}"), weights_only=False)
        with torch.no_grad():
            for p, value in zip(model.parameters(), weights, strict=True):
                p.to_local().copy_(value._local_tensor)
        optimizer.load_state_dict(saved)
        train(model, optimizer, 2)
        wanted = torch.load(Path(folder, f"{kind}-next{rank}"), weights_only=True)
        assert_same(values(model, optimizer), wanted)


def of_one_process(rank: int) -> None:
    """torch's and ours, loaded as they are: each rank takes its part."""
    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    coupled = {"decoupled_weight_decay": False}
    for kind, dtype, whose, options in [
        ("adamw", torch.float32, adamw, {}),
        ("amsgrad", torch.float32, adamw, {}),
        ("sgd", torch.float32, sgd, coupled),
        ("adamw", torch.bfloat16, None, {}),
        ("lion", torch.bfloat16, None, {}),
    ]:
        plain, plain_optimizer, saved = plain_run(kind, dtype, whose)
        model = build_model(7, dtype)
        optimizer = KINDS[kind][0](model.parameters(), **{**KINDS[kind][1], "lr": 9.0, **options})
        like(model, plain)
        optimizer.load_state_dict(saved)
        found = states(values(model, optimizer))
        wanted = states(values(plain, plain_optimizer))
        if whose is sgd:  # which has no count
            found = {key: value for key, value in found.items() if key[1] != "step"}
            wanted = {key: value for key, value in wanted.items() if key[1] != "step"}
        assert_same(found, wanted)
        # The step after, with our optimizer of one process: torch's own has other bits.
        twin = build_model(7, dtype, shard=False)
        twin_optimizer = KINDS[kind][0](twin.parameters(), **{**KINDS[kind][1], **options})
        like(twin, plain)
        twin_optimizer.load_state_dict(saved)
        train(model, optimizer, 2)
        train(twin, twin_optimizer, 2)
        assert_same(values(model, optimizer), values(twin, twin_optimizer))


def test_plain_loading(tmp_path: Path) -> None:
    ranks.run(2, saved_by_each_rank, str(tmp_path))
    ranks.run(2, loaded_by_each_rank, str(tmp_path))
    ranks.run(3, of_one_process)


# ---- other meshes and placements -----------------------------------------------------------------


def on_two_dimensions(rank: int) -> list[str]:
    """FSDP2 over tensor parallelism: _StridedShard, also with rows that are not shared evenly."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    seen = []
    for rows in (8, 7, 5, 3):
        torch.manual_seed(0)
        plain = torch.nn.Linear(3, rows)
        model = torch.nn.Sequential(copy.deepcopy(plain))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        optimizer = fusedopt.FusedAdamW(model.parameters())
        single = fusedopt.FusedAdamW(plain.parameters())
        train(plain, single, 0, 1)
        saved = copy.deepcopy(single.state_dict())
        optimizer.load_state_dict(saved)
        for mine, param in zip(model.parameters(), plain.parameters(), strict=True):
            for name, value in single.state[param].items():
                state = optimizer.state[mine][name]
                assert torch.equal(full(state), value), (rows, name)
                if name != "step":
                    assert state.placements == mine.placements
                    assert state._local_tensor.shape == mine._local_tensor.shape
        seen.append(type(next(model.parameters()).placements[0]).__name__)
    return seen


def with_other_placements(rank: int) -> None:
    """Of the same mesh: redistributed. Of another: refused, and loads once it is whole."""
    plain, plain_optimizer, saved = plain_run("adamw", torch.float32)
    wanted = states(values(plain, plain_optimizer))
    model, optimizer = build("adamw", torch.float32, 7)
    mesh = next(model.parameters()).device_mesh
    other = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("other",))
    for placement in (Replicate(), Shard(0), Shard(1)):
        for stated in (False, True):  # the second time there is a state to write to
            loaded = copy.deepcopy(saved)
            for own in loaded["state"].values():
                for name in ("exp_avg", "exp_avg_sq"):
                    fits = placement == Replicate() or placement.dim < own[name].dim()
                    own[name] = distribute_tensor(
                        own[name], mesh, [placement if fits else Shard(0)]
                    )
            if stated:
                train(model, optimizer, 5)
            if rank == 1:  # the order of a dict is the rank's own
                loaded["state"] = dict(reversed(loaded["state"].items()))
            optimizer.load_state_dict(loaded)
            assert_same(states(values(model, optimizer)), wanted)
    loaded["state"][0]["exp_avg"] = distribute_tensor(
        saved["state"][0]["exp_avg"].clone(), other, [Shard(0)]
    )
    train(model, optimizer, 5)
    before = values(model, optimizer)
    with pytest.raises(TypeError, match=r"state 'exp_avg' lies on .*other.*, and") as why:
        optimizer.load_state_dict(loaded)
    assert_same(values(model, optimizer), before)
    exec(remedy_in(str(why.value).partition(", or start")[0]), {"state_dict": loaded})
    optimizer.load_state_dict(loaded)
    assert_same(states(values(model, optimizer)), wanted)


def into_a_plain_model(rank: int) -> None:
    """The parts of one rank are no states: refused by name, and load once they are whole."""
    model, optimizer = build("adamw", torch.bfloat16, 0)
    train(model, optimizer, 0, 1)
    plain, plain_optimizer = build("adamw", torch.bfloat16, 0, shard=False)
    saved = optimizer.state_dict()
    for key in saved["state"]:
        for name in ("exp_avg", "exp_avg_sq", "master_param"):
            message = f"param {key} of group 0: state '{name}' lies on DeviceMesh.*: `"
            with pytest.raises(TypeError, match=message) as why:
                plain_optimizer.load_state_dict(saved)
            assert not plain_optimizer.state
            exec(remedy_in(str(why.value).partition(", or start")[0]), {"state_dict": saved})
    plain_optimizer.load_state_dict(saved)
    wanted = states(values(model, optimizer))
    assert_same(states(values(plain, plain_optimizer)), wanted)


def of_a_rank_instead_of_all(rank: int) -> None:
    """A part where the whole is due has another shape, except where it is the whole."""
    model, optimizer = build("adamw", torch.float32, 0)
    train(model, optimizer, 0)
    saved = optimizer.state_dict()
    for own in saved["state"].values():
        own.update({n: v.to_local() for n, v in own.items() if n != "step"})
    with pytest.raises(RuntimeError, match="param 0 of group 0: state 'exp_avg' has shape"):
        optimizer.load_state_dict(saved)


def the_key_replicated(rank: int) -> None:
    """It says what ranks hold now; a checkpoint of other ranks does not know."""
    for key in (True, False):
        extra = torch.nn.Parameter(torch.ones(2))
        params = [{"params": build_model(0).parameters()}, {"params": [extra], "replicated": key}]
        optimizer = fusedopt.FusedAdamW(params)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["replicated"] = saved["param_groups"][1]["replicated"] = not key
        saved["param_groups"][1]["lr"] = 5.0
        optimizer.load_state_dict(saved)
        assert "replicated" not in optimizer.param_groups[0]
        assert optimizer.param_groups[1]["replicated"] is key
        assert optimizer.param_groups[1]["lr"] == 5.0


def other_ways(rank: int) -> None:
    with_other_placements(rank)
    into_a_plain_model(rank)
    of_a_rank_instead_of_all(rank)
    the_key_replicated(rank)


def test_meshes_and_placements() -> None:
    assert ranks.run(4, on_two_dimensions) == [["_StridedShard"] * 4] * 4
    ranks.run(2, other_ways)


# ---- memory --------------------------------------------------------------------------------------

ROWS, LOCAL = 40_000, 40_000 // 2 * 8 * 4  # bytes of a state on one of two ranks


def large(rank: int) -> tuple[Any, Any]:
    model = fully_shard(torch.nn.Sequential(*(torch.nn.Linear(8, ROWS) for _ in range(2))))
    return model, fusedopt.FusedAdamW(model.parameters())


def checkpoints(source: Any) -> Iterator[tuple[str, Any]]:
    saved = copy.deepcopy(source.state_dict())
    yield "of DTensors", saved
    whole = copy.deepcopy(saved)
    for own in whole["state"].values():
        own.update({name: full(value) for name, value in own.items()})
    yield "of one process", whole


def peaks(rank: int) -> None:
    """Loading needs at most one tensor beside state and checkpoint."""
    source_model, source = large(rank)
    train(source_model, source, 0)
    model, optimizer = large(rank)
    optimizer.init_state()
    footprint = optimizer.memory_footprint()
    sizes = [p.to_local().nbytes for p in model.parameters()]
    assert footprint["param"] == footprint["exp_avg"] == footprint["exp_avg_sq"] == sum(sizes)
    for name, saved in checkpoints(source):
        for made in ("init_state", "step", "load"):
            if made == "step":
                train(model, optimizer, 3)
            states = [own[n] for own in optimizer.state.values() for n in own if n != "step"]
            places = [(id(state), state._local_tensor.data_ptr()) for state in states]
            del states
            peak, left = traced(partial(optimizer.load_state_dict, saved))
            assert peak <= 100_000 and left <= 5000, (name, made, peak)
            states = [own[n] for own in optimizer.state.values() for n in own if n != "step"]
            assert places == [(id(state), state._local_tensor.data_ptr()) for state in states]
            del states
            assert_same(states_of(optimizer), states_of(source))
        fresh = large(rank)[1]
        peak, _ = traced(partial(fresh.load_state_dict, saved))
        assert 4 * LOCAL <= peak <= 4 * LOCAL + 2 * ROWS * 4 + 100_000, (name, peak)
        assert_same(states_of(fresh), states_of(source))
    mesh = next(model.parameters()).device_mesh
    for own in saved["state"].values():
        own.update({n: distribute_tensor(v, mesh) for n, v in own.items() if v.dim()})
    fresh = large(rank)[1]
    peak, _ = traced(partial(fresh.load_state_dict, saved))
    assert peak <= 4 * LOCAL + 2 * ROWS * 4 + 2 * LOCAL, peak
    own, held = optimizer.state_dict(), [*optimizer.state.values()]
    peak, _ = traced(lambda: optimizer.load_state_dict(own))
    assert peak <= 100_000 and len(held) == 4


def states_of(optimizer: Any) -> Values:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        (str(i), n): full(v) for i, p in enumerate(params) for n, v in optimizer.state[p].items()
    }


def what_others_see(rank: int) -> None:
    """It does not change under them, whichever part of a state they hold."""
    model, optimizer = build("adamw", torch.float32, 0)
    for owner in (
        lambda: optimizer.state_dict(),
        lambda: [own["exp_avg"] for own in optimizer.state.values()],
        lambda: [own["exp_avg"]._local_tensor for own in optimizer.state.values()],
        lambda: [own["exp_avg"].to_local() for own in optimizer.state.values()],
        lambda: [own["exp_avg"]._local_tensor[:1] for own in optimizer.state.values()],
    ):
        train(model, optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, 2)
        held = owner()
        first = held["state"][0]["exp_avg"] if isinstance(held, dict) else held[0]
        before = full(first) if isinstance(first, DTensor) else first.clone()
        optimizer.load_state_dict(saved)
        now = full(first) if isinstance(first, DTensor) else first
        assert torch.equal(now, before)
        loaded = next(iter(optimizer.state.values()))["exp_avg"]
        assert torch.equal(full(loaded), full(saved["state"][0]["exp_avg"]))


def memory(rank: int) -> None:
    peaks(rank)
    what_others_see(rank)


def test_memory() -> None:
    ranks.run(2, memory)


def test_gradients_are_alike_on_any_number_of_ranks() -> None:
    """Which the tests take for granted."""
    one, other = build_model(0, shard=False), build_model(0, shard=False)
    give_grads(one, 3)
    give_grads(other, 3)
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
