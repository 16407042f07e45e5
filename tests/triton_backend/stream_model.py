"""A device that is a queue of work, which a test lets through as it pleases.

A copy takes what its buffer holds when it comes to its turn, as a real one does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedopt.backends import triton as backend


class Device:
    """A stream, and the table in the memory of the device."""

    def __init__(self) -> None:
        self.table = b""
        self.queue: list[Callable[[], None]] = []
        self.done = 0
        self.copies = 0  # asked for
        self.capturing = False
        self.graph: list[Callable[[], None]] = []
        self.broken = False

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.graph if self.capturing else self.queue).append(work)

    def let_through(self, count: int | None = None) -> None:
        work, self.queue = self.queue[:count], [] if count is None else self.queue[count:]
        self.done += len(work)
        for item in work:
            item()

    def replay(self) -> None:
        self.queue += self.graph

    # what _Upload asks of the tensor on the device

    def copy_(self, buffer: Tensor, non_blocking: bool) -> None:
        assert non_blocking, "the host would wait"
        if self.broken:
            raise RuntimeError("no more memory")
        self.copies += 1

        def copy() -> None:
            self.table = ctypes.string_at(buffer.data_ptr(), buffer.numel())

        self.enqueue(copy)

    def kernel(self, expected: bytes) -> None:
        """Work that reads the table."""

        def run() -> None:
            assert self.table == expected, "a kernel found another step's table"

        self.enqueue(run)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.after: int | None = None

    def record(self, *_: Any) -> None:
        assert not self.device.capturing, "an event of a graph says nothing about its replays"
        self.after = self.device.done + len(self.device.queue)

    def query(self) -> bool:
        assert not self.device.capturing, "not allowed while a graph is captured"
        return self.after is not None and self.device.done >= self.after


class Driver(backend.TritonDriver):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.buffers: list[Tensor] = []
        self.made_while_capturing = 0

    def host_buffer(self, n_bytes: int) -> Tensor:
        self.made_while_capturing += self.device.capturing
        self.buffers.append(torch.empty(n_bytes, dtype=torch.uint8))
        return self.buffers[-1]

    def event(self, device: Any) -> Any:
        event = Event(self.device)
        event.record()  # at once or when it is told to: both leave it behind the copy
        return event
