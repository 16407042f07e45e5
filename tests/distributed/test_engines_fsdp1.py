"""FSDP1: clipping inside the step, by the norm of the ranks that share the parameters."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import ranks
import torch
import torch.distributed as dist
from engines import CLIP, MEASURE, Beside, backward, make_model, messages, norm_of, same_everywhere
from tolerances import assert_norm, assert_same_bits
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, ShardingStrategy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import fusedopt


def wrapped(model: Any, use_orig_params: bool = False, **options: Any) -> FSDP:
    options |= {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # NO_SHARD is deprecated
        model.down = FSDP(model.down, **options)
        return FSDP(model, **options)


def group_of(model: FSDP) -> dict[str, Any]:
    return {"norm_group": model.process_group}


class BesideFsdp1(Beside):
    def compare(self) -> None:
        with FSDP.summon_full_params(self.model, writeback=False):
            for name, param, twin in self.pairs():
                self._equal(param, twin, name)


class Replicated(BesideFsdp1):
    group: ClassVar[dict[str, Any]] = {"replicated": True}


def clipped(rank: int) -> None:
    for use_orig_params in (False, True):
        wrap = functools.partial(wrapped, use_orig_params=use_orig_params)
        for options in (MEASURE, CLIP):
            same_everywhere(BesideFsdp1(wrap, options, own=group_of).train())


def replicas(rank: int) -> None:
    """Parameters of which several ranks have the same are not counted twice."""
    inner, _ = dist.new_subgroups(2)
    across, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    for use_orig_params in (False, True):
        hybrid = functools.partial(
            wrapped,
            use_orig_params=use_orig_params,
            process_group=(inner, across),
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        )
        both = BesideFsdp1(hybrid, CLIP, own=group_of)
        assert both.opt.norm_group is inner
        same_everywhere(both.train())
        whole = functools.partial(
            wrapped,
            use_orig_params=use_orig_params,
            sharding_strategy=ShardingStrategy.NO_SHARD,
        )
        same_everywhere(Replicated(whole, CLIP).train(messages_of_step=0))
        same_everywhere(Replicated(whole, CLIP, own=group_of).train())


def refused(rank: int) -> None:
    for strategy, number in ((ShardingStrategy.FULL_SHARD, 0), (ShardingStrategy.NO_SHARD, 1)):
        model, single = wrapped(make_model(), sharding_strategy=strategy), make_model()
        optimizer = fusedopt.FusedAdamW(model.parameters(), skip_nonfinite=True)
        backward(model, 0)
        backward(single, 0)
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(RuntimeError, match="cannot be honoured for FSDP1 shards") as caught:
            optimizer.step()
        for param, value in zip(model.parameters(), before, strict=True):
            assert_same_bits(param, value, "param")
        remedy = re.findall("`([^`]+)`", str(caught.value))[number]
        exec(remedy, {"optimizer": optimizer, "model": model})
        optimizer.step()
        assert_norm(optimizer.grad_norm, norm_of(single.parameters()))
        # also once there is a plan
        optimizer.norm_group, optimizer.skip_nonfinite = None, False
        optimizer.param_groups[0].pop("replicated", None)
        optimizer.step()
        optimizer.max_grad_norm = 1.0
        with pytest.raises(RuntimeError, match="cannot be honoured for FSDP1 shards"):
            optimizer.step()
        exec(remedy, {"optimizer": optimizer, "model": model})
        optimizer.step()
        assert_norm(optimizer.grad_norm, norm_of(single.parameters()))


def scalers(rank: int) -> None:
    """An inf on the last rank only: no rank moves, and all scales are halved; they grow alike."""
    for use_orig_params in (False, True):
        for make, sent in ((ShardedGradScaler, None), (fusedopt.GradScaler, 1)):
            model = wrapped(make_model(), use_orig_params=use_orig_params)
            opt = fusedopt.FusedAdamW(model.parameters(), **CLIP, **group_of(model))
            scaler = make("cpu", init_scale=4.0, growth_interval=2)
            scales = [a_step(rank, model, opt, scaler, step, step == 1, sent) for step in range(5)]
            assert scales == [4.0, 2.0, 2.0, 4.0, 4.0]
            assert {float(own["step"]) for own in opt.state.values() if own} == {4.0}


def a_step(
    rank: int, model: FSDP, opt: Any, scaler: Any, step: int, bad: bool, sent: int | None
) -> float:
    """The scale after a step; ``bad``: there is an inf on the last rank."""
    scaler.scale(torch.zeros(()))
    backward(model, step)
    params = [param for param in model.parameters() if param.grad is not None and param.numel() > 0]
    torch._foreach_mul_([param.grad for param in params], scaler.get_scale())
    if bad and rank == dist.get_world_size() - 1:
        params[-1].grad.view(-1)[-1] = float("inf")
    before = [param.detach().clone() for param in params]
    with messages(sent), warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(opt)
    scaler.update()
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param, value) == bad
    opt.zero_grad()
    return scaler.get_scale()


@pytest.mark.parametrize("world", [2, 4])
def test_clipping_inside_the_step(world: int) -> None:
    ranks.run(world, clipped)


@pytest.mark.parametrize("function", [refused, scalers])
def test_two_ranks(function: Callable[[int], None]) -> None:
    ranks.run(2, function)


def test_replicas_count_once() -> None:
    ranks.run(4, replicas)
