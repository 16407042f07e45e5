"""Parameters and gradients of DTensors that no step can use: refused before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
from sharded import INF, Twins, Whole, remedies
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from fusedopt import FusedAdamW

ROWS = [Shard(0)]


def two_tensor(*shape: int) -> Any:
    """Such as float8 or NF4: its values are not in its memory."""
    return TwoTensor(torch.ones(shape), torch.ones(shape))


def refusals(rank: int) -> None:
    """Each on all ranks, before anything moves; and the line in the message helps."""
    mesh = init_device_mesh("cpu", (2,))

    def refused(param: Any, words: str, error: type[Exception], fails: Callable[[], Any]) -> None:
        with pytest.raises(error, match=words) as caught:
            fails()
        for line in remedies(caught.value)[:1]:
            names = {"torch": torch, "param": param, "optimizer": None}
            exec(line, names)
            param = names["param"]
        FusedAdamW([param], max_grad_norm=INF).step()

    twins = Twins(mesh, [Whole((5, 3), ROWS)])
    p = twins.params[0]
    twins.give(0)
    p.grad_dtype = None
    grad = p.grad
    p.grad = None
    with torch._C.DisableTorchFunctionSubclass():
        p.grad = torch.ones(5, 3)
    refused(
        p,
        "gradient is a Tensor and the parameter a Parameter|gradient is a Tensor",
        RuntimeError,
        twins.optimizer.step,
    )
    assert not twins.optimizer.state
    # The gradient of before the parameter was moved to another mesh.
    other = init_device_mesh("cpu", (1, 2))
    p.grad = distribute_tensor(torch.ones(5, 3), other, [Replicate(), Shard(0)], src_data_rank=None)
    refused(p, "clear it after resharding", RuntimeError, twins.optimizer.step)
    p.grad = grad
    # Float8, NF4 and the like keep values elsewhere than in their memory.
    inner = DTensor.from_local(two_tensor(3), mesh, ROWS, run_check=False)
    wrapped = torch.nn.Parameter(inner)
    with pytest.raises(
        TypeError, match=r"param 0 of group 0.*TwoTensor is not supported, its memory"
    ):
        FusedAdamW([wrapped])
    p._local_tensor = two_tensor(3 - rank, 3)
    with pytest.raises(RuntimeError, match=r"param 0 of group 0.*TwoTensor is not supported"):
        twins.optimizer.step()
    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    refused(partial, "partial sum", TypeError, lambda: FusedAdamW([partial]))


def test_what_is_refused() -> None:
    ranks.run(2, refusals)
