"""``norm_bits="exact"`` across ranks: any sharding has the norm of one process, to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor

import fusedopt
from fusedopt.backends.records import DIGITS

SHAPES = ((5, 3), (1000, 7), (1,), (3, 17))  # of which no shard ends where a chunk does
BACKENDS = ("cpu", "reference")
Norm = tuple[int, int, int]  # of a step: the digits as one number; bits of norm and coefficient


def grads() -> list[Tensor]:
    """With many exponents: the sums of chunks of fp32 lanes would round otherwise in each shard."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for shape in SHAPES:
        exponents = torch.randint(-30, 3, shape, generator=generator)
        found.append(torch.ldexp(torch.randn(shape, generator=generator), exponents))
    return found


def measured(params: list[Any], own: list[Any], backend: str, **options: Any) -> Any:
    options = {"norm_bits": "exact", "max_grad_norm": 0.25, **options}
    opt = fusedopt.FusedSGD(params, lr=0.1, backend=backend, **options)
    for param, grad in zip(params, own, strict=True):
        param.grad = grad
    opt.step()
    return opt


def norm_of(opt: Any) -> Norm:
    words = 0
    if "cpu" in opt.backend.values():
        digits = opt._shared.plan._tables["words"][:DIGITS].tolist()
        words = sum(digit << 32 * d for d, digit in enumerate(digits))
    bits = torch.stack([opt.grad_norm, opt.clip_coef]).view(torch.int32).tolist()
    return words, bits[0], bits[1]


def alone(backend: str, **options: Any) -> Norm:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    return norm_of(measured(params, grads(), backend, **options))


def sharded(mesh: Any, placements: Any, backend: str, **options: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    params = [
        torch.nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, placements))
        for shape in SHAPES
    ]
    own = [distribute_tensor(grad, mesh, placements) for grad in grads()]
    return measured(params, own, backend, **options)


def norms_of_shards(rank: int, world: int) -> list[Norm]:
    """By backend; the last without the option."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (world,))
    found = [norm_of(sharded(mesh, [Shard(0)], backend)) for backend in BACKENDS]
    return [*found, norm_of(sharded(mesh, [Shard(0)], "cpu", norm_bits=None))]


@pytest.mark.parametrize("world", [2, 3])
def test_unaligned_shards(world: int, cpu_backend: str) -> None:
    found = ranks.run(world, norms_of_shards, world)
    expected = [alone(backend) for backend in BACKENDS]
    assert expected[0][1:] == expected[1][1:], "the backends differ"
    for own in found:
        assert own[:-1] == expected
        assert own[-1] == found[0][-1]
    assert found[0][-1][0] != alone("cpu", norm_bits=None)[0], "the test has no power"


def norms_of_replicas(rank: int) -> list[Norm]:
    """HSDP; and with an inf or a NaN in one replica alone, which does not count."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    placements = [Replicate(), Shard(0)]
    found = [norm_of(sharded(mesh, placements, backend)) for backend in BACKENDS]
    for backend in BACKENDS:
        opt = sharded(mesh, placements, backend, skip_nonfinite=True)
        for bad in (math.inf, math.nan):
            if rank == 3:
                opt.param_groups[0]["params"][1].grad._local_tensor[0, 0] = bad
            opt.step()
            assert opt.grad_norm.isnan().item() == math.isnan(bad)
            assert not opt.grad_norm.isfinite().item()
        assert opt.skipped_steps.item() == 2
    return found


def test_a_replica_counts_once(cpu_backend: str) -> None:
    expected = [alone(backend) for backend in BACKENDS]
    for own in ranks.run(4, norms_of_replicas):
        assert own == expected


def different_bits(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2,))
    try:
        sharded(mesh, [Shard(0)], "cpu", norm_bits="exact" if rank else None)
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_have_the_same_option(cpu_backend: str) -> None:
    for text in ranks.run(2, different_bits):
        assert "the ranks' options differ" in text
