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
def unfilled_state(likes: Sequence[tuple[Tensor, torch.dtype]]) -> Iterator[list[Tensor]]:
    """Allocate state laid out like each of ``likes``; the ``with`` block writes the first values.

    A step streams through all state. With pages of 4 KiB it would also wait for page tables. So the
    Linux kernel is asked for huge pages; it may refuse. Large allocations mostly are neighbours in
    memory. One request covers a run of neighbours, so that a huge page may hold the end of one
    tensor and the beginning of the next; it is split when one of them is freed. The allocator has
    written a header in front of each tensor, so the page of the header already exists as a small
    one. It is made huge after the block.

    Args:
        likes: tensors whose elements are dense in memory (no gaps, no overlap), with the dtypes of
            the new ones.

    Raises:
        RuntimeError: there is not enough memory.
    """
    # torch's record of a tensor is where the C library found room. So all records are made first:
    # scattered between the memory of small tensors, they would lie in as many pages at every look.
    tensors = [torch.empty(0, dtype=dtype, device=like.device) for like, dtype in likes]
    for tensor, (like, _) in zip(tensors, likes, strict=True):
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
    """Address ranges of the memory of ``tensors``, in whole pages; neighbours are merged.

    Ranges of less than a huge page are left out.
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
    """The length of a tensor's memory in elements, from its first to its last, gaps included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * st for n, st in zip(tensor.size(), tensor.stride(), strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a run of memory exactly: no gaps and no overlap, in any order."""
    if tensor.is_contiguous():  # the usual case, which torch knows
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
    """The strides, with 0 for a dimension of size one, where a stride has no meaning."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in dims)
