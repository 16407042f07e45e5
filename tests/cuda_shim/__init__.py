"""The CUDA backend on a machine without a GPU: csrc/cuda compiled against the runtime beside this
file. README.md says what that proves, and what it cannot.

``load()`` builds the kernels and their bindings as the module ``_cuda_shim`` and gives a ``Shim``;
``installed()`` makes it the driver of ``fusedopt.backends.cuda``, so that CPU tensors are served by
``backend="cuda"``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
RUNTIME = [HERE / name for name in ("blocks.cpp", "grid.cpp", "runtime.cpp")]
SELF_TEST = HERE / "self_test.cu"  # small kernels with known answers, and with mistakes

# The numeric contract, as the build has it (tests/cuda/test_cuda_shim_self.py compares).
NUMERIC_FLAGS = ("-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
SANITIZED = os.environ.get("FUSEDOPT_SHIM_SANITIZE", "")  # as for -fsanitize=


class NoShim(Exception):
    """Why the kernels cannot be compiled here."""


def _flags(sanitize: str) -> list[str]:
    flags = [*FLAGS, *NUMERIC_FLAGS]
    if not sanitize:
        return [*flags, "-O2"]
    flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"]
    return [*flags, "-fno-sanitize-recover=all"] if sanitize != "thread" else flags


def _command(source: Path, sanitize: str) -> list[str]:
    """How one source is compiled. What is not under test is not instrumented."""
    known = {"address": "-DSHIM_ASAN", "thread": "-DSHIM_TSAN"}
    flags = [known[name] for name in sanitize.split(",") if name in known]
    flags += ["-I", str(HERE), "-I", str(CSRC)]
    if source in RUNTIME:
        return [*_flags(""), "-g", *flags]
    if source.name != "bindings.cpp":
        # nvcc includes its runtime unasked
        return [*_flags(sanitize), *flags, "-x", "c++", "-include", "cuda_runtime.h"]
    import pybind11

    python = sysconfig.get_paths()["include"]
    return [
        *_flags(""), *flags, "-DFUSEDOPT_CUDA_MODULE=_cuda_shim",
        "-isystem", pybind11.get_include(), "-isystem", python,
    ]  # fmt: skip


def _key(sources: Sequence[Path], commands: Sequence[list[str]]) -> str:
    headers = sorted([*CSRC.rglob("*.*h"), *HERE.glob("*.h")])
    digest = hashlib.sha256(repr([*commands, platform.platform()]).encode())
    for path in [*sources, *headers]:
        digest.update(f"{path}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(name: str, sources: Sequence[Path], sanitize: str = SANITIZED) -> Path:
    """A shared library of ``sources`` and the runtime; made once for a state of the sources.

    Raises:
        NoShim: this machine cannot compile it; anything wrong with the sources is an error.
    """
    if platform.system() != "Linux":
        raise NoShim("the fake CUDA runtime is for Linux")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise NoShim("no C++ compiler")
    sources = [*sources, *RUNTIME]
    commands = [[*compiler.split(), *_command(source, sanitize)] for source in sources]
    folder = Path(tempfile.gettempdir(), f"fusedopt-shim-{os.getuid()}", _key(sources, commands))
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}.so"
    if library in _rejected:
        raise RuntimeError(_rejected[library])
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until closed: other workers wait for the first
        if not library.exists():
            _compile(library, sources, commands, sanitize)
    return library


_rejected: dict[Path, str] = {}  # so that the compiler has to say it only once


def _compile(
    library: Path, sources: Sequence[Path], commands: Sequence[list[str]], sanitize: str
) -> None:
    objects = [library.with_suffix(f".{index}.o") for index in range(len(sources))]
    # What a sanitizer needs before everything else (.ci/shim_sanitizers) is not for the compiler.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    jobs = [
        subprocess.Popen(
            [*command, "-c", str(source), "-o", str(target)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )
        for command, source, target in zip(commands, sources, objects, strict=True)
    ]  # fmt: skip
    messages = [job.communicate()[0] for job in jobs]
    if any(job.returncode for job in jobs):
        _rejected[library] = "the CUDA sources do not compile as C++:\n" + "\n".join(messages)
        raise RuntimeError(_rejected[library])
    # under another name until it is whole, since this may be killed
    unfinished = library.with_suffix(".part")
    link = [*commands[0][:1], "-shared", "-pthread", *map(str, objects), "-ldl", "-o"]
    sanitizer = [f"-fsanitize={sanitize}"] if sanitize else []
    subprocess.run([*link, str(unfinished), *sanitizer], check=True, env=env)
    unfinished.rename(library)


class _LaunchRecord(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_int64),
        ("stream", ctypes.c_int64),
        ("blocks", ctypes.c_int32),
        ("device", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Launch:
    kernel: str  # as the source has it, template arguments included
    blocks: int
    device: int
    stream: int


class Shim:
    """A library of ``build`` and its runtime."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))

    def reset(self) -> None:
        """No calls so far, no failures to come, a device like any other."""
        self.functions.shim_reset()

    def set(self, **settings: int) -> None:
        """See ``setting()`` in runtime.cpp for the names."""
        for name, value in settings.items():
            self.functions.shim_set(name.encode(), value)

    def fail(self, function: str, error: int, count: int = 1) -> None:
        """Call ``count`` of ``function`` from now on fails; of any function if that is empty."""
        self.functions.shim_fail(function.encode(), count, error)

    def calls(self, function: str = "") -> int:
        calls: int = self.functions.shim_calls(function.encode())
        return calls

    def last_error(self) -> int:
        """What cudaGetLastError would say."""
        error: int = self.functions.shim_last_error()
        return error

    def current_device(self) -> int:
        device: int = self.functions.shim_current_device()
        return device

    def guard(self, address: int, n_bytes: int) -> None:
        """Kill the process if the host touches these whole pages before the next ``reset``."""
        self.functions.shim_guard(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes))

    def make_current(self, device: int) -> None:
        self.functions.shim_make_current(device)

    def launches(self) -> list[Launch]:
        """Since the last ``reset``, failed ones excepted."""
        count = self.functions.shim_launches(None, 0)
        records = (_LaunchRecord * count)()
        self.functions.shim_launches(records, count)
        names = kernel_names(self.path)
        return [Launch(names[r.kernel], r.blocks, r.device, r.stream) for r in records]


