"""The group key ``replicated=``, and copies of an optimizer that had a ``norm_group``."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import ranks
import torch.distributed as dist
from harness import randn
from sharded import (
    INF,
    assert_rational,
    collectives,
    contents,
    helped,
    norm_of,
    refused,
    remedies,
    trained,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from fusedopt import FusedAdamW

ROWS = [Shard(0)]


def plain_beside_sharded(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    sharded, plain = randn((5, 3), 1), randn((4,), 2)
    mine = [randn((3,), 5 + each) for each in range(2)]

    def groups(second: Tensor, **key: Any) -> list[dict[str, Any]]:
        return [
            {"params": [("w", trained(sharded, mesh, ROWS))]},
            {"params": [("router", trained(second))], **key},
        ]

    optimizer, error = refused(groups(plain), "param 0 of group 1 ('router')", "plain tensor")
    assert_rational(helped(optimizer, error), [sharded, plain])
    # A plan of steps without a norm is none with one, and the line still helps.
    for key in (None, "both"):
        optimizer = FusedAdamW(groups(plain, replicated=key), max_grad_norm=None)
        optimizer.step()
        optimizer.max_grad_norm = INF
        with pytest.raises(
            RuntimeError, match=r"plain tensor beside|'both'; use True or False"
        ) as caught:
            optimizer.step()
        optimizer.param_groups[-1]["replicated"] = True
        assert_rational(helped(optimizer, caught.value), [sharded, plain])
    assert_rational(norm_of(groups(plain, replicated=True)), [sharded, plain])
    assert_rational(norm_of(groups(mine[rank], replicated=False)), [sharded, *mine])
    refused(groups(plain, replicated="yes"), "'router'", "replicated='yes'", "use True or False")
    # Frozen ones have no part in a step.
    frozen = groups(plain)
    frozen[1]["params"][0][1].requires_grad_(False).grad = None
    assert_rational(norm_of(frozen), [sharded])
    # An inf in the copy of a rank that does not count it is seen by all.
    given = groups(plain, replicated=True)
    if rank == 1:
        given[1]["params"][0][1].grad[0] = math.nan
    assert norm_of(given, skip_nonfinite=True).isnan()


def loaded(rank: int) -> None:
    """The key is of this run: one process has none, and another run may have had another."""
    mesh = init_device_mesh("cpu", (2,))
    sharded, plain = randn((5, 3), 1), randn((4,), 2)

    def optimizer_of(mesh: Any, placements: Any, **key: Any) -> Any:
        groups = [
            {"params": [trained(sharded, mesh, placements)]},
            {"params": [trained(plain)], **key},
        ]
        optimizer = FusedAdamW(groups, max_grad_norm=INF)
        optimizer.init_state()
        return optimizer

    for saved in (optimizer_of(None, None), optimizer_of(mesh, ROWS, replicated=False)):
        optimizer = optimizer_of(mesh, ROWS, replicated=True)
        optimizer.load_state_dict(saved.state_dict())
        optimizer.step()
        assert_rational(optimizer.grad_norm, [sharded, plain])
        assert [group.get("replicated") for group in optimizer.param_groups] == [None, True]
        copied = copy.deepcopy(optimizer)
        for group, own in zip(copied.param_groups, optimizer.param_groups, strict=True):
            group["params"][0].grad = own["params"][0].grad.clone()
        copied.step()
        assert_rational(copied.grad_norm, [sharded, plain])


@pytest.mark.parametrize("check", [plain_beside_sharded, loaded])
def test_plain_tensors_beside_dtensors(check: Any) -> None:
    ranks.run(2, check)


# ---- pickles and copies --------------------------------------------------------------------------


def pickled(optimizer: Any) -> Any:
    file = io.BytesIO()
    pickle.dump(optimizer, file)
    file.seek(0)
    return pickle.load(file)


def without_its_group(rank: int) -> None:
    """A group of processes is of this process: a copy has none, and does not go on without."""
    grad, world = randn((5, 3), 1 + rank), dist.group.WORLD
    for copied in (copy.deepcopy, pickled):
        optimizer = FusedAdamW([trained(grad)], max_grad_norm=INF, norm_group=world)
        optimizer.step()
        assert optimizer.norm_group is world, "the optimizer itself keeps its own"
        twice = copied(copied(optimizer))
        for p in twice.param_groups[0]["params"]:
            p.grad = grad.clone()
        before = contents(twice)
        twice.skip_nonfinite = True  # options can be set as ever
        with pytest.raises(RuntimeError, match="pickled or copied") as caught:
            twice.step()
        assert contents(twice) == before
        assert remedies(caught.value) == ["optimizer.norm_group = group"]
        exec(remedies(caught.value)[0], {"optimizer": twice, "group": world})
        with collectives() as called:
            twice.step()
        assert called == ["allreduce_"]
        assert_rational(twice.grad_norm, [randn((5, 3), 1 + each) for each in range(2)])
        again = copied(optimizer)
        again.norm_group = None  # from now on alone
        again.param_groups[0]["params"][0].grad = grad.clone()
        again.step()
        assert_rational(again.grad_norm, [grad])
        again = copied(optimizer)
        again.max_grad_norm = None
        again.param_groups[0]["params"][0].grad = grad.clone()
        again.step()


def test_copies_have_no_group() -> None:
    ranks.run(2, without_its_group)
