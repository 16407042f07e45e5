"""What runs the kernels under test, and what a test needs of it.

A test runs once for each runner: ``shim``, the CUDA kernels compiled for the CPU (tests/cuda_shim);
``interpreter``, the Triton kernels in Triton's interpreter (tests/triton_interpreter.py); ``cuda``
and ``triton``, the kernels of either backend on a GPU. The fixtures of ``runners()`` and
``on_gpu()`` make it so, and ``backend()``, ``device()`` and ``real()`` say what is at work.

FUSEDOPT_TEST_GPU=cuda, say, leaves the other runners out. With =shim or =interpreter, the tests of
what only a GPU has run without one: then a stream, a graph or a count of allocations is a stand-in
too, and what is left of a test is its own arithmetic.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from conftest import require_cpu_backend
from torch import Tensor

from fusedopt.backends.device import DevicePlan

T = TypeVar("T")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@dataclass(frozen=True)
class Runner:
    name: str
    backend: str  # the optimizers' argument
    device: torch.device

    @property
    def is_wanted(self) -> bool:
        return CHOSEN in ("", self.name)


RUNNERS = (
    Runner("shim", "cuda", CPU),
    Runner("interpreter", "triton", CPU),
    Runner("cuda", "cuda", GPU),
    Runner("triton", "triton", GPU),
)
VARIABLE = "FUSEDOPT_TEST_GPU"
CHOSEN = os.environ.get(VARIABLE, "")
if CHOSEN not in ("", *(one.name for one in RUNNERS)):
    names = ", ".join(one.name for one in RUNNERS)
    raise ValueError(f"{VARIABLE}={CHOSEN!r}; use one of {names}, or unset it")
STAND_IN = any(one.name == CHOSEN and one.device == CPU for one in RUNNERS)

_at_work = Runner("none", "cpu", CPU)


def backend() -> str:
    """The one under test, as the optimizers' argument."""
    return _at_work.backend


def device() -> torch.device:
    return _at_work.device


def real() -> bool:
    """Whether a GPU is at work, and nothing stands in for it."""
    return _at_work.device.type == "cuda"


def only_on_a_gpu() -> None:
    """The first line of a test that says nothing where a stand-in is at work."""
    if not real():
        pytest.skip("there is nothing to see without a GPU")


def by_speed(gpu: T, shim: T, interpreter: T) -> T:
    """A CPU that stands in for a GPU takes its time; the interpreter, 10 ms for each tensor."""
    return {"shim": shim, "interpreter": interpreter}.get(_at_work.name, gpu)


def runners(*names: str) -> Any:
    """A fixture: the tests of the file run once for each of these runners, or for every one."""
    return _fixture(one for one in RUNNERS if one.name in names or not names)


def on_gpu(*backends: str) -> Any:
    """The same for tests of what only a GPU has, for each of these backends or for both."""
    own = (one for one in RUNNERS if one.backend in backends or not backends)
    return _fixture(one for one in own if one.device == GPU or STAND_IN)


def _fixture(own: Iterable[Runner]) -> Any:
    no_gpu = not torch.cuda.is_available()
    params = []
    for one in own:
        marks = [pytest.mark.gpu] if one.device == GPU or STAND_IN else []
        if one.device == GPU and no_gpu:
            reason = "torch.cuda.is_available() is False: no GPU"
            marks.append(pytest.mark.skipif(True, reason=reason))
        if one.is_wanted:
            params.append(pytest.param(one, marks=marks, id=one.name))
    return pytest.fixture(autouse=True, params=params)(_running)


