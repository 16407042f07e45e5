"""Memory for optimizer state: laid out like its parameter, in huge pages where that helps."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_WORTH_ASKING = 1 << 16  # bytes; glibc's allocations of less lie among others
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1; an older one refuses


def unallocated(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of ``dtype`` on ``like``'s device, to which ``allocate`` gives memory.

    torch's record of a tensor lies where the C library finds room. So all records are made first:
    between the memory of small tensors, each look at all of them would go through as many pages.
    """
    return torch.empty(0, dtype=dtype, device=like.device)


def allocate(tensors: Sequence[Tensor], likes: Sequence[Tensor]) -> None:
    """Give each tensor memory of its own, without values, with shape and strides of its ``like``.

    Args:
        tensors: of ``unallocated``.
        likes: their elements are dense in memory (no gaps, no overlap).

    Raises:
        RuntimeError: there is not enough memory.
    """
    for tensor, like in zip(tensors, likes, strict=True):
        tensor.resize_(like.numel()).as_strided_(like.size(), like.stride())


@contextmanager
def huge_pages(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Ask the kernel of Linux for huge pages; the block fills ``tensors`` for the first time.

    An optimizer streams through its state once a step, and with pages of 4 KiB it would wait for
    the page tables, too. Large allocations mostly lie side by side. All of a run are asked for
    together, so that a huge page may hold the end of one and the beginning of the next; it is split
    when one of them is freed. The allocator has written in front of each, where the page is a small
    one already, so that after the block these are made huge. The kernel may refuse either.
    """
    runs = _runs([t for t in tensors if t.device.type == "cpu" and t.nbytes >= _WORTH_ASKING])
    for start, end in runs:
        _advise(start, end, _MADV_HUGEPAGE)
    yield
    for start, end in runs:
        whole = -(-start // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
        _advise(*whole, _MADV_COLLAPSE)


def _advise(start: int, end: int, advice: int) -> None:
    madvise = _madvise()
    if madvise is not None and start < end:
        madvise(start, end - start, advice)


def _runs(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where the memory of ``tensors`` begins and ends, in pages; neighbours are one."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(_pages(t.data_ptr(), t.nbytes) for t in tensors):
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        else:
            runs.append((start, end))
    return runs


def _pages(address: int, n_bytes: int) -> tuple[int, int]:
    """Where the first page that has some of it begins, and where the last one ends."""
    page = mmap.PAGESIZE
    return address // page * page, -(-(address + n_bytes) // page) * page


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a run of memory exactly: no gaps and no overlap, in any order."""
    expected = 1
    for stride, size in sorted(_extents(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may name the same memory, as in an expanded tensor."""
    reach = 0  # the furthest element that the smaller strides can get to
    for stride, size in sorted(_extents(tensor)):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _extents(tensor: Tensor) -> list[tuple[int, int]]:
    if tensor.numel() == 0:
        return []
    return [(st, n) for st, n in zip(tensor.stride(), tensor.size(), strict=True) if n > 1]