@functools.cache
def kernel_names(library: Path) -> dict[int, str]:
    """Functions of ``library`` by address; hidden ones are in no table the runtime could ask."""
    words = ["nm", "--demangle", "--defined-only", str(library)]
    lines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
    symbols = (line.split(maxsplit=2) for line in lines)
    return {int(s[0], 16): _short(s[2]) for s in symbols if len(s) == 3}


def _short(function: str) -> str:
    for noise in ("(anonymous namespace)::", "fusedopt::", "void "):
        function = function.replace(noise, "")
    return function.partition("(")[0]


# ---- the CUDA backend ---------------------------------------------------------------------------


class CudaShim(Shim):
    """The kernels of csrc/cuda and their bindings."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        spec = importlib.util.spec_from_file_location("_cuda_shim", path)
        assert spec is not None and spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    def driver(self) -> Any:
        """For ``fusedopt.backends.cuda``: this module drives the CPU's tensors."""
        from fusedopt.backends import cuda

        class HostDriver(cuda.CudaDriver):
            device_type = "cpu"
            pins = False

            def stream(self, device: object) -> int:
                return 0

            def capturing(self, device: object) -> bool:
                return False

            def index(self, device: object) -> int:
                return 0

            def record_stream(self, tensor: object, device: object) -> None:
                pass

        return HostDriver(self.module)


@functools.cache
def load() -> CudaShim:
    """The shim of csrc/cuda, built if need be. Raises NoShim where that cannot be."""
    folder = CSRC / "cuda"
    if not folder.is_dir():
        raise NoShim("the CUDA sources are not here")
    return CudaShim(build("_cuda_shim", sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])))


def driver() -> Any:
    """For ``fusedopt.backends.cuda.driver``."""
    return load().driver()


@contextlib.contextmanager
def installed() -> Iterator[CudaShim]:
    """``backend="cuda"`` serves CPU tensors through the shim."""
    from fusedopt.backends import cuda

    shim, before = load(), cuda.driver.made
    shim.reset()
    cuda.driver.made = shim.driver()
    try:
        yield shim
    finally:
        cuda.driver.made = before
        shim.reset()


def fixture() -> Iterator[CudaShim]:
    """Body of a pytest fixture."""
    try:
        load()
    except NoShim as reason:
        pytest.skip(str(reason))
    with installed() as shim:
        yield shim