def _running(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Gives the shim or the interpreter. A GPU that the backend cannot serve is a skip, with
    FUSEDOPT_REQUIRE_CUDA=1 or FUSEDOPT_REQUIRE_TRITON=1 a failure."""
    require_cpu_backend()
    monkeypatch.setattr(sys.modules[__name__], "_at_work", request.param)
    if not real():
        _numbers_stay(monkeypatch)
        yield from _kernels_on_the_cpu(monkeypatch)
        return
    reason = module_of(backend()).unavailable_reason()
    variable = f"FUSEDOPT_REQUIRE_{backend().upper()}"
    if reason is not None and os.environ.get(variable) == "1":
        pytest.fail(f"{reason}, and {variable}=1", pytrace=False)
    if reason is not None:
        pytest.skip(f"the {backend()} backend cannot serve this GPU: {reason}")
    yield device()


def module_of(name: str) -> Any:
    return importlib.import_module(f"fusedopt.backends.{name}")


def _numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hyper-parameters in tensors, as on a GPU; those on the CPU cannot be told apart here."""
    from fusedopt.optimizer import FusedOptimizer

    def stays(self: FusedOptimizer, value: Tensor) -> bool:
        return self._shared.options.backend == backend()

    monkeypatch.setattr(FusedOptimizer, "_stays_on_device", stays)


def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if backend() == "cuda":
        import cuda_shim

        yield from cuda_shim.fixture()
        return
    import triton_interpreter

    upload = module_of("triton")._Upload
    run = upload.run

    def counted(self: Any, capturing: bool) -> None:
        self._driver.launched.append(("Memcpy HtoD (Pinned -> Device)", 0))
        run(self, capturing)

    monkeypatch.setattr(upload, "run", counted)
    yield from triton_interpreter.fixture()


def two_devices(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs, or the reason why this is no test here; a stand-in has two names of the CPU, to
    which the tensors of a plan go by turns."""
    if real():
        if torch.cuda.device_count() < 2:
            pytest.skip("one optimizer over two GPUs needs a second GPU")
        return [GPU, torch.device("cuda", 1)]
    devices = [CPU, torch.device("cpu", 1)]

    def by_turns(plan: DevicePlan, row: Any) -> torch.device:
        return devices[plan.rows.index(row) % 2]

    if backend() == "cuda":
        import cuda_shim

        cuda_shim.load().set(devices=2)
    driver = module_of(backend()).driver()
    monkeypatch.setattr(driver, "index", lambda device: device.index or 0, raising=False)
    monkeypatch.setattr(DevicePlan, "device_of", by_turns)
    return [CPU, CPU]


@contextmanager
def memory(n_bytes: int) -> Iterator[None]:
    """One test at a time has so much of the GPU, of all workers; skipped if it is not to spare."""
    if not real():
        yield
        return
    import fcntl

    path = Path(tempfile.gettempdir(), f"fusedopt-{os.getuid()}-memory.lock")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device())
        if free < n_bytes + (1 << 30):
            wanted = f"{n_bytes / 2**30:.0f} GiB of GPU memory"
            pytest.skip(f"needs {wanted}, {free / 2**30:.0f} are free")
        try:
            yield
        finally:
            torch.cuda.empty_cache()


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
    if real():
        torch.cuda.synchronize()


# ---- streams and time ---------------------------------------------------------------------------


def new_stream() -> Any:
    return torch.cuda.Stream() if real() else None


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    return torch.cuda.stream(stream) if real() else nullcontext()


def wait_for(stream: Any) -> None:
    """What the current stream does from now on comes after all that `stream` has to do."""
    if real():
        torch.cuda.current_stream().wait_stream(stream)


def keep_busy(seconds: float = 0.3) -> None:
    """Let the current stream do nothing for a while: the host runs ahead."""
    if real():
        torch.cuda._sleep(int(seconds * 1.5e9))  # clock cycles


def current_place() -> tuple[Any, ...]:
    """The caller's device and stream on every device."""
    if not real():
        return ()
    streams = [torch.cuda.current_stream(i) for i in range(torch.cuda.device_count())]
    return (torch.cuda.current_device(), *streams)


@contextmanager
def no_sync() -> Iterator[None]:
    """No call of torch may wait for the GPU, and neither may ours: the stream is busy meanwhile."""
    if not real():
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
    side = new_stream()
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with on_stream(side):
        for _ in range(warmup):
            iteration()
    wait_for(side)
    if not real():
        return iteration
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iteration()
    return graph.replay


# ---- counts -------------------------------------------------------------------------------------


def n_allocations() -> int:
    """Blocks ever asked of torch's allocators: of memory on this device, and of pinned memory."""
    if not real():
        return 0
    on_device = torch.cuda.memory_stats(device())["allocation.all.allocated"]
    return int(on_device) + int(torch.cuda.host_memory_stats()["num_host_alloc"])


DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def device_work(call: Callable[[], Any], tmp_path: Path) -> list[str]:
    """Names of the kernels, copies and fills that `call` puts on the GPU."""
    if not real():
        return _stood_in(call)
    probe = torch.zeros(8, device=device())
    seen = len(_traced(lambda: probe.add_(1.0), tmp_path))
    if seen != 1:
        pytest.skip(f"the profiler does not see the GPU here: {seen} kernels for one add_")
    return _traced(call, tmp_path)


def _stood_in(call: Callable[[], Any]) -> list[str]:
    def so_far() -> list[str]:
        if backend() == "triton":
            return [name for name, _ in module_of("triton").driver().launched]
        import cuda_shim

        return [launch.kernel for launch in cuda_shim.load().launches()]

    before = len(so_far())
    call()
    return so_far()[before:]


def _traced(call: Callable[[], Any], tmp_path: Path) -> list[str]:
    """From the trace, where the ranges that the profiler itself marks have another category."""
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
