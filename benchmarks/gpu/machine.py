"""The machine that is measured: its clocks, and what can be asked of it.

`Cuda` is a GPU. `DryRun` goes through the same calls on the CPU, with a host clock in the place of
events: its figures mean nothing and are marked as such wherever they appear.
"""

from __future__ import annotations

import gc
import importlib
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

from benchmarks.row_files import ROOT

DRY_RUN = "DRY RUN - not a measurement"
FLUSH_BYTES = 256 << 20  # several times the L2 cache
MAX_HOLD_MS = 50.0
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories in the profiler's trace

Call = Callable[[], object]


class Machine(Protocol):
    name: str
    dry: bool
    device: torch.device
    backends: dict[str, str]  # what serves as `cuda` and as `triton`

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

    def __init__(self) -> None:
        self.backends = {"cuda": "cuda", "triton": "triton"}
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
        self._shim, shim_how = _stand_in(_shim)
        self._interpreter, interpreter_how = _stand_in(_interpreter)
        self.how = f"CUDA: {shim_how}; Triton: {interpreter_how}"
        self.backends = {
            "cuda": "cpu" if self._shim is None else "cuda",
            "triton": "cpu" if self._interpreter is None else "triton",
        }

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
        if self._interpreter is not None:
            self._interpreter.launched.clear()
        events = _trace(call, self.synchronize, ProfilerActivity.CPU)
        ours = [launch.kernel for launch in self._shim.launches()] if self._shim else []
        if self._interpreter is not None:
            ours += [name for name, _ in self._interpreter.launched]
        return ours or [event["name"] for event in events if event.get("cat") == "cpu_op"]

    def facts(self) -> dict[str, object]:
        return {"gpu": self.name, "driver": "none", **versions()}


def find_machine(dry: bool) -> Machine:
    """The current GPU, or what stands in for one."""
    if dry:
        machine = DryRun()
        print(f"{machine.name}: {machine.how}")
        return machine
    if not torch.cuda.is_available():
        raise SystemExit("torch.cuda.is_available() is False: no NVIDIA GPU; --dry-run needs none")
    return Cuda()


def no_triton(machine: Machine) -> str | None:
    """Why there is nothing of the Triton backend to measure."""
    if machine.backends["triton"] != "triton":
        return "the CPU backend stands in for it"
    module = importlib.import_module("fusedopt.backends.triton")
    reason: str | None = module.unavailable_reason()
    return reason


def _stand_in(load: Callable[[], tuple[Any, str]]) -> tuple[Any, str]:
    """What `load` gives, with the helpers of the tests on the path, or why it gives nothing."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return load()
    except Exception as error:  # no compiler, or one that fails; no Triton
        return None, f"backend cpu stands in ({type(error).__name__}: {error})"


def _shim() -> tuple[Any, str]:
    import cuda_shim  # type: ignore[import-not-found, unused-ignore]

    from fusedopt.backends import cuda  # type: ignore[attr-defined, unused-ignore]

    shim = cuda_shim.load()
    cuda.driver.made = shim.driver()
    return shim, "the kernels compiled for the CPU"


def _interpreter() -> tuple[Any, str]:
    import triton_interpreter  # type: ignore[import-not-found, unused-ignore]

    from fusedopt.backends import triton  # type: ignore[attr-defined, unused-ignore]

    triton_interpreter.kernels()
    triton.driver.made = triton_interpreter.Interpreter()
    return triton.driver.made, "the kernels in Triton's interpreter"


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
