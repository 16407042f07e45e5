"""A small program around the CPU kernels, without Python or torch, for what watches programs.

Compiled from benchmarks/instructions.cpp and the kernels, with the flags that setup.py gives them.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.report import ROOT

CHUNK = 8192  # elements
FEW, MANY = 4, 12  # chunks; the difference of two counts is free of what happens once
SMALL_TENSORS = 1024  # of those kernels whose name says so, for a clock to have something to see
CALLS = 200
PERF_EVENT = "cycles:u"
PERF_SAMPLES = 5

# What distributions switch on by themselves, each with instructions of its own.
_PLAIN = ("-fcf-protection=none", "-fno-stack-protector", "-U_FORTIFY_SOURCE")


def in_a_chunk(kernel: str) -> int:
    """Elements: those of a whole tensor where the kernel's name ends in `tensors-of-8`."""
    small = re.search(r":tensors-of-(\d+)$", kernel)
    return int(small[1]) if small else CHUNK


def timed_chunks(kernel: str) -> int:
    return FEW if in_a_chunk(kernel) == CHUNK else SMALL_TENSORS


def timed_elements(kernel: str) -> int:
    return timed_chunks(kernel) * in_a_chunk(kernel)


class NotCounted(Exception):
    """Why nothing can be counted here."""


@dataclass(frozen=True)
class Driver:
    """benchmarks/instructions.cpp, linked with the kernels as setup.py has them compiled."""

    program: Path
    compiler: str  # say gcc 12.2.0
    machine: str  # say x86_64

    def command(self, level: str, kernel: str, chunks: int, calls: int) -> list[str]:
        return [str(self.program), level, kernel, str(chunks), str(calls)]


def compile_driver(folder: Path, compiler: str = "", root: Path = ROOT) -> Driver:
    """With the sources in `root`, a checkout; by `CXX`, else `compiler`, else what there is."""
    setup = _setup(root)
    native, units = setup["build_native"], setup["MODULES"][0].units
    env = {name: os.environ[name] for name in ("PATH", "CXX") if name in os.environ}
    env.setdefault("CXX", compiler)
    try:
        tool = native.with_openmp(native.find_cxx(env), env)
    except native.NotBuilt as problem:
        raise NotCounted(str(problem)) from None
    levels = [unit for unit in units if unit.simd and unit.machine in ("", tool.machine)]
    have = [f"-DFUSEDOPT_HAVE_{unit.simd.upper()}" for unit in levels]
    plain = _PLAIN if tool.machine == "x86_64" else _PLAIN[1:]
    words = [*tool.command, *tool.compile_flags, *plain]
    jobs = {
        f"kernels.{unit.simd}": [f"-DFUSEDOPT_SIMD={unit.simd}", *unit.flags, "-c", unit.source]
        for unit in levels
    }
    jobs["dispatch"] = [*have, "-c", "csrc/cpu/dispatch.cpp"]
    jobs["driver"] = ["-c", str(ROOT / "benchmarks" / "instructions.cpp")]
    objects = [str(folder / f"{name}.o") for name in jobs]
    commands = [[*words, *job, "-o", out] for job, out in zip(jobs.values(), objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: run(command, root), commands))
    program = folder / "instructions"
    link = [flag for flag in tool.link_flags if flag != "-shared"]
    run([*tool.command, *objects, *link, "-o", str(program)], root)
    return Driver(program, _release(tool.version), tool.machine)


def _setup(root: Path) -> dict[str, Any]:
    """What setup.py defines: the modules, with their sources and flags."""
    try:
        import setuptools  # noqa: F401

        with mock.patch("setuptools.setup"), mock.patch.object(sys, "path", [*sys.path]):
            return runpy.run_path(str(root / "setup.py"))
    except (ImportError, OSError) as error:
        raise NotCounted(f"the flags of the build, in setup.py, cannot be read: {error}") from None


def _release(version: str) -> str:
    """`gcc 12.2.0` from the first line of `c++ --version`."""
    found = re.findall(r"\d+\.\d+(?:\.\d+)?", version)
    return f"{'clang' if 'clang' in version else 'gcc'} {found[-1] if found else '0.0'}"


def major(compiler: str) -> str:
    return compiler.split(".")[0]


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        text = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
        raise NotCounted(f"{Path(command[0]).name} failed: {text}")
    return done


def cycles(driver: Driver, kernel: str, level: str) -> tuple[str, list[float], str]:
    """Unit, samples, and a note on the clock."""
    counted = _counted_cycles(driver, kernel, level)
    if counted:
        return "cycles", counted, "perf stat, user mode"
    done = run(driver.command(level, kernel, timed_chunks(kernel), CALLS), Path())
    ticks = [int(line) / timed_elements(kernel) for line in done.stdout.split()][CALLS // 10 :]
    unit = "tsc ticks" if driver.machine == "x86_64" else "ns"
    clock = "the time-stamp counter, at its own constant rate" if unit != "ns" else "a clock"
    return unit, ticks, f"no hardware counters here: {clock}"


def _counted_cycles(driver: Driver, kernel: str, level: str) -> list[float]:
    """By perf stat, per element, each the difference of two runs; empty where it counts nothing."""
    perf = shutil.which("perf")
    samples = []
    for _ in range(PERF_SAMPLES if perf else 0):
        counts = []
        for calls in (CALLS, 2 * CALLS):
            command = [str(perf), "stat", "-x,", "-e", PERF_EVENT]
            command += driver.command(level, kernel, timed_chunks(kernel), calls)
            said = subprocess.run(command, capture_output=True, text=True).stderr
            found = re.search(rf"^(\d+),[^,]*,{PERF_EVENT},", said, re.MULTILINE)
            if found is None:
                return []
            counts.append(int(found[1]))
        samples.append((counts[1] - counts[0]) / (CALLS * timed_elements(kernel)))
    return samples
