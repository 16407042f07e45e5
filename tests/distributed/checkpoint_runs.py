"""Runs of small sharded models, for the tests of checkpoints.

A step without a norm works on each element alone. So a sharded run has the bits of a run of one
process on the whole tensors, whatever the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import fusedopt

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (fusedopt.FusedAdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "amsgrad": (fusedopt.FusedAdamW, {"lr": 0.1, "amsgrad": True}),
    "sgd": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "lion": (fusedopt.FusedLion, {"lr": 0.1}),
    # Dithered by the place of an element in the whole tensor, so that shards change nothing.
    "bf16": (fusedopt.FusedAdamW, {"lr": 0.1, "state_dtype": "bf16"}),
    "beside": (fusedopt.FusedAdamW, {"lr": 0.1, "master_weights": "remainder8"}),
    "momentum": (
        fusedopt.FusedSGD,
        {"lr": 0.1, "momentum": 0.9, "state_dtype": "bf16", "master_weights": "remainder"},
    ),
}
Values = dict[tuple[str, str], Tensor]  # by names of parameter and state, all elements


def build_model(seed: int, dtype: torch.dtype = torch.float32, shard: bool = True) -> Any:
    """Rows that 2, 3 or 4 ranks do not share evenly; of 4, the last one has none of a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7)).to(dtype)
    return fully_shard(model) if shard else model


def build(kind: str, dtype: torch.dtype, seed: int, shard: bool = True) -> tuple[Any, Any]:
    model = build_model(seed, dtype, shard)
    cls, options = KINDS[kind]
    return model, cls(model.parameters(), **options)


def give_grads(model: Any, step: int) -> None:
    """Of the same elements on any number of ranks."""
    gen = torch.Generator().manual_seed(100 + step)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=gen).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
        param.grad = grad


def train(model: Any, optimizer: Any, *steps: int) -> None:
    for step in steps:
        give_grads(model, step)
        optimizer.step()


def full(tensor: Any) -> Tensor:
    if tensor.dtype == torch.int16:  # which collectives do not know
        tensor = tensor.int()
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return whole.clone()


def values(model: Any, optimizer: Any) -> Values:
    """Parameters and all of their state."""
    return {
        (name, kind): full(value)
        for name, param in model.named_parameters()
        for kind, value in {"param": param, **optimizer.state.get(param, {})}.items()
    }


def assert_same(found: Values, wanted: Values) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
