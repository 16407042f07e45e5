"""The machine that is measured: its clocks, and what can be asked of it.

`Cuda` is a GPU. `DryRun` goes through the same calls on the CPU, with a host clock in the place of
events: its figures mean nothing and are marked as such wherever they appear.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import ROOT

DRY_RUN = "DRY RUN - not a measurement"
FLUSH_BYTES = 256 << 20  # several times the L2 cache
MAX_HOLD_MS = 50.0
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories in the profiler's trace

Call = Callable[[], object]


class Machine(Protocol):
    name: str
    dry: bool
    device: torch.device
    backend: str

    def synchronize(self) -> None: ...

    def free_bytes(self) -> int: ...

    def release_memory(self) -> None: ...

    def event_ms(self, calls: Sequence[Call], hold_ms: float) -> list[float]:
        """Time on the device of each call, from cold caches, all of them in the queue by then."""

    def launches(self, call: Call) -> list[str]:
        """Names of the kernels, copies and fills that `call` puts on the device."""

    def facts(self) -> dict[str, object]:
        """Driver, CUDA and Triton versions."""


class Cuda:
    dry = False
    backend = "cuda"

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        cycles = 10_000_000
        times = [self._ms([lambda: torch.cuda._sleep(cycles)])[0] for _ in range(5)]
        self._cycles_per_ms = cycles / min(times)  # the clock rises from idle meanwhile

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        self.release_memory()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def release_memory(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def event_ms(self, calls: Sequence[Call], hold_ms: float) -> list[float]:
        self._scratch.add_(1)
        torch.cuda._sleep(int(min(hold_ms, MAX_HOLD_MS) * self._cycles_per_ms))
        return self._ms(calls)

    def _ms(self, calls: Sequence[Call]) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    def launches(self, call: Call) -> list[str]:
        self.synchronize()
        events = _trace(call, self.synchronize, ProfilerActivity.CUDA)
        return [event["name"] for event in events if event.get("cat") in _ON_DEVICE]

    def facts(self) -> dict[str, object]:
        return {"gpu": self.name, "driver": _driver(), **versions()}


class DryRun:
    dry = True
    name = DRY_RUN
    device = torch.device("cpu")

    def __init__(self) -> None:
        self._shim, self.how = stand_in()
        self.backend = "cpu" if self._shim is None else "cuda"

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 30

    def release_memory(self) -> None:
        pass

    def event_ms(self, calls: Sequence[Call], hold_ms: float) -> list[float]:
        times = [time.perf_counter()]
        for call in calls:
            call()
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(times)]

    def launches(self, call: Call) -> list[str]:
        """The launches of our kernels; torch's operators where there are none."""
        if self._shim is not None:
            self._shim.reset()
        events = _trace(call, self.synchronize, ProfilerActivity.CPU)
        ours = [launch.kernel for launch in self._shim.launches()] if self._shim else []
        return ours or [event["name"] for event in events if event.get("cat") == "cpu_op"]

    def facts(self) -> dict[str, object]:
        return {"gpu": self.name, "driver": "none", **versions()}


def stand_in() -> tuple[Any, str]:
    """The CUDA kernels compiled for the CPU, where tests/cuda_shim.py can make them."""
    folder = ROOT / "tests"
    try:
        if not (folder / "cuda_shim.py").exists():
            raise ImportError("there is no tests/cuda_shim.py")
        sys.path.append(str(folder))
        import cuda_shim  # type: ignore[import-not-found, unused-ignore]

        from fusedopt.backends import cuda  # type: ignore[attr-defined, unused-ignore]

        shim = cuda_shim.load()
        cuda._driver = shim.driver()
    except Exception as error:  # no compiler, or one that fails
        return None, f"backend cpu stands in ({type(error).__name__}: {error})"
    return shim, "the CUDA kernels run on the CPU, through the shim of the tests"


def _trace(call: Call, synchronize: Call, activity: ProfilerActivity) -> list[dict[str, Any]]:
    with profile(activities=[activity]) as profiler:
        call()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return sorted(events, key=lambda event: float(event.get("ts", 0)))


def _driver() -> str:
    return nvidia_smi("driver_version") or "unknown"


def nvidia_smi(fields: str) -> str:
    """What nvidia-smi says about the current GPU, or nothing where it cannot be run."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    command = [tool, f"--query-gpu=uuid,{fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    lines = [line for line in done.stdout.splitlines() if uuid in line] or done.stdout.splitlines()
    return lines[0].split(",", 1)[-1].strip() if done.returncode == 0 and lines else ""


def versions() -> dict[str, object]:
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return {"cuda": torch.version.cuda or "none", "triton": triton}
