"""FSDP1's own functions for checkpoints: optim_state_dict and optim_state_dict_to_load."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from checkpoint_runs import KINDS
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel as FSDP,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)

TYPES: dict[str, tuple[Any, Any, Any]] = {
    "full": (
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(),
        # On a CPU torch's own offload_to_cpu=True gives each state the values of the last one.
        FullOptimStateDictConfig(rank0_only=False, offload_to_cpu=False),
    ),
    "sharded": (
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(),
        ShardedOptimStateDictConfig(),
    ),
}


def build(kind: str, dtype: torch.dtype, seed: int, original: bool) -> tuple[Any, Any]:
    """With ``original``, a rank has no part of some parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7)).to(dtype)
    model = FSDP(model, use_orig_params=original, device_id=torch.device("cpu"))
    cls, options = KINDS[kind]
    return model, cls(model.parameters(), **options)


def train(model: Any, optimizer: Any, *steps: int) -> None:
    for step in steps:
        gen = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 3, generator=gen).to(next(model.parameters()).dtype)
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def found(model: Any, optimizer: Any) -> dict[Any, Tensor]:
    """What this rank has."""
    return {
        (i, name): value.detach().clone()
        for i, param in enumerate(model.parameters())
        for name, value in {"param": param, **optimizer.state.get(param, {})}.items()
    }


def assert_same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


def saved_and_loaded(rank: int, original: bool) -> None:
    for kind, dtype in [
        ("adamw", torch.float32),
        ("adamw", torch.bfloat16),
        ("sgd", torch.bfloat16),
        ("lion", torch.float32),
    ]:
        for form in TYPES.values():
            model, optimizer = build(kind, dtype, 0, original)
            train(model, optimizer, 0, 1)
            with FSDP.state_dict_type(model, *form):
                weights = model.state_dict()
                saved = FSDP.optim_state_dict(model, optimizer)
            before = found(model, optimizer)
            other, other_optimizer = build(kind, dtype, 7, original)
            with FSDP.state_dict_type(other, *form):
                other.load_state_dict(weights)
                loadable = FSDP.optim_state_dict_to_load(other, other_optimizer, saved)
            other_optimizer.load_state_dict(loadable)
            assert_same(before, found(other, other_optimizer))
            train(model, optimizer, 2)
            train(other, other_optimizer, 2)
            assert_same(found(model, optimizer), found(other, other_optimizer))


def by_dcp(rank: int, original: bool) -> None:
    """Its functions call those of FSDP."""
    for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
        model, optimizer = build("adamw", torch.bfloat16, 0, original)
        train(model, optimizer, 0, 1)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        other, other_optimizer = build("adamw", torch.bfloat16, 0, original)
        train(other, other_optimizer, 5)
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        set_optimizer_state_dict(other, other_optimizer, saved, options=options)
        assert_same(found(model, optimizer), found(other, other_optimizer))
        train(model, optimizer, 2)
        train(other, other_optimizer, 2)
        assert_same(found(model, optimizer), found(other, other_optimizer))


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_checkpoints(original: bool) -> None:
    ranks.run(2, saved_and_loaded, original)
    ranks.run(2, by_dcp, original)
