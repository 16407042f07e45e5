"""FSDP2 (`fully_shard`) and tensor parallelism: a sharded model trains as in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from engines import CLIP, MEASURE, STEPS, Beside, Model, batch, make_model, same_everywhere, whole
from tolerances import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

HALF = torch.bfloat16


def sharded(model: Model, **options: Any) -> Model:
    fully_shard(model.down, **options)
    fully_shard(model, **options)
    return model


def cpu_mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def alone_in_half(model: nn.Module, step: int) -> None:
    """What MixedPrecisionPolicy(param_dtype=bf16) does."""
    half = {name: param.to(HALF) for name, param in model.named_parameters()}
    y = torch.func.functional_call(model, half, batch(step, HALF))
    y.float().square().mean().backward()


def one_dimension(rank: int) -> None:
    for options in (MEASURE, CLIP):
        for reshard in (False, True):
            mesh = cpu_mesh(dist.get_world_size())
            wrap = functools.partial(sharded, mesh=mesh, reshard_after_forward=reshard)
            same_everywhere(Beside(wrap, options).train())
    # nobody asks for a norm, so that nothing is sent
    Beside(wrap, {}).train(messages_of_step=0)


def mixed_precision(rank: int) -> None:
    mesh = cpu_mesh(dist.get_world_size())
    policy = MixedPrecisionPolicy(param_dtype=HALF)
    wrap = functools.partial(sharded, mesh=mesh, mp_policy=policy)
    for options in (MEASURE, CLIP):
        compute = Beside(wrap, options, alone=alone_in_half)
        same_everywhere(compute.train())
        assert not any("master_param" in own for own in compute.opt.state.values())
    # a half model has masters
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    wrap = functools.partial(sharded, mesh=mesh, mp_policy=policy)
    half = Beside(wrap, MEASURE, make_model(HALF))
    same_everywhere(half.train())
    for param in half.model.parameters():
        master = half.opt.state[param]["master_param"]
        assert param.dtype == HALF and master.dtype == torch.float32
        assert_same_bits(param._local_tensor.detach(), master._local_tensor.to(HALF), "param")


def offloaded(rank: int) -> None:
    policy = CPUOffloadPolicy(pin_memory=False)
    wrap = functools.partial(sharded, mesh=cpu_mesh(2), offload_policy=policy)
    both = Beside(wrap, CLIP)
    same_everywhere(both.train())
    for param in both.model.parameters():
        own = [param, *both.opt.state[param].values()]
        assert {getattr(each, "_local_tensor", each).device.type for each in own} == {"cpu"}


def frozen(rank: int) -> None:
    single = make_model()
    single.up.requires_grad_(False)
    single.norm.bias.requires_grad_(False)
    both = Beside(functools.partial(sharded, mesh=cpu_mesh(2)), MEASURE, single)
    same_everywhere(both.train())
    states = [bool(both.opt.state.get(param)) for param in both.model.parameters()]
    assert states == [param.requires_grad for param in both.model.parameters()]
    assert states.count(True) == 4


def accumulated(rank: int) -> None:
    """Without synchronisation there are no gradients, and a step changes nothing."""
    both = Beside(functools.partial(sharded, mesh=cpu_mesh(2)), MEASURE)
    model: Any = both.model
    for step in range(STEPS):
        model.set_requires_gradient_sync(False)
        both.backward(10 + step)
        assert all(param.grad is None for param in model.parameters())
        before = [whole(param).detach().clone() for param in model.parameters()]
        both.opt.step()
        assert float(both.opt.grad_norm) == 0
        for param, value in zip(model.parameters(), before, strict=True):
            assert_same_bits(whole(param), value, "param")
        model.set_requires_gradient_sync(True)
        both.backward(step)
        both.step(1)
    both.compare()


class Branches(nn.Module):
    """Each rank takes another branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(6, 5) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.branches[dist.get_rank()](x)


def unused(rank: int) -> None:
    """Two branches are taken by one rank each, and two by none."""

    def wrap(model: Branches) -> Any:
        fully_shard(model, mesh=cpu_mesh(2))
        model.set_reduce_scatter_unused_params(True)
        return model

    both = Beside(wrap, MEASURE, Branches(), alone=None)
    same_everywhere(both.train())
    steps = [float(both.opt.state[param]["step"]) for param in both.model.parameters()]
    assert steps == [STEPS] * len(steps)
    grads = [
        bool(both.opt.state[param]["exp_avg"].full_tensor().any())
        for param in both.model.parameters()
    ]
    assert grads == [True] * 4 + [False] * 4


def hybrid(rank: int) -> None:
    """Each element is on two ranks, and counts once."""
    mesh = cpu_mesh(2, 2)
    for options in (MEASURE, CLIP):
        same_everywhere(Beside(functools.partial(sharded, mesh=mesh), options).train())


class Tokens(nn.Module):
    """`up` and `down` are cut along one dimension each by tensor parallelism, `norm` along none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.up(self.norm(x)).sin())


def tensor_parallel(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def wrap(model: Tokens) -> Tokens:
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(model, mesh["tp"], plan)
        for module in (model.up, model.down, model):
            fully_shard(module, mesh=mesh["dp"])
        return model

    def run(model: nn.Module, step: int) -> None:
        tokens = batch(step).view(2, 4, 6)
        of_this_rank = tokens.chunk(2, dim=1)[mesh["tp"].get_local_rank()]
        (model(of_this_rank).square().sum() / tokens.numel()).backward()

    def alone(model: nn.Module, step: int) -> None:
        model(batch(step).view(2, 4, 6)).square().mean().backward()

    for options in (MEASURE, CLIP):
        torch.manual_seed(3)
        both = Beside(wrap, options, Tokens(), run, alone=None)
        placements = {type(p) for param in both.model.parameters() for p in param.placements}
        assert {placement.__name__ for placement in placements} >= {"_StridedShard", "Replicate"}
        same_everywhere(both.train())


@pytest.mark.parametrize(
    "function", [one_dimension, mixed_precision, offloaded, frozen, accumulated, unused]
)
def test_two_ranks(function: Callable[[int], None]) -> None:
    ranks.run(2, function)


@pytest.mark.parametrize("function", [one_dimension, hybrid, tensor_parallel])
def test_four_ranks(function: Callable[[int], None]) -> None:
    ranks.run(4, function)
