"""How the Triton backend gets its table of inputs to the device: when, and out of which memory."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedopt.backends import triton as backend

SIZE = 96

# ---- a device that is a queue of work, which a test lets through as it pleases ------------------


class Device:
    """A stream, and the table in the memory of the device. A copy takes what its buffer holds when
    it comes to its turn, as a real one does."""

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
    """Behind all that the device has to do so far."""

    def __init__(self, device: Device) -> None:
        assert not device.capturing, "an event of a graph says nothing about its replays"
        self.device = device
        self.after = device.done + len(device.queue)

    def query(self) -> bool:
        assert not self.device.capturing, "not allowed while a graph is captured"
        return self.device.done >= self.after


class Driver(backend.TritonDriver):
    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.buffers = 0

    def host_buffer(self, n_bytes: int) -> Tensor:
        assert not self.device.capturing, "pinned memory cannot be had while a graph is captured"
        self.buffers += 1
        return torch.empty(n_bytes, dtype=torch.uint8)

    def event(self, device: Any) -> Any:
        return Event(self.device)


# ---- the uploads --------------------------------------------------------------------------------


class Uploads:
    """An ``_Upload`` and what it uploads."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.device = self.driver.device
        self.source = bytearray(SIZE)
        tables: Any = SimpleNamespace(
            device=self.device, host_inputs=self.source, tensors={"inputs": self.device}
        )
        self.upload = backend._Upload(self.driver, tables)

    def change(self) -> None:
        self.source[:8] = random.randbytes(8)

    def step(self) -> bool:
        """As TritonLaunches.begin does it; whether there was a copy."""
        before = self.device.copies
        if self.upload.due(self.device.capturing):
            self.upload.run(self.device.capturing)
        self.device.kernel(bytes(self.source))
        return self.device.copies > before

    def capture(self) -> None:
        """A graph of one step."""
        self.device.capturing, self.device.graph = True, []
        assert self.step(), "a replay would find what an earlier step has left there"
        self.device.capturing = False


@pytest.fixture
def uploads() -> Uploads:
    random.seed(0)
    return Uploads()


def test_only_what_has_changed_is_copied(uploads: Uploads) -> None:
    assert uploads.step(), "nothing is there before the first step"
    for _ in range(3):
        assert not uploads.step()
    for _ in range(3):
        uploads.change()
        assert uploads.step()
        assert not uploads.step()
    uploads.source[-1] ^= 1  # of the header, the last
    assert uploads.step()
    uploads.device.let_through()


@pytest.mark.parametrize("in_flight", [0, 1, 20])
def test_buffers_are_used_again(uploads: Uploads, in_flight: int) -> None:
    for _ in range(300):
        uploads.change()
        uploads.step()
        uploads.device.let_through(max(0, len(uploads.device.queue) - 2 * in_flight))
    assert uploads.driver.buffers <= max(backend.BUFFERS, in_flight + 3)


def test_a_graph_of_one_step_finds_a_buffer(uploads: Uploads) -> None:
    """However far the host is ahead of the device."""
    for ahead in (0, 1, backend.BUFFERS, 40):
        for _ in range(ahead):
            uploads.change()
            uploads.step()
        uploads.capture()
        uploads.step()


@pytest.mark.parametrize("changes", [False, True])
def test_captures_in_a_row(uploads: Uploads, changes: bool) -> None:
    """Several steps in one graph, or a graph for each shape of a batch, and no step between."""
    uploads.step()
    for _ in range(8):
        if changes:
            uploads.change()
        uploads.capture()


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("changes", [False, True])
def test_after_a_failed_copy_the_next_step_copies(uploads: Uploads, copies: int, changes: bool):
    """Also where the table is again what it was before."""
    uploads.step()
    before = bytes(uploads.source)
    uploads.change()
    uploads.device.broken = True
    for _ in range(copies):
        with pytest.raises(RuntimeError, match="no more memory"):
            uploads.upload.run(False)
    uploads.device.broken = False
    if not changes:
        uploads.source[:] = before
    assert uploads.step()
    assert not uploads.step()
    uploads.device.let_through()


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events(seed: int) -> None:
    """A buffer in flight is left alone, and one that a graph copies from, for ever; after a capture
    every step writes the table, since nobody tells of a replay."""
    random.seed(seed)
    uploads = Uploads()
    for _ in range(200):
        event = random.choices(
            ["step", "change", "through", "replay", "capture", "fail"], [8, 4, 8, 2, 0.3, 0.3]
        )[0]
        if event == "step":
            uploads.step()
        elif event == "change":
            uploads.change()
        elif event == "through":
            uploads.device.let_through(random.randrange(6))
        elif event == "replay":
            uploads.device.replay()
        elif event == "capture":
            uploads.capture()
            uploads.step()
        else:
            uploads.device.broken = True
            if uploads.upload.due(False):
                with pytest.raises(RuntimeError):
                    uploads.step()
            uploads.device.broken = False
    uploads.device.let_through()


# ---- where the event is recorded ----------------------------------------------------------------


def test_the_event_is_of_the_stream_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tables on a device that is not the current one."""
    recorded, current = [], [0]

    class CudaEvent:
        def record(self, stream: int | None = None) -> None:
            recorded.append(current[-1] if stream is None else stream)

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    def current_stream(device: torch.device | None = None) -> int:
        return current[-1] if device is None else device.index

    monkeypatch.setattr(torch.cuda, "Event", CudaEvent)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    driver = backend.TritonDriver()
    monkeypatch.setattr(driver, "host_buffer", lambda n: torch.empty(n, dtype=torch.uint8))
    tables: Any = SimpleNamespace(
        device=torch.device("cuda", 1), host_inputs=bytearray(SIZE), tensors={"inputs": Device()}
    )
    backend._Upload(driver, tables).run(False)
    assert recorded == [1]
