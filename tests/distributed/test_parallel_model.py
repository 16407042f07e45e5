"""A model that torch's own engines have made parallel: tensor parallelism, and FSDP2 over it."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from harness import randn
from sharded import CLIPPED, alike_everywhere, assert_rational, collectives, part
from tolerances import assert_same_bits
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import fusedopt


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        # Tensor parallelism gives each rank 5 rows of `up`, and FSDP 3 or 2 of these.
        self.up, self.down = torch.nn.Linear(8, 10), torch.nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def model_and_whole(mesh: Any) -> tuple[Block, Block]:
    """Over the ranks of ``mesh`` and in one process; each rank has a part of the sequence."""
    torch.manual_seed(3)
    whole, model = Block(), Block()
    model.load_state_dict(whole.state_dict())
    up = ColwiseParallel(input_layouts=Shard(1))
    down = RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(model, mesh, {"norm": SequenceParallel(), "up": up, "down": down})
    return model, whole


def sequence_parallel(rank: int) -> None:
    """A real model, whose norm's weights get partial sums."""
    model, whole = model_and_whole(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    options: dict[str, Any] = {"lr": 0.01, "max_grad_norm": 0.5, "weight_decay": 0.1}
    single, optimizer = (fusedopt.FusedAdamW(m.parameters(), **options) for m in (whole, model))
    for step in range(3):
        x = randn((2, 6, 8), step)
        whole(x).square().mean().backward()
        mine = x[:, 3 * rank : 3 * rank + 3]
        out = model(mine)
        (part(out).square().sum() / x.numel()).backward()
        assert model.norm.weight.grad.placements[0].is_partial()
        with collectives() as called:
            optimizer.step()
        assert called == ["all_reduce", "allreduce_"], called
        single.step()
        assert optimizer.grad_norm.item() == pytest.approx(single.grad_norm.item(), rel=1e-5)
        alike_everywhere(optimizer.grad_norm, optimizer.clip_coef)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        single.zero_grad()


def fsdp_over_tensor_parallelism(rank: int) -> None:
    """Bits of one process that is given the same gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, whole = model_and_whole(mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])
    single, optimizer = (fusedopt.FusedAdamW(m.parameters(), **CLIPPED) for m in (whole, model))
    placements = {type(each) for p in model.parameters() for each in p.placements}
    assert _StridedShard in placements
    assert {part(model.up.weight).shape[0], part(model.up.bias).shape[0]} <= {2, 3}
    for step in range(3):
        x = randn((2, 6, 8), 2 * step + rank // 2)
        out = model(x[:, 3 * (rank % 2) :][:, :3])
        part(out).square().mean().backward()
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert p.grad._spec is p._spec
            q.grad = p.grad.full_tensor()
        with collectives() as called:
            optimizer.step()
        assert called == ["allreduce_"], called
        single.step()
        alike_everywhere(optimizer.grad_norm, optimizer.clip_coef)
        assert_rational(optimizer.grad_norm, [q.grad for q in whole.parameters()])
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert_same_bits(p.full_tensor(), q, name)
            for key, value in single.state[q].items():
                own = optimizer.state[p][key]
                assert_same_bits(own if key == "step" else own.full_tensor(), value, key)
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("world", "check"), [(2, sequence_parallel), (4, fsdp_over_tensor_parallelism)]
)
def test_parallel_model(world: int, check: Any) -> None:
    ranks.run(world, check)
