"""The machine that is measured: its clock, and what can be asked of it."""

from __future__ import annotations

import gc
import importlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.rows import RESULTS, ROOT, Report, destination, provenance

DRY_RUN = "DRY RUN - not a measurement"
FLUSH_BYTES = 256 << 20  # several times the L2 cache
MAX_HOLD_MS = 50.0
SAMPLES = 40  # of a call that is timed by itself

Call = Callable[[], object]


class Machine:
    """The current GPU."""

    dry = False

    def __init__(self) -> None:
        self.backends = {"cuda": "cuda", "triton": "triton"}  # what serves as these
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        cycles = 10_000_000
        times = [self._ms(lambda: torch.cuda._sleep(cycles)) for _ in range(5)]
        self._cycles_per_ms = cycles / min(times)  # the clock rises from idle meanwhile

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        self.release_memory()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def release_memory(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def event_ms(self, call: Call, hold_ms: float) -> float:
        """Time on the device, from cold caches, all of it in the queue by then."""
        self._scratch.add_(1)
        torch.cuda._sleep(int(min(hold_ms, MAX_HOLD_MS) * self._cycles_per_ms))
        return self._ms(call)

    def _ms(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def bench(self, call: Call) -> list[float]:
        """Times on the device in ms, from cold caches."""
        try:
            from triton.testing import do_bench
        except ImportError:
            return [self.event_ms(call, 0.2) for _ in range(SAMPLES)]
        times: list[float] = do_bench(call, return_mode="all")
        return times[:: -(-len(times) // SAMPLES)]

    def launches(self, call: Call) -> list[str]:
        """Names of the kernels, copies and fills that `call` puts on the device."""
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            self.synchronize()
        return launched(profiler.events(), DeviceType.CUDA)


def launched(events: Iterable[Any], where: DeviceType) -> list[str]:
    """The names of what ran there, in order of time; marks of ranges are none."""
    ran = [e for e in events if e.device_type == where and not e.is_user_annotation]
    return [event.name for event in sorted(ran, key=lambda event: event.time_range.start)]


class DryRun(Machine):
    """Goes through the same calls on the CPU, with a host clock in the place of events: its figures
    mean nothing and are marked as such wherever they appear.

    CUDA's kernels run through the shim of the tests, Triton's in its interpreter; the CPU backend
    stands in for either where that does not load.
    """

    dry = True
    name = DRY_RUN
    device = torch.device("cpu")
    backends = {"cuda": "cpu", "triton": "cpu"}  # noqa: RUF012
    _shim: Any = None
    _interpreter: Any = None

    def __init__(self) -> None:
        if str(ROOT / "tests") not in sys.path:  # where the helpers of the tests are
            sys.path.append(str(ROOT / "tests"))
        self.backends = dict(self.backends)
        for backend, load in (("cuda", self._load_shim), ("triton", self._load_interpreter)):
            try:
                load()
                self.backends[backend] = backend
            except Exception as error:  # no compiler, or one that fails; no Triton
                print(f"{backend}: backend cpu stands in ({type(error).__name__}: {error})")

    def _load_shim(self) -> None:
        import cuda_shim

        from fusedopt.backends import cuda

        shim = cuda_shim.load()
        cuda.driver.made, self._shim = shim.driver(), shim

    def _load_interpreter(self) -> None:
        import triton_interpreter

        from fusedopt.backends import triton

        triton_interpreter.kernels()
        triton.driver.made = self._interpreter = triton_interpreter.Interpreter()

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 30

    def release_memory(self) -> None:
        pass

    def event_ms(self, call: Call, hold_ms: float) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def bench(self, call: Call) -> list[float]:
        return [self.event_ms(call, 0.0) for _ in range(2)]

    def launches(self, call: Call) -> list[str]:
        """The launches of our kernels; torch's operators where there are none."""
        if self._shim is not None:
            self._shim.reset()
        if self._interpreter is not None:
            self._interpreter.launched.clear()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
        ours = [launch.kernel for launch in self._shim.launches()] if self._shim else []
        if self._interpreter is not None:
            ours += [name for name, _ in self._interpreter.launched]
        return ours or launched(profiler.events(), DeviceType.CPU)


def find_machine(dry: bool) -> Machine:
    """The current GPU, or what stands in for one."""
    if dry:
        return DryRun()
    if not torch.cuda.is_available():
        raise SystemExit("torch.cuda.is_available() is False: no NVIDIA GPU; --dry-run needs none")
    return Machine()


def no_triton(machine: Machine) -> str | None:
    """Why there is nothing of the Triton backend to measure."""
    if machine.backends["triton"] != "triton":
        return "the CPU backend stands in for it"
    reason: str | None = importlib.import_module("fusedopt.backends.triton").unavailable_reason()
    return reason


# ---- rows ----------------------------------------------------------------------------------------


class DeviceReport(Report):
    """Rows carry the copy's bandwidth in this run; those of a dry run say that they are."""

    def __init__(self, machine: Machine, path: Path | None) -> None:
        super().__init__(provenance(machine.name, versions()), path)
        self.ceiling_gb_s = ""
        self._dry = machine.dry

    def add(self, figure: str, unit: str, *samples: Iterable[float], **columns: object) -> None:
        columns.setdefault("ceiling_gb_s", self.ceiling_gb_s)
        if self._dry:
            columns["case"] = f"dry-run:{columns['case']}"
            columns["note"] = f"{DRY_RUN}; {columns.get('note', '')}"
        super().add(figure, unit, *samples, **columns)


def output(args: Any, machine: Machine) -> Path | None:
    """Where the rows go."""
    if machine.dry:
        return args.out or Path(tempfile.mkdtemp(prefix="fusedopt-")) / "dry-run.csv"
    return destination(args, machine.name)


def refuse_results(parser: Any, args: Any) -> None:
    if args.dry_run and args.record:
        parser.error("--dry-run measures nothing: there is nothing to --record")
    if args.dry_run and args.out is not None and args.out.resolve().is_relative_to(RESULTS):
        parser.error(f"--dry-run measures nothing: --out {args.out} is where results are")


def versions() -> str:
    driver = "none"
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        driver = (done.stdout.splitlines() or ["unknown"])[0].strip()
    return f"driver {driver}, CUDA {torch.version.cuda or 'none'}, Triton {triton}"
