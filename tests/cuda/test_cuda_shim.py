"""What only the shim shows of the CUDA backend: grids and schedules, every launch with its device
and stream, memory that the host must leave alone."""

from __future__ import annotations

import itertools
import mmap

import pytest
import torch
from cases import (
    CHUNK,
    FLOATS,
    FULL_CASES,
)
from cuda_shim import CudaShim, Launch
from gpu_helpers import runners, two_devices
from gpu_twins import Twins, grads_like
from harness import make_param, randn
from tolerances import assert_same_bits
from torch import Tensor

import fusedopt
from fusedopt.backends import cpu, cuda, device, records

shim = runners("shim")

PAYLOAD = 3840  # kPayloadBytes
FEW_LENGTHS = [0, 7, 256, 300, CHUNK + 9, 1, 260]


def named(shim: CudaShim) -> list[tuple[str, Launch]]:
    """The launches since the last look, by their verbs."""
    names = [(e.kernel.partition("<")[0].removesuffix("_kernel"), e) for e in shim.launches()]
    shim.reset()
    return names


def verbs(shim: CudaShim) -> list[str]:
    return [name for name, _ in named(shim)]


# ---- launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5], [300] * 40, [1] * 700, [0]], ids=len)
@pytest.mark.parametrize("n_groups", [1, 3])
def test_pages_of_the_table(shim: CudaShim, lengths: list[int], n_groups: int) -> None:
    """Only what has changed is written, in no more launches than it has pages."""
    table = n_groups * (64 + len(lengths) * 16 + 64)  # options, addresses, numbers on the device
    most = -(-table // PAYLOAD)
    for case in FULL_CASES if len(lengths) < 100 else FULL_CASES[:1]:
        groups = [
            {**case.hyper, "params": [randn(n, n + k) for n in lengths]} for k in range(n_groups)
        ]
        twins = Twins(case.rule, groups, **case.common)
        twins.step(grads_like(twins.params, 0))
        verbs(shim)
        moved = [p.grad.clone() for p in twins.params]  # held, so that none is where it was
        for param, grad in zip(twins.params, moved, strict=True):
            param.grad = grad
        twins.opt.step()
        launched = verbs(shim)
        assert launched[-2:] == ["reduce", "update"]
        assert launched[:-2] == ["write"] * len(launched[:-2]) and len(launched) <= most + 2
        assert len(launched) > 2 or sum(lengths) == 0
        twins.opt.param_groups[0]["lr"] = 0.123
        twins.opt.step()
        assert verbs(shim) == ["write", "reduce", "update"]


def test_device_and_stream_of_the_caller(shim: CudaShim, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = cuda.driver()
    monkeypatch.setattr(driver, "index", lambda device: 2, raising=False)
    monkeypatch.setattr(driver, "stream", lambda device: 0x1230, raising=False)
    shim.set(devices=3)
    twins = Twins.of_lengths(FULL_CASES[0], [300])
    twins.run()
    assert shim.current_device() == 0
    assert {(launch.device, launch.stream) for launch in shim.launches()} == {(2, 0x1230)}


def test_each_device_launches_for_itself(shim: CudaShim, monkeypatch: pytest.MonkeyPatch) -> None:
    two_devices(monkeypatch)
    twins = Twins.of_lengths(FULL_CASES[0], [300, CHUNK + 9, 5, 700])
    twins.run(steps=1)
    found = [(verb, launch.device) for verb, launch in named(shim) if verb != "write"]
    assert found == list(itertools.product(("reduce", "finalize", "update"), (0, 1)))


def test_a_captured_step_writes_its_table(shim: CudaShim, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does every one after it: a replay may have put back what was captured."""
    twins = Twins.of_lengths(FULL_CASES[0], [300, 7])
    twins.give(grads_like(twins.params, 0))
    twins.opt.step()
    twins.opt.step()
    verbs(shim)
    with monkeypatch.context() as during:
        during.setattr(cuda.driver(), "capturing", lambda device: True, raising=False)
        twins.opt.step()
    twins.opt.step()
    assert verbs(shim) == ["write", "reduce", "update"] * 2


@pytest.mark.parametrize(
    "schedule",
    [dict(threads_descending=1), dict(blocks_descending=1), dict(host_threads=3)],
    ids=lambda schedule: next(iter(schedule)),
)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_grid_and_schedule_leave_no_trace(
    shim: CudaShim, schedule: dict[str, int], norm_type: float
) -> None:
    lengths = [*FEW_LENGTHS, CHUNK * 9 + 1, *range(300, 360)]  # 79 chunks, eight warps a block
    dtypes = itertools.cycle(FLOATS)
    grids = zip(((1, 1), (1, 3), (7, 1), (9, 8)), itertools.cycle(FULL_CASES), strict=False)
    for (processors, blocks), case in grids:
        shim.reset()
        shim.set(processors=processors, blocks_per_processor=blocks, **schedule)
        twins = Twins.of(case, [randn(n, n, next(dtypes)) for n in lengths], norm_type=norm_type)
        twins.run(steps=2)
        used = [e.blocks for e in shim.launches() if e.kernel.startswith("reduce_kernel")]
        assert used == [min(processors * blocks, 10)] * 2


# ---- memory -------------------------------------------------------------------------------------


def paged(value: float, n: int = 1) -> Tensor:
    """A tensor on a page of its own."""
    return torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.float32)[:n].fill_(value)


def guard(shim: CudaShim, tensor: Tensor) -> None:
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    last = (tensor.data_ptr() + max(tensor.nbytes, 1)) // mmap.PAGESIZE
    if tensor.nbytes <= 32:  # paged
        last = first + 1
    assert last > first, "no whole page in it"
    shim.guard(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def test_the_host_leaves_device_memory_alone(shim: CudaShim) -> None:
    """What it read there would be what an earlier step left, or have to be waited for."""
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.bfloat16)):
        twins = Twins.of_lengths(case, [3 * CHUNK, 3 * CHUNK + 5], dtype)
        twins.opt._shared.scalars = paged(0.0, 8)
        twins.run(steps=1)  # states and masters are made by torch, which is the host here
        for step in range(1, 3):
            twins.give(grads_like(twins.params, step))
            twins.twin.grad_scale, twins.twin.found_inf = torch.tensor(3.0), torch.tensor(0.0)
            twins.twin.step()
            twins.opt.grad_scale, twins.opt.found_inf = small = paged(3.0), paged(0.0)
            states = [s for p in twins.params for s in twins.opt.state[p].values() if s.dim() > 0]
            grads = [p.grad for p in twins.params if p.grad is not None]
            for tensor in [twins.opt._shared.scalars, *small, *twins.params, *grads, *states]:
                guard(shim, tensor)
            twins.opt.step()
            shim.reset()
            twins.check()


def lazily_zero(n: int) -> Tensor:
    """bf16 zeros that take memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 2 * n, flags=flags), dtype=torch.bfloat16)


def test_more_elements_than_an_int_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last chunks of a tensor of 2^31 elements and more; the rest stays away."""
    n, near, far = 2**31 + 5000, slice(0, CHUNK), slice(-2 * CHUNK, None)
    for module in (cpu, device):
        chunks = records.chunk_table([n])
        few = torch.cat([chunks[:1], chunks[-3:]])
        monkeypatch.setattr(module, "chunk_table", lambda numels, few=few: few)
    params = [make_param(lazily_zero(n)) for _ in range(2)]
    grad = lazily_zero(n)
    grad[near], grad[far] = randn(CHUNK, 1, grad.dtype), randn(2 * CHUNK, 2, grad.dtype)
    for param, backend in zip(params, ("cuda", "cpu"), strict=True):
        param.grad = grad
        fusedopt.FusedSGD(
            [param], lr=0.5, master_weights=False, max_grad_norm=1.0, backend=backend
        ).step()
    for part in (near, far):
        assert params[0][part].any()
        assert_same_bits(params[0][part], params[1][part], str(part))


def test_carries_are_kept() -> None:
    """More chunks in one digit than it has bits to spare below the next: the word grows instead."""
    twins = Twins.of_lengths(FULL_CASES[1], [1] * 2500)
    twins.step([torch.full((1,), 2.0 - 2.0**-23)] * 2500)
    twins.check()
    (part,) = twins.opt._shared.plan.parts
    assert max(part.tensors["words"].view(torch.int64).tolist()) >= 2**32
