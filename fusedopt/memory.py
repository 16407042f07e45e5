"""Memory for optimizer state: laid out like its parameter, in huge pages where that helps."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor without values, of ``tensor``'s shape, strides and device, in memory of its own.

    On Linux the kernel is asked for huge pages: an optimizer streams through its state once a step,
    and with pages of 4 KiB it would wait for the page tables, too. The kernel gives them where
    memory is touched for the first time, so the caller has to fill the tensor.

    Args:
        tensor: its elements are dense in memory (no gaps, no overlap).
        dtype: of the result.

    Raises:
        RuntimeError: there is not enough memory.
    """
    new = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    if new.device.type == "cpu":
        _ask_for_huge_pages(new.data_ptr(), new.nbytes)
    return new


def _ask_for_huge_pages(address: int, n_bytes: int) -> None:
    """For the whole huge pages within; the kernel may refuse, and its other pages serve as well."""
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    end = (address + n_bytes) // _HUGE_PAGE * _HUGE_PAGE
    madvise = _madvise()
    if start < end and madvise is not None:
        madvise(start, end - start, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
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
