"""Ranks that are processes, with groups of torch.distributed: gloo everywhere, NCCL on GPUs.

One process may be a group by itself, too. Then NCCL needs only one GPU, and no step of ours waits.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_helpers
import pytest
import ranks
import torch
import torch.distributed as dist
from cases import CHUNK
from gpu_helpers import (
    RUNNERS,
    backend,
    by_speed,
    captured,
    device,
    device_work,
    no_sync,
    real,
    runners,
    synchronize,
)
from gpu_ranks import share
from gpu_runs import Run, assert_runs_agree, started
from harness import FUSED, make_param, randn
from tolerances import assert_same_bits
from torch import Tensor

from fusedopt.plan.exchange import Ranks

runner = runners()

STEPS, INF_AT, FAILS_AT = 6, 2, 4
OPTIONS = {"lr": 0.1, "weight_decay": 0.1, "max_grad_norm": 1.0, "skip_nonfinite": True}


# ---- two processes ------------------------------------------------------------------------------


def at_work(name: str) -> Any:
    """In a process of its own what the fixture does in the tests' process."""
    gpu_helpers._at_work = next(one for one in RUNNERS if one.name == name)
    if name == "shim":
        import cuda_shim

        return cuda_shim.installed()
    if name == "interpreter":
        import triton_interpreter

        return triton_interpreter.installed()
    return contextlib.nullcontext()


def values_of(rank: int) -> list[Tensor]:
    lengths = [[17, by_speed(CHUNK + 5, CHUNK + 5, 40), 0], [300, 9, 33]][rank]
    return [randn(n, 10 * rank + k) for k, n in enumerate(lengths)]


def grads_at(step: int, rank: int) -> list[Tensor]:
    grads = [randn(v.numel(), 50 * step + 10 * rank + k) for k, v in enumerate(values_of(rank))]
    if (step, rank) == (INF_AT, 1):
        grads[1][-1] = torch.inf
    return grads


def found(optimizer: Any, params: list[Tensor]) -> list[Tensor]:
    """Bits of params and states, and what is the same on all ranks."""
    states = [t for p in params for t in optimizer.state[p].values()]
    results = [optimizer.grad_norm, optimizer.clip_coef, optimizer.skipped_steps]
    return [t.detach().cpu().clone() for t in (*results, *params, *states)]


def launched(step: Callable[[], Any], folder: Path) -> list[str]:
    """Kernels of a step, by verb or as "nccl"; gloo copies the words."""
    kinds = ("nccl", "reduce", "finalize", "update", "Memcpy")
    names = device_work(step, folder)
    found = [next((kind for kind in kinds if kind in name), name) for name in names]
    return [kind for kind in found if kind != "Memcpy"]


def some_steps(
    rank: int, name: str, kind: str, folder: str
) -> tuple[list[Tensor], list[str], list[str]]:
    """Steps over own parameters; rank 1 has an inf in one step, and fails in another. One more step
    is only for its launches."""
    with at_work(name):
        where = device()
        group = dist.group.WORLD
        if kind == "nccl":
            where = torch.device("cuda", rank)
            torch.cuda.set_device(where)
            group = dist.new_group(backend="nccl")
        params = [make_param(value.to(where)) for value in values_of(rank)]
        opt = FUSED["adamw"](params, backend=backend(), norm_group=group, **OPTIONS)
        errors = []
        for step in range(STEPS):
            for param, grad in zip(params, grads_at(step, rank), strict=True):
                param.grad = grad.to(where)
            if (step, rank) == (FAILS_AT, 1):
                params[0].grad = params[0].detach().to_sparse()
            synchronize()  # what a device has to tell of the step before is told by now
            try:
                opt.step()
            except RuntimeError as error:
                errors.append(str(error))
        synchronize()
        assert opt.backend == {str(where): backend()}
        return found(opt, params), errors, launched(opt.step, Path(folder, f"rank{rank}"))


def alone() -> list[list[Tensor]]:
    """What each rank has to find: one process with all parameters, for which no step fails."""
    values = [values_of(rank) for rank in range(2)]
    params = [[make_param(value.clone()) for value in own] for own in values]
    opt = FUSED["adamw"]([p for own in params for p in own], backend="cpu", **OPTIONS)
    for step in range(STEPS):
        for rank, own in enumerate(params):
            for param, grad in zip(own, grads_at(step, rank), strict=True):
                param.grad = grad
        if step != FAILS_AT:
            opt.step()
    return [found(opt, own) for own in params]


