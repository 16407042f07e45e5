"""Memory for optimizer state: laid out like its parameter, in huge pages where that helps."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_ALIGNMENT = 128  # bytes; the widest vector, twice over


def zeros_like_all(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """One zeroed tensor for each of ``params``, with its shape, strides and device.

    CPU tensors are cut from one mapping that asks for huge pages: an optimizer streams through its
    state once a step, and with 4 KiB pages the walk of the page tables adds to that. Each tensor
    is a storage of its own, so that saving one does not save them all.

    Args:
        params: tensors whose elements are dense in memory (no gaps, no overlap).
        dtypes: the dtype of each result.

    Raises:
        RuntimeError: there is not enough memory.
    """
    out: list[Tensor | None] = [None] * len(params)
    on_cpu = [i for i, p in enumerate(params) if p.device.type == "cpu" and p.numel() > 0]
    sizes = [_aligned(params[i].numel() * dtypes[i].itemsize) for i in on_cpu]
    mapped = _map_huge_pages(sum(sizes)) if sum(sizes) >= _HUGE_PAGE else None
    if mapped is not None:
        mapping, start = mapped
        for i, size in zip(on_cpu, sizes, strict=True):
            flat = torch.frombuffer(mapping, dtype=dtypes[i], count=params[i].numel(), offset=start)
            out[i] = flat.as_strided(params[i].size(), params[i].stride()).detach()
            start += size
    return [
        torch.zeros_like(p, dtype=dtype) if t is None else t
        for t, p, dtype in zip(out, params, dtypes, strict=True)
    ]


def _aligned(n_bytes: int) -> int:
    return math.ceil(n_bytes / _ALIGNMENT) * _ALIGNMENT


def _huge_pages_available() -> bool:
    return sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE")


def _map_huge_pages(n_bytes: int) -> tuple[mmap.mmap, int] | None:
    """A private anonymous mapping and the offset of its first huge-page boundary, if to be had.

    Fresh anonymous pages are zero; they become resident when first touched.
    """
    if not _huge_pages_available():
        return None
    try:
        mapping = mmap.mmap(-1, n_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory: torch's allocator may find it piece by piece, or raises its error
        return None
    with suppress(OSError):  # a kernel without transparent huge pages: smaller pages, same memory
        mapping.madvise(mmap.MADV_HUGEPAGE)
    address = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
    return mapping, -address % _HUGE_PAGE


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
