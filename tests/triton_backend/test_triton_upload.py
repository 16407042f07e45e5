"""How the Triton backend gets its table of inputs to the device: when, and out of which memory."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stream_model import Device, Driver

from fusedopt.backends import triton as backend

SIZE = 96


class Uploads:
    """An ``_Upload`` and what it uploads."""

    def __init__(self) -> None:
        self.device = Device()
        self.driver = Driver(self.device)
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


def test_a_buffer_in_flight_is_left_alone(uploads: Uploads) -> None:
    """However far the host is ahead of the device."""
    for in_flight in (1, 2, 3, 10, 40):
        for _ in range(in_flight):
            uploads.change()
            uploads.step()
        uploads.device.let_through(in_flight // 2)
        uploads.change()
        uploads.step()
        uploads.device.let_through()


@pytest.mark.parametrize("in_flight", [0, 1, 20])
def test_buffers_are_used_again(uploads: Uploads, in_flight: int) -> None:
    for _ in range(300):
        uploads.change()
        uploads.step()
        uploads.device.let_through(max(0, len(uploads.device.queue) - 2 * in_flight))
    assert len(uploads.driver.buffers) <= max(backend.BUFFERS, in_flight + 3)


def test_a_captured_buffer_is_never_used_again(uploads: Uploads) -> None:
    """Every replay copies from it, at any time after."""
    uploads.step()
    uploads.change()
    uploads.capture()
    for step in range(20):
        if step % 3 == 0:
            uploads.device.replay()
        uploads.change()
        uploads.step()
        uploads.device.let_through(step % 5)
    uploads.device.replay()
    uploads.device.let_through()


def test_every_step_after_a_capture_writes_the_table(uploads: Uploads) -> None:
    """Nobody tells of a replay."""
    uploads.step()
    uploads.capture()
    uploads.change()
    assert uploads.step()
    uploads.device.replay()
    for _ in range(3):
        assert uploads.step()
        uploads.device.replay()
    uploads.device.let_through()


def test_a_graph_of_one_step_finds_a_buffer(uploads: Uploads) -> None:
    """Pinned memory cannot be had while a graph is captured."""
    for ahead in (0, 1, backend.BUFFERS, 40):
        for _ in range(ahead):
            uploads.change()
            uploads.step()
        uploads.capture()
        assert uploads.driver.made_while_capturing == 0
        uploads.step()


@pytest.mark.parametrize("changes", [False, True])
def test_captures_in_a_row(uploads: Uploads, changes: bool) -> None:
    """Several steps in one graph, or a graph for each shape of a batch, and no step between."""
    uploads.step()
    for _ in range(8):
        if changes:
            uploads.change()
        uploads.capture()
    assert uploads.driver.made_while_capturing == 0


@pytest.mark.parametrize("copies", [1, 3])
def test_after_a_failed_copy_the_next_step_copies(uploads: Uploads, copies: int) -> None:
    for warm in (False, True):
        if warm:
            uploads.step()
        uploads.change()
        uploads.device.broken = True
        for _ in range(copies):
            with pytest.raises(RuntimeError, match="no more memory"):
                uploads.upload.run(False)
        uploads.device.broken = False
        assert uploads.step()
        assert not uploads.step()
        uploads.device.let_through()
    # also where the table is again what it was before
    before = bytes(uploads.source)
    uploads.change()
    uploads.device.broken = True
    with pytest.raises(RuntimeError, match="no more memory"):
        uploads.step()
    uploads.device.broken = False
    uploads.source[:] = before
    assert uploads.step()
    uploads.device.let_through()


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events(seed: int) -> None:
    random.seed(seed)
    uploads = Uploads()
    captures = 0
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
            captures += 1
        else:
            uploads.device.broken = True
            if uploads.upload.due(False):
                with pytest.raises(RuntimeError):
                    uploads.step()
            uploads.device.broken = False
    uploads.device.let_through()
    assert uploads.driver.made_while_capturing == 0


# ---- where the event is recorded ----------------------------------------------------------------


def test_the_event_is_of_the_stream_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tables on a device that is not the current one."""
    recorded: list[int] = []

    class CudaEvent:
        def record(self, stream: Any = None) -> None:
            recorded.append(current[-1] if stream is None else stream.device_index)

        def query(self) -> bool:
            return True

    class OnDevice:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class CudaStream:
        def __init__(self, device: torch.device | None = None) -> None:
            self.device_index = current[-1] if device is None else device.index

        def record_event(self, event: Any = None) -> Any:
            event = event or CudaEvent()
            event.record(self)
            return event

    current = [0]
    monkeypatch.setattr(torch.cuda, "Event", CudaEvent)
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    monkeypatch.setattr(torch.cuda, "current_stream", CudaStream)
    driver = backend.TritonDriver()
    monkeypatch.setattr(driver, "host_buffer", lambda n: torch.empty(n, dtype=torch.uint8))
    tables: Any = SimpleNamespace(
        device=torch.device("cuda", 1), host_inputs=bytearray(SIZE), tensors={"inputs": Device()}
    )
    upload = backend._Upload(driver, tables)
    upload.run(False)
    assert recorded == [1]
