"""The CUDA runtime of tests/cuda_shim: kernels with known answers, and mistakes it has to see.

Data races are ThreadSanitizer's business (.ci/shim_sanitizers); here they show as wrong results,
because a warp runs as far as it can before another does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import cuda_shim
import pytest
import torch
from torch import Tensor

INVALID_CONFIGURATION, MISALIGNED, LAUNCH_FAILURE = 9, 716, 719
ILLEGAL_ADDRESS = 700
SCHEDULES = [
    dict(threads_descending=t, blocks_descending=b, host_threads=h)
    for t, b, h in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 3), (0, 0, 5)]
]


@pytest.fixture(scope="module")
def library() -> cuda_shim.Shim:
    try:
        return cuda_shim.Shim(cuda_shim.build("self_test", [cuda_shim.SELF_TEST]))
    except cuda_shim.NoShim as reason:
        pytest.skip(str(reason))


@pytest.fixture
def shim(library: cuda_shim.Shim) -> Iterator[cuda_shim.Shim]:
    library.reset()
    yield library
    library.reset()


def address(tensor: Tensor, offset: int = 0) -> ctypes.c_void_p:
    pointer = ctypes.c_void_p(tensor.data_ptr() + offset)
    pointer.tensor = tensor  # lives as long
    return pointer


def ints(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int32)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_block_sum(shim: cuda_shim.Shim, schedule: dict[str, int]) -> None:
    shim.set(**schedule)
    for blocks in (1, 2, 7):
        data, sums = torch.arange(blocks * 256, dtype=torch.int32), ints(blocks)
        assert shim.functions.sum(address(data), address(sums), blocks, 0) == 0
        assert sums.tolist() == data.view(blocks, 256).sum(1).tolist()


@pytest.mark.parametrize("missing", [1, 2])
def test_missing_barrier_gives_wrong_sums(shim: cuda_shim.Shim, missing: int) -> None:
    data, right = torch.arange(1024, dtype=torch.int32), []
    for descending in (0, 1):
        shim.set(threads_descending=descending)
        sums = ints(4)
        assert shim.functions.sum(address(data), address(sums), 4, missing) == 0
        right.append(sums.tolist() == data.view(4, 256).sum(1).tolist())
    assert not all(right)


def test_shuffles(shim: cuda_shim.Shim) -> None:
    floats, doubles = torch.zeros(256), torch.zeros(256, dtype=torch.float64)
    bits, sums = ints(256), ints(256)
    tensors = (floats, doubles, bits, sums)
    t = torch.arange(256)
    for descending in (0, 1):
        shim.set(threads_descending=descending)
        assert shim.functions.shuffles(*map(address, tensors)) == 0
        assert torch.equal(floats, (t ^ 1).float())
        assert torch.equal(doubles, (t ^ 16).double() / 2)
        rotated = t // 32 * 32 + (t + 5) % 32
        assert torch.equal(bits, (rotated - 2**31).int())
        assert torch.equal(sums, t.view(8, 32).sum(1, keepdim=True).expand(8, 32).reshape(-1).int())


def test_warp_barrier(shim: cuda_shim.Shim) -> None:
    data = torch.arange(256, dtype=torch.int32)
    assert shim.functions.warps(address(data), True) == 0
    assert torch.equal(data, torch.arange(256, dtype=torch.int32) ^ 31)
    data = torch.arange(1000, 1256, dtype=torch.int32)
    assert shim.functions.warps(address(data), False) == 0
    assert not torch.equal(data, (torch.arange(256, dtype=torch.int32) ^ 31) + 1000)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_last_block_by_ticket(shim: cuda_shim.Shim, schedule: dict[str, int]) -> None:
    shim.set(**schedule)
    ticket = ints(1)
    for blocks in (1, 3, 8, 8):
        total, partials = ints(1), ints(8)
        arguments = (address(partials), address(ticket), address(total), blocks)
        assert shim.functions.ticket(*arguments, 0) == 0
        assert total.item() == blocks * (blocks + 1) // 2 and ticket.item() == 0
    assert shim.functions.ticket(*arguments, 3) == 0
    total.zero_()
    assert shim.functions.ticket(*arguments, 0) == 0
    assert total.item() == 0, "a ticket that is not put back was not noticed"


def test_misaligned_accesses_trap(shim: cuda_shim.Shim, capfd: pytest.CaptureFixture[str]) -> None:
    data, to = torch.arange(1030, dtype=torch.int32), ints(1030)
    start = -data.data_ptr() % 16
    aligned = address(data, start), address(to, -to.data_ptr() % 16)
    assert shim.functions.vectors(*aligned, 16) == 0
    for element in (4, 8, 12):
        assert shim.functions.vectors(address(data, start + element), aligned[1], 16) == MISALIGNED
        assert "accesses 16 bytes" in capfd.readouterr().err
        assert shim.functions.vectors(address(data, start + element), aligned[1], 4) == 0
    assert shim.functions.vectors(aligned[0], address(to, 4), 16) == MISALIGNED
    assert shim.functions.vectors(address(data, start + 2), aligned[1], 4) == MISALIGNED
    assert shim.functions.vectors(*aligned, 16) == 0, "usable after a trap"


@pytest.mark.skipif(bool(cuda_shim.SANITIZED), reason="the sanitizer ends the process")
@pytest.mark.parametrize("host_threads", [0, 2])
def test_wild_pointers_trap(
    shim: cuda_shim.Shim, capfd: pytest.CaptureFixture[str], host_threads: int
) -> None:
    shim.set(host_threads=host_threads)
    assert shim.functions.wild(None) == ILLEGAL_ADDRESS
    assert "accesses" in capfd.readouterr().err
    assert shim.functions.write(address(ints(960)), 1) == 0, "usable after it"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "thread 7 is returned"),
        (1, "thread 128 is in __syncthreads"),
        (2, "thread 0 is waiting for its warp"),
    ],
)
def test_threads_that_wait_in_vain(
    shim: cuda_shim.Shim, capfd: pytest.CaptureFixture[str], kind: int, message: str
) -> None:
    data = ints(256)
    assert shim.functions.stuck(kind, address(data)) == LAUNCH_FAILURE
    assert message in capfd.readouterr().err
    assert shim.functions.write(address(ints(960)), 1) == 0, "usable after it"


def test_flags_are_those_of_the_build() -> None:
    written = (cuda_shim.CSRC.parent / "build_compilers.py").read_text()
    names = ", ".join(f'"{flag}"' for flag in cuda_shim.NUMERIC_FLAGS)
    assert f"\nNUMERIC_FLAGS = ({names})" in written


@pytest.mark.parametrize("blocks", [0, 2**31])
def test_impossible_grids_are_refused(shim: cuda_shim.Shim, blocks: int) -> None:
    assert shim.functions.grid_of(ctypes.c_uint(blocks)) == INVALID_CONFIGURATION