@pytest.mark.parametrize("kind", ["gloo", "nccl"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    """One norm and one skip, to the bit; a rank that fails, and another that hears of it."""
    if kind == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL between two processes needs two GPUs")
    if kind == "nccl" and not real():
        pytest.skip("NCCL serves no stand-in")
    for rank in range(2):
        Path(tmp_path, f"rank{rank}").mkdir()
    answers = ranks.run(2, some_steps, gpu_helpers._at_work.name, kind, str(tmp_path))
    message = ["nccl"] if kind == "nccl" else []
    for rank, expected in enumerate(alone()):
        own, errors, launches = answers[rank]
        for k, (ours, theirs) in enumerate(zip(own, expected, strict=True)):
            assert_same_bits(ours, theirs, f"rank {rank}, tensor {k}")
        words = "sparse" if rank == 1 else "another rank refused this step"
        assert len(errors) == 1 and words in errors[0], errors
        assert launches == ["reduce", *message, "finalize", "update"]


PLACES = ("shard", "shard", "replicate")


def whole(step: int | None) -> list[Tensor]:
    """Values of the parameters, or the gradients of a step."""
    seed = 1 if step is None else 20 * step + 30
    return [randn(shape, seed + k) for k, shape in enumerate([(7, 3), (1,), (5,)])]


def sharded_steps(rank: int, name: str) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    with at_work(name):
        if real():
            torch.cuda.set_device(device())
        mesh = init_device_mesh(device().type, (2,))
        places = [Shard(0) if place == "shard" else Replicate() for place in PLACES]

        def part(values: list[Tensor], k: int) -> DTensor:
            own = values[k].to(device())
            return distribute_tensor(own, mesh, [places[k]], src_data_rank=None)

        params = [make_param(part(whole(None), k)) for k in range(len(places))]
        opt = FUSED["adamw"](params, backend=backend(), **OPTIONS)
        for step in range(3):
            for k, param in enumerate(params):
                param.grad = part(whole(step), k)
            opt.step()
        return [t.detach().cpu() for t in (opt.grad_norm, *(p.to_local() for p in params))]


def test_dtensors_of_two_processes() -> None:
    """An empty shard, and a replica that counts once. The norm is that of the whole gradients."""
    params = [make_param(value) for value in whole(None)]
    opt = FUSED["adamw"](params, backend="cpu", **OPTIONS)
    for step in range(3):
        for param, grad in zip(params, whole(step), strict=True):
            param.grad = grad
        opt.step()
    answers = ranks.run(2, sharded_steps, gpu_helpers._at_work.name)
    assert_same_bits(answers[0][0], answers[1][0], "norm")
    for rank, (norm, *own) in enumerate(answers):
        torch.testing.assert_close(norm, opt.grad_norm, rtol=1e-6, atol=0)
        for place, ours, param in zip(PLACES, own, params, strict=True):
            theirs = param.detach()
            if place == "shard":
                parts = theirs.chunk(2)
                theirs = parts[rank] if rank < len(parts) else theirs[:0]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# ---- a group of one -----------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Each optimizer with a gradient scaler or a clip exchanges words with itself; gives them."""
    if real():
        torch.cuda.set_device(device())
    name, store = "nccl" if real() else "gloo", f"file://{tmp_path}/store"
    dist.init_process_group(name, init_method=store, rank=0, world_size=1)
    messages: list[Tensor] = []
    all_reduce = dist.all_reduce

    def counted(words: Tensor, *arguments: Any, **options: Any) -> Any:
        messages.append(words)
        return all_reduce(words, *arguments, **options)

    monkeypatch.setattr(dist, "all_reduce", counted)
    yield messages
    gc.collect()  # NCCL waits for graphs that hold its communicator
    dist.destroy_process_group()


def in_a_group(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    own = run.params[0]
    given = Ranks(dist.group.WORLD, frozenset(), False, True)
    share(monkeypatch, lambda param: given if param is own else None)
    run.opt._shared.drop_plans()


@pytest.mark.parametrize("scaler", [None, "ours"])
def test_a_group_of_one(
    scaler: str | None, one_rank: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of a process without a group, whose step has a launch and a message less."""
    run, plain = (started("adamw", scaler) for _ in range(2))
    in_a_group(monkeypatch, run)
    for step in range(4):
        for each in (run, plain):
            each.feed(step + 5, torch.inf if step == 2 and scaler else None)
            each.iteration(set_to_none=False)
        assert_runs_agree(run, plain, f"step {step}")
    assert len(one_rank) == 4

    assert launched(plain.opt.step, tmp_path) == ["reduce", "update"]
    assert launched(run.opt.step, tmp_path) == ["reduce", "finalize", "update"]
    assert len(one_rank) == 5


def test_a_message_makes_nobody_wait(
    one_rank: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain = (started("adamw", None) for _ in range(2))
    in_a_group(monkeypatch, run)
    for each in (run, plain):
        each.step()  # makes the communicator, and the plan
    with no_sync():
        for _ in range(3):
            run.step()
    for _ in range(3):
        plain.step()
    assert_runs_agree(run, plain, "with and without a message")
    assert len(one_rank) == 4


@pytest.mark.parametrize("scaler", [None, "ours"])
def test_a_message_in_a_graph(
    scaler: str | None, one_rank: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays, and eager steps between them, do what eager steps do."""
    run, plain = (Run("adamw", scaler) for _ in range(2))
    in_a_group(monkeypatch, run)
    for each in (run, plain):
        each.feed(0)
    replay = captured(run.iteration, 2)
    for _ in range(2):
        plain.iteration()
    for step in range(6):
        for each in (run, plain):
            each.feed(step, torch.inf if step == 3 and scaler else None)
        if step == 4:
            run.iteration(set_to_none=False)
        else:
            replay()
        plain.iteration()
        assert_runs_agree(run, plain, f"step {step}")
