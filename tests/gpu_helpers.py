"""What the tests of the GPU backends need of a GPU, and what stands in for it without one.

Every test runs once for each backend, CUDA and Triton: ``device_fixture`` makes it so, and
``backend()`` says which one it is. FUSEDOPT_TEST_GPU=cuda or =triton leaves the other one out. The
stand-ins run the tests with device "cpu": =shim with the CUDA kernels compiled for the CPU
(tests/cuda_shim.py), =interpreter with the Triton kernels in Triton's interpreter
(tests/triton_interpreter.py), =emulate with the CPU backend. Then a stream, a graph or a count of
allocations is a stand-in too, and what is left of a test is its own arithmetic.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from cases import CHUNK, LENGTHS
from torch import Tensor

T = TypeVar("T")

VARIABLE = "FUSEDOPT_TEST_GPU"
STAND_INS = {"emulate": "cpu", "shim": "cuda", "interpreter": "triton"}
ON_A_GPU = ("cuda", "triton")
CHOSEN = os.environ.get(VARIABLE, "")
if CHOSEN not in ("", *STAND_INS, *ON_A_GPU):
    raise ValueError(
        f"{VARIABLE}={CHOSEN!r}; use {', '.join(STAND_INS)} (without a GPU), cuda or triton (that "
        "backend alone), or unset it"
    )
STAND_IN = CHOSEN if CHOSEN in STAND_INS else None

REAL = not STAND_IN and torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if REAL else torch.device("cpu")
BACKENDS = (STAND_INS[STAND_IN],) if STAND_IN else (CHOSEN,) if CHOSEN else ON_A_GPU

# Every file of GPU tests starts with `pytestmark = on_gpu` and `device = device_fixture()`.
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REAL or STAND_IN), reason="torch.cuda.is_available() is False: no GPU"),
]
real_gpu = pytest.mark.skipif(not REAL, reason="there is nothing to see without a GPU")


def by_speed(gpu: T, stand_in: T, interpreter: T) -> T:
    """A CPU that stands in for a GPU takes its time; the interpreter, 10 ms for each tensor."""
    return interpreter if STAND_IN == "interpreter" else gpu if REAL else stand_in


MANY_LENGTHS = by_speed(
    LENGTHS,
    [0, 1, 3, 8, 17, 51, 257, CHUNK + 1, 2 * CHUNK + 257],
    [0, 1, 17, 257, CHUNK + 1],
)

_under_test = BACKENDS[0]


def backend() -> str:
    """The one that is under test, as the optimizers' argument."""
    return _under_test


def device_fixture(backends: Sequence[str] = BACKENDS) -> Any:
    """The tests of the file run on DEVICE, once for each of `backends` that is to be tested.

    A GPU that the backend cannot serve is a skip, with FUSEDOPT_REQUIRE_CUDA=1 or
    FUSEDOPT_REQUIRE_TRITON=1 a failure.
    """
    own = [name for name in BACKENDS if name in backends]
    return pytest.fixture(autouse=True, params=own)(_on_device)


def _on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    name = request.param
    monkeypatch.setattr(sys.modules[__name__], "_under_test", name)
    if STAND_IN in ("shim", "interpreter"):
        _numbers_stay(name, monkeypatch)
        yield from _kernels_on_the_cpu(monkeypatch)
        return
    reason = module_of(name).unavailable_reason() if REAL else None
    variable = f"FUSEDOPT_REQUIRE_{name.upper()}"
    if reason is not None and os.environ.get(variable) == "1":
        pytest.fail(f"{reason}, and {variable}=1", pytrace=False)
    if reason is not None:
        pytest.skip(f"the {name} backend cannot serve this GPU: {reason}")
    yield DEVICE


def module_of(name: str) -> Any:
    return importlib.import_module(f"fusedopt.backends.{name}")


def _numbers_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hyper-parameters in tensors, as on a GPU; those on the CPU cannot be told apart here."""
    from fusedopt.optimizer import FusedOptimizer

    def stays(self: FusedOptimizer, value: Tensor) -> bool:
        return self._shared.options.backend == name

    monkeypatch.setattr(FusedOptimizer, "_stays_on_device", stays)


def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    if STAND_IN == "shim":
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


def two_devices() -> list[torch.device]:
    """Two GPUs, or the reason why this is no test here."""
    if not REAL:
        return [DEVICE, DEVICE]
    if torch.cuda.device_count() < 2:
        pytest.skip("one optimizer over two GPUs needs a second GPU")
    return [torch.device("cuda", 0), torch.device("cuda", 1)]


@contextmanager
def memory(n_bytes: int) -> Iterator[None]:
    """One test at a time has so much of the GPU, of all workers; skipped if it is not to spare."""
    if not REAL:
        yield
        return
    with one_at_a_time("memory"):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(DEVICE)
        if free < n_bytes + (1 << 30):
            pytest.skip(
                f"needs {n_bytes / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free"
            )
        try:
            yield
        finally:
            torch.cuda.empty_cache()


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Of the workers of pytest-xdist, which share the GPU."""
    import fcntl

    path = Path(tempfile.gettempdir(), f"fusedopt-{os.getuid()}-{what}.lock")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    """Blocks ever asked of torch's allocators: of memory on this device, and of pinned memory."""
    if not REAL:
        return 0
    on_device = torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]
    return int(on_device) + int(torch.cuda.host_memory_stats()["num_host_alloc"])


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
    if STAND_IN == "interpreter":
        launched = module_of("triton").driver().launched
        before = len(launched)
        call()
        return [name for name, _ in launched[before:]]
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
