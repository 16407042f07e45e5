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
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1; an older one refuses


def state_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@contextmanager
def unfilled_state(likes: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """A state tensor for each of ``likes``, laid out as it is; the block writes the first values.

    An optimizer streams through its state once a step, and with pages of 4 KiB it would wait for
    the page tables, too. So the kernel of Linux is asked for huge pages; it may refuse. Large
    allocations mostly lie side by side. All of a run are asked for together, so that a huge page
    may hold the end of one and the beginning of the next; it is split when one of them is freed.
    The allocator has written some bytes in front of each. The page of these bytes is a small one
    already; it is made huge after the block.

    Args:
        likes: their elements are dense in memory (no gaps, no overlap).

    Raises:
        RuntimeError: there is not enough memory.
    """
    # torch's record of a tensor lies where the C library finds room. So all records are made first:
    # between the memory of small tensors, each look at all of them would go through as many pages.
    tensors = [torch.empty(0, dtype=state_dtype(like), device=like.device) for like in likes]
    for tensor, like in zip(tensors, likes, strict=True):
        tensor.resize_(like.numel()).as_strided_(like.size(), like.stride())
    runs = _runs([t for t in tensors if t.device.type == "cpu"])
    for start, end in runs:
        _advise(start, end, _MADV_HUGEPAGE)
    yield tensors
    for start, end in runs:
        whole = -(-start // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
        _advise(*whole, _MADV_COLLAPSE)


def _advise(start: int, end: int, advice: int) -> None:
    madvise = _madvise()
    if madvise is not None and start < end:
        madvise(start, end - start, advice)


def _runs(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where the memory of ``tensors`` begins and ends, in whole pages; neighbours are one.

    Runs of less than a huge page are left out.
    """
    page = mmap.PAGESIZE
    runs: list[tuple[int, int]] = []
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        address = tensor.data_ptr()
        start, end = address // page * page, -(-(address + tensor.nbytes) // page) * page
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return [(start, end) for start, end in runs if end - start >= _HUGE_PAGE]


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def extent(tensor: Tensor) -> int:
    """Elements of memory from the first of the tensor's to its last, gaps included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * st for n, st in zip(tensor.size(), tensor.stride(), strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a run of memory exactly: no gaps and no overlap, in any order."""
    if tensor.is_contiguous():  # most are, and torch knows it
        return True
    return extent(tensor) == tensor.numel() and not overlaps_itself(tensor)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may name the same memory, as in an expanded tensor."""
    if tensor.is_contiguous():  # also where there are no elements
        return False
    reach = 0  # the furthest element that the smaller strides can get to
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides that say where elements lie; 0 for a dimension of one, which may have any."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in dims)
