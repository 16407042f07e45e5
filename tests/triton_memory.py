"""A watch over what interpreted Triton kernels load and store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor


class Memory:
    """What kernels may touch: the bytes of ``tensors``."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        ranges = sorted(
            (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors
        )
        self._first = np.array([first for first, _ in ranges], np.uint64)
        self._end = np.maximum.accumulate(np.array([end for _, end in ranges], np.uint64))

    def check(self, pointers: Any, mask: Any) -> None:
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        place = np.searchsorted(self._first, addresses, side="right")
        outside = (place == 0) | (addresses + size > self._end[place - 1])
        assert not outside.any(), f"touches what is not its own at {addresses[outside]}"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        from triton.runtime.interpreter import InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def watched_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.check(pointers, mask)
            return load(builder, pointers, mask, *rest)

        def watched_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.check(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        watched = {"create_masked_load": watched_load, "create_masked_store": watched_store}
        with mock.patch.multiple(InterpreterBuilder, **watched):
            yield
