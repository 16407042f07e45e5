"""What the host code of the CUDA backend launches: how often, where, and on what grid."""

from __future__ import annotations

import itertools
import mmap
from typing import Any

import cuda_shim
import pytest
import torch
from cases import CHUNK, FULL_CASES, adamw
from conftest import require_cpu_backend
from cuda_twins import RUN_LENGTHS, ShimTwins
from gpu_twins import grads_like
from harness import randn
from torch import Tensor

import fusedopt
from fusedopt.backends import cuda

PAYLOAD = 3840  # kPayloadBytes

_shim = pytest.fixture(cuda_shim.fixture)


@pytest.fixture(autouse=True)
def shim(_shim: cuda_shim.CudaShim) -> cuda_shim.CudaShim:
    require_cpu_backend()
    return _shim


def named(shim: cuda_shim.CudaShim) -> list[tuple[str, cuda_shim.Launch]]:
    return [(e.kernel.partition("<")[0].removesuffix("_kernel"), e) for e in shim.launches()]


def kernels(shim: cuda_shim.CudaShim) -> list[str]:
    """Since the last look."""
    names = [name for name, _ in named(shim)]
    shim.reset()
    return names


def fixed_grads(twins: ShimTwins) -> None:
    twins.give(grads_like(twins.params, 0))


@pytest.mark.parametrize("lengths", [[5], [300] * 40, [1] * 700, [0], [CHUNK * 6]], ids=len)
@pytest.mark.parametrize("n_groups", [1, 3])
def test_two_launches_a_step(shim: cuda_shim.CudaShim, lengths: list[int], n_groups: int) -> None:
    table = n_groups * (64 + len(lengths) * 16 + 64)  # options, addresses, numbers on the device
    most = -(-table // PAYLOAD)
    for case in FULL_CASES:
        groups = [
            {**case.hyper, "params": [randn(n, n + k) for n in lengths]} for k in range(n_groups)
        ]
        twins = ShimTwins(case.rule, groups, **case.common)
        fixed_grads(twins)
        twins.opt.step()
        kernels(shim)
        for _ in range(3):
            twins.opt.step()
            assert kernels(shim) == ["reduce", "update"]
        moved = [p.grad.clone() for p in twins.params]  # held, so that none is where it was
        for param, grad in zip(twins.params, moved, strict=True):
            param.grad = grad
        twins.opt.step()
        launched = kernels(shim)
        assert launched[-2:] == ["reduce", "update"]
        assert launched[:-2] == ["write"] * len(launched[:-2]) and len(launched) <= most + 2
        assert len(launched) > 2 or sum(lengths) == 0
        twins.opt.param_groups[0]["lr"] = 0.123
        twins.opt.step()
        assert kernels(shim) == ["write", "reduce", "update"]


def test_launches_when_nobody_asks_for_a_norm(shim: cuda_shim.CudaShim) -> None:
    twins = ShimTwins.of_lengths(adamw("default"), [300, 5])
    fixed_grads(twins)
    twins.opt.step()
    kernels(shim)
    twins.opt.step()
    assert kernels(shim) == ["finalize", "update"]


def test_device_and_stream_of_the_caller(
    shim: cuda_shim.CudaShim, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = cuda.driver()
    monkeypatch.setattr(driver, "index", lambda device: 2, raising=False)
    monkeypatch.setattr(driver, "stream", lambda device: 0x1230, raising=False)
    shim.set(devices=3)
    twins = ShimTwins.of_lengths(FULL_CASES[0], [300])
    for step in range(3):
        twins.step(grads_like(twins.params, step))
        twins.check()
        assert shim.current_device() == 0
    assert {(launch.device, launch.stream) for launch in shim.launches()} == {(2, 0x1230)}


def test_a_captured_step_writes_its_table(
    shim: cuda_shim.CudaShim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does every one after it: a replay may have put back what was captured."""
    twins = ShimTwins.of_lengths(FULL_CASES[0], [300, 7])
    fixed_grads(twins)
    twins.opt.step()
    twins.opt.step()
    kernels(shim)
    driver = cuda.driver()
    monkeypatch.setattr(driver, "capturing", lambda device: True, raising=False)
    twins.opt.step()
    monkeypatch.undo()
    twins.opt.step()
    assert kernels(shim) == ["write", "reduce", "update"] * 2


@pytest.mark.parametrize("processors", [1, 3, 7])
@pytest.mark.parametrize(
    "schedule",
    [dict(threads_descending=1), dict(blocks_descending=1), dict(host_threads=3)],
    ids=lambda schedule: next(iter(schedule)),
)
def test_grid_and_schedule_leave_no_trace(
    shim: cuda_shim.CudaShim, processors: int, schedule: dict[str, int]
) -> None:
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.bfloat16)):
        shim.set(processors=processors, blocks_per_processor=1, **schedule)
        ShimTwins.of_lengths(case, RUN_LENGTHS, dtype).run(steps=2)


def paged(value: float, n: int = 1) -> Tensor:
    """A tensor on a page of its own."""
    return torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.float32)[:n].fill_(value)


def guard(shim: cuda_shim.CudaShim, tensor: Tensor) -> None:
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    last = (tensor.data_ptr() + max(tensor.nbytes, 1)) // mmap.PAGESIZE
    if tensor.nbytes <= 32:  # paged
        last = first + 1
    assert last > first, "no whole page in it"
    shim.guard(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def test_the_host_leaves_device_memory_alone(shim: cuda_shim.CudaShim) -> None:
    """What it read there would be what an earlier step left, or have to be waited for."""
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.bfloat16)):
        twins = ShimTwins.of_lengths(case, [3 * CHUNK, 3 * CHUNK + 5], dtype)
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


SECOND = torch.device("cpu", 1)


class OnSecond(Tensor):
    """A tensor that says it is on another device. Those that torch makes there are on the CPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return SECOND


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_several_devices(
    shim: cuda_shim.CudaShim, monkeypatch: pytest.MonkeyPatch, norm_type: float
) -> None:
    """One norm and one decision, three launches on each. Whole numbers: any order sums the same."""
    complete_rows = fusedopt.optimizer.complete_rows

    def rows_on_two_devices(rows: list[Any], *arguments: Any) -> Any:
        new = complete_rows(rows, *arguments)
        for row in rows[1::2] if rows[0].param is twins.params[0] else []:
            row.dense = row.dense.as_subclass(OnSecond)
        return new

    monkeypatch.setattr(fusedopt.optimizer, "complete_rows", rows_on_two_devices)
    monkeypatch.setattr(cuda.driver(), "index", lambda device: device.index or 0, raising=False)
    shim.set(devices=2)
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.bfloat16)):
        twins = ShimTwins.of_lengths(case, [300, CHUNK + 9, 5, 700], dtype, norm_type=norm_type)
        for step in range(4):
            grads = [g.sign() * (1 + k) for k, g in enumerate(grads_like(twins.params, step))]
            if step == 2:
                grads[3][-1] = float("inf")  # seen on one, skipped on both
            shim.reset()
            shim.set(devices=2)
            twins.step(grads)
            twins.check()
            launches = [(k, launch.device) for k, launch in named(shim) if k != "write"]
            assert sorted(launches[:2]) == [("reduce", 0), ("reduce", 1)]
            assert sorted(launches[2:4]) == [("finalize", 0), ("finalize", 1)]
            assert sorted(launches[4:]) == [("update", 0), ("update", 1)]
        assert twins.opt.skipped_steps == 1
