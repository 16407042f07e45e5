"""Parameters that are shards, or whose own shape says little: FSDP, ZeRO-3, DTensor, frozen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from param_group_helpers import names_without_decay
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import return_and_correct_aliasing

import fusedopt

CPU = torch.device("cpu")


class Model(nn.Module):
    """Every rule of param_groups once; the last layer's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.pos_embed = nn.Parameter(torch.randn(1, 3, 4))
        self.temperature = nn.Parameter(torch.ones(1))
        self.mark = nn.Parameter(torch.ones(3, 4))
        self.mark._no_weight_decay = True
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm((3, 8)), nn.Linear(8, 4))
        self.body[2].register_parameter("bias_k", nn.Parameter(torch.zeros(1, 1, 4)))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        marks = self.mark * self.temperature
        return self.head(self.body(self.embedding(x) + self.pos_embed + marks))


@pytest.fixture(params=[0, 1])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of two ranks whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    dist.destroy_process_group()


def fsdp(module: nn.Module, **options: object) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, **{"device_id": CPU, "use_orig_params": True} | options)


def names_of_fsdp(model: nn.Module, **options: bool) -> set[str]:
    return {
        name.replace("_fsdp_wrapped_module.", "") for name in names_without_decay(model, **options)
    }


def nested(model: Model) -> nn.Module:
    model.body[0] = fsdp(model.body[0])
    model.body = fsdp(model.body)
    return fsdp(model)


def in_part(model: Model) -> nn.Module:
    model.body = fsdp(model.body)
    return model


def replicated(model: Model) -> nn.Module:
    return fsdp(model, sharding_strategy=ShardingStrategy.NO_SHARD)


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:FutureWarning")
@pytest.mark.parametrize("decay_embeddings", [True, False])
@pytest.mark.parametrize("shard", [fsdp, nested, in_part, replicated])
def test_fsdp1_decides_as_for_the_whole_model(
    rank: int, shard: Callable[[Model], nn.Module], decay_embeddings: bool
) -> None:
    expected = names_without_decay(Model(), decay_embeddings=decay_embeddings)
    model = shard(Model())
    assert names_of_fsdp(model, decay_embeddings=decay_embeddings) == expected
    assert ("embedding.weight" in expected) is not decay_embeddings


def test_fsdp1_of_a_parametrized_weight(rank: int) -> None:
    model = parametrizations.orthogonal(nn.Linear(4, 4))
    expected = names_without_decay(model)
    assert names_of_fsdp(fsdp(model)) == expected == {"bias"}


def test_a_flat_parameter_is_refused_and_its_remedy_helps(rank: int) -> None:
    model = nn.Sequential(fsdp(Model(), use_orig_params=False))
    with pytest.raises(
        ValueError, match=r"'0\._fsdp_wrapped_module\._flat_param' .*use_orig_params=True\)"
    ):
        fusedopt.param_groups(model, 0.1)
    assert names_of_fsdp(fsdp(Model(), use_orig_params=True)) == names_without_decay(Model())


def test_a_module_inside_fsdp1_is_refused_and_its_remedy_helps(rank: int) -> None:
    model = fsdp(Model())
    with pytest.raises(
        ValueError, match=r"'0\.weight' .*give param_groups the FullyShardedDataParallel model"
    ):
        fusedopt.param_groups(model.module.body, 0.1)
    names_without_decay(model)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_a_frozen_fsdp1_model_is_never_refused(rank: int, use_orig_params: bool) -> None:
    model = fsdp(Model().requires_grad_(False), use_orig_params=use_orig_params)
    names_without_decay(model)
    names_without_decay(model.module)


def test_dtensors_have_the_whole_shape(rank: int) -> None:
    expected = names_without_decay(model := Model()) - {"mark"}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))  # drops attributes of parameters
    assert names_without_decay(model) == expected
    assert model.embedding.weight.to_local().ndim == 2


