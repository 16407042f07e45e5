"""What the tests of the CUDA backend need of a GPU, and what stands in for it without one.

FUSEDOPT_TEST_GPU=emulate runs them with device "cpu" and the CPU backend, FUSEDOPT_TEST_GPU=shim
with device "cpu" and the CUDA kernels compiled for the CPU (tests/cuda_shim.py): then a stream, a
graph or a count of launches is a stand-in, and what is left of a test is its own arithmetic.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CHUNK, LENGTHS
from torch import Tensor

from fusedopt.backends import cuda

VARIABLE = "FUSEDOPT_TEST_GPU"
STAND_IN = os.environ.get(VARIABLE)
if STAND_IN not in (None, "", "emulate", "shim"):
    raise ValueError(f"{VARIABLE}={STAND_IN!r}; use emulate or shim, or unset it")

REAL = not STAND_IN and torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if REAL else torch.device("cpu")
BACKEND = "cpu" if STAND_IN == "emulate" else "cuda"

# Every file of GPU tests starts with `pytestmark = on_gpu` and takes the fixture `device`.
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (REAL or STAND_IN), reason="torch.cuda.is_available() is False: no NVIDIA GPU"
    ),
]
real_gpu = pytest.mark.skipif(not REAL, reason="there is nothing to see without an NVIDIA GPU")

# The CPU that stands in for a GPU takes its time with thousands of tensors.
MANY_LENGTHS = LENGTHS if REAL else [0, 1, 3, 8, 17, 51, 257, CHUNK + 1, 2 * CHUNK + 257]


def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The body of the fixture `device`: DEVICE can be used, with whatever stands in for it.

    With FUSEDOPT_REQUIRE_CUDA=1 a GPU that the backend cannot serve is a failure.
    """
    if STAND_IN != "shim":
        reason = cuda.unavailable_reason() if REAL else None
        if reason is not None and os.environ.get("FUSEDOPT_REQUIRE_CUDA") == "1":
            pytest.fail(f"{reason}, and FUSEDOPT_REQUIRE_CUDA=1", pytrace=False)
        if reason is not None:
            pytest.skip(f"the CUDA backend cannot serve this GPU: {reason}")
        yield DEVICE
        return
    import cuda_shim

    from fusedopt.optimizer import FusedOptimizer

    def stays(self: FusedOptimizer, value: Tensor) -> bool:
        """As a tensor on a GPU would; those on the CPU cannot be told apart here."""
        return self._options.backend == "cuda"

    monkeypatch.setattr(FusedOptimizer, "_stays_on_device", stays)
    yield from cuda_shim.fixture()


def two_devices() -> list[torch.device]:
    """Two GPUs, or the reason why this is no test here."""
    if not REAL:
        return [DEVICE, DEVICE]
    if torch.cuda.device_count() < 2:
        pytest.skip("one optimizer over two GPUs needs a second GPU")
    return [torch.device("cuda", 0), torch.device("cuda", 1)]


def need_memory(n_bytes: int) -> None:
    """Skip where the GPU has not as much to spare."""
    if not REAL:
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(DEVICE)
    if free < n_bytes + (1 << 30):
        pytest.skip(f"needs {n_bytes / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


# ---- tensors ------------------------------------------------------------------------------------


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on `device` laid out as the original: order, gaps and, to a line, where it begins."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offset, line = tensor.storage_offset(), 64  # elements
    begin, end = offset - offset % line, offset + (last + 1 if tensor.numel() else 0)
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
    there = storage[begin:end].to(device, copy=True)
    return there.as_strided(tensor.shape, tensor.stride(), offset - begin)


def synchronize() -> None:
    if REAL:
        torch.cuda.synchronize()


# ---- streams and time ---------------------------------------------------------------------------


def new_stream() -> Any:
    return torch.cuda.Stream() if REAL else None


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    return torch.cuda.stream(stream) if REAL else nullcontext()


def wait_for(stream: Any) -> None:
    """What the current stream does from now on comes after all that `stream` has to do."""
    if REAL:
        torch.cuda.current_stream().wait_stream(stream)


def keep_busy(seconds: float = 0.3) -> None:
    """Let the current stream do nothing for a while: the host runs ahead."""
    if REAL:
        torch.cuda._sleep(int(seconds * 1.5e9))  # clock cycles


def current_place() -> tuple[Any, ...]:
    """The caller's device and stream on every device."""
    if not REAL:
        return ()
    streams = [torch.cuda.current_stream(i) for i in range(torch.cuda.device_count())]
    return (torch.cuda.current_device(), *streams)


@contextmanager
def no_sync() -> Iterator[None]:
    """No call of torch may wait for the GPU, and neither may ours: the stream is busy meanwhile."""
    if not REAL:
        yield
        return
    synchronize()
    before = torch.cuda.get_sync_debug_mode()
    end_of_queue = torch.cuda.Event()
    keep_busy()
    end_of_queue.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not end_of_queue.query(), "the host waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode(before)
        synchronize()


# ---- graphs -------------------------------------------------------------------------------------


def captured(iteration: Callable[[], None], warmup: int = 3) -> Callable[[], None]:
    """`warmup` iterations on a side stream, then one captured; returns the replay.

    Capturing runs nothing. The stand-in of a replay is the iteration.
    """
    if not REAL:
        for _ in range(warmup):
            iteration()
        return iteration
    side = new_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            iteration()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iteration()
    return graph.replay


# ---- counts -------------------------------------------------------------------------------------


def n_allocations() -> int:
    """Blocks ever asked of torch's allocator on this device."""
    if not REAL:
        return 0
    return int(torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"])


DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def device_work(call: Callable[[], Any], tmp_path: Path) -> list[str] | None:
    """Names of the kernels, copies and fills that `call` puts on the GPU; None where none counts.

    Read from the trace, where the ranges that the profiler itself marks have another category.
    """
    if STAND_IN == "shim":
        import cuda_shim

        before = len(cuda_shim.load().launches())
        call()
        return [launch.kernel for launch in cuda_shim.load().launches()[before:]]
    if not REAL:
        call()
        return None
    probe = torch.zeros(8, device=DEVICE)
    seen = len(traced(lambda: probe.add_(1.0), tmp_path))
    if seen != 1:
        pytest.skip(f"the profiler does not see the GPU here: {seen} kernels for one add_")
    return traced(call, tmp_path)


def traced(call: Callable[[], Any], tmp_path: Path) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize()
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    work = [event for event in events if event.get("cat") in DEVICE_WORK]
    return [event["name"] for event in sorted(work, key=lambda event: event["ts"])]