def test_a_tensor_parallel_weight_has_the_whole_shape(rank: int) -> None:
    model = nn.Linear(4, 4)
    whole = distribute_tensor(model.weight, init_device_mesh("cpu", (2,)), [Shard(1)])
    model.weight = nn.Parameter(whole)
    assert names_without_decay(model) == {"bias"}


def test_zero3_parameters_are_judged_by_their_whole_shape() -> None:
    """DeepSpeed leaves an empty tensor and keeps the shape in `ds_shape`."""
    expected = names_without_decay(Model())
    for param in (model := Model()).parameters():
        param.ds_shape = param.shape
        param.data = torch.empty(0)
    assert names_without_decay(model) == expected


def test_the_scale_of_a_parametrized_weight_counts_as_the_weight() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 2, bias=False), dim=None)
    assert model.parametrizations.weight.original0.ndim == 0
    assert names_without_decay(model) == set()


class Wrapper(torch.Tensor):
    """As torchao's: the shape of the weight, the data in a tensor of another one."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, shape: tuple[int, ...]) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, shape: tuple[int, ...]) -> None:
        self.packed = data

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(f"{func}: its values are not asked for")
        copy = cls(args[0].packed, tuple(args[0].shape))
        return return_and_correct_aliasing(func, args, kwargs or {}, copy)


def freed() -> torch.Tensor:
    tensor = torch.ones(4, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


FROZEN: dict[str, Callable[[], torch.Tensor]] = {
    "uint8": lambda: torch.ones(4, 4, dtype=torch.uint8),
    "int8": lambda: torch.ones(4, 4, dtype=torch.int8),
    "bool": lambda: torch.ones(4, 4, dtype=torch.bool),
    "float8": lambda: torch.ones(4, 4).to(torch.float8_e4m3fn),
    "NF4": lambda: torch.ones(8, 1, dtype=torch.uint8),
    "complex": lambda: torch.ones(4, 4, dtype=torch.complex64),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(4, 4, device="meta"),
    "expanded": lambda: torch.ones(()).expand(4, 4),
    "freed": freed,
    "wrapper": lambda: Wrapper(torch.ones(8, dtype=torch.uint8), (4, 4)),
}


@pytest.mark.filterwarnings("ignore:.*(CSR|quantize):UserWarning")
@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_weights_of_any_kind_stay_in_their_group(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(FROZEN[kind](), requires_grad=False)
    assert names_without_decay(model) == {"0.bias", "1.bias"}


def test_frozen_views_of_one_memory_stay_two_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[0].weight.data = model[1].weight.data
    assert names_without_decay(model) == {"0.bias", "1.bias"}


def test_a_frozen_lazy_parameter_is_judged_by_its_owner_and_name() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    for param in model.parameters():
        param.requires_grad = False
    lazily = names_without_decay(model)
    model(torch.zeros(2, 2))
    assert lazily == names_without_decay(model) == {"0.bias", "1.weight", "1.bias"}


def test_fsdp1_trains_like_the_whole_model(tmp_path: Path) -> None:
    """Two processes: groups before and after a step, and what two steps of them make."""
    command = [sys.executable, __file__, str(tmp_path / "store")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def train(model: nn.Module) -> None:
    optimizer = fusedopt.FusedAdamW(fusedopt.param_groups(model, 0.5), lr=0.1)
    x = torch.arange(6).reshape(2, 3)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def of_one_rank(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    expected = Model()
    torch.manual_seed(0)
    model = nested(Model())
    train(expected)
    train(model)
    assert names_of_fsdp(model) == names_without_decay(expected)
    with FullyShardedDataParallel.summon_full_params(model):
        for param, twin in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(param.detach(), twin.detach())
        assert names_of_fsdp(model) == names_without_decay(expected)
    dist.barrier()


if __name__ == "__main__":
    other_rank = os.fork()  # which need not import all this once more
    of_one_rank(sys.argv[1], 0 if other_rank else 1)
    failed = other_rank and os.waitpid(other_rank, 0)[1]
    os._exit(1 if failed else 0)  # gloo's threads sometimes abort a process that exits as usual
