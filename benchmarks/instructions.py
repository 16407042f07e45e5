"""Instructions and cycles per element of the CPU kernels, one thread, tensors in the cache.

python -m benchmarks instructions            rows go to benchmarks/results/local
python -m benchmarks instructions --quick    the counts alone, printed only: what CI runs

They are those of a small program without Python or torch, benchmarks/instructions.cpp, compiled
with the kernels as setup.py has them compiled. The instructions are those that valgrind's callgrind
sees the kernels execute (what they call in libc and libm is named apart), so they are the same at
every run. Each count has a bound in benchmarks/instructions.csv. It holds for one version of the
compiler: under another one counts are printed and not judged. The exit status is 1 where a count is
above its bound, or so far below it that the bound should be lowered (`--set-bounds`).
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks import arguments as args_of, rows
from benchmarks.rows import ROOT, Report

KERNELS = (
    "reduce:float32",
    "reduce:bfloat16",
    "update:adamw:float32",
    "update:adamw:bfloat16",  # with masters
    "update:sgd-momentum:float32",
    "reduce:float32:tensors-of-8",
    "update:adamw:float32:tensors-of-8",
)
CHUNK = 8192  # elements
FEW, MANY = 4, 12  # chunks; the difference of two counts is free of what happens once
SMALL_TENSORS = 1024  # of those kernels whose name says so, for a clock to have something to see
CALLS, PERF_SAMPLES, PERF_EVENT = 200, 5, "cycles:u"
# What distributions switch on by themselves, each with instructions of its own.
_PLAIN = ("-fcf-protection=none", "-fno-stack-protector", "-U_FORTIFY_SOURCE")

BOUNDS = ROOT / "benchmarks" / "instructions.csv"
MARGIN = 1.03  # bound over count when it is set
SLACK = 0.90  # a count below this share of its bound leaves room for a regression to hide in
REQUIRED = "FUSEDOPT_REQUIRE_VALGRIND"


class NotCounted(Exception):
    """Why nothing can be counted here."""


class Driver(NamedTuple):
    """benchmarks/instructions.cpp, linked with the kernels."""

    program: Path
    compiler: str  # say gcc 12.2.0
    machine: str  # say x86_64

    def command(self, level: str, kernel: str, chunks: int, calls: int) -> list[str]:
        return [str(self.program), level, kernel, str(chunks), str(calls)]


class Count(NamedTuple):
    kernel: str
    level: str
    per_element: float  # in the kernels themselves
    in_libraries: float  # in what they call: libm's fmaf, libc's memcmp


class Bound(NamedTuple):
    kernel: str
    level: str
    machine: str
    compiler: str
    per_element: float
    bound: float


def in_a_chunk(kernel: str) -> int:
    """Elements: those of a whole tensor where the kernel's name ends in `tensors-of-8`."""
    small = re.search(r":tensors-of-(\d+)$", kernel)
    return int(small[1]) if small else CHUNK


def timed_chunks(kernel: str) -> int:
    return FEW if in_a_chunk(kernel) == CHUNK else SMALL_TENSORS


# ---- the program ---------------------------------------------------------------------------------


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
    jobs = {
        f"kernels.{unit.simd}": [f"-DFUSEDOPT_SIMD={unit.simd}", *unit.flags, "-c", unit.source]
        for unit in levels
    }
    jobs["dispatch"] = [*have, "-c", "csrc/cpu/dispatch.cpp"]
    jobs["driver"] = ["-c", str(ROOT / "benchmarks" / "instructions.cpp")]
    words = [*tool.command, *tool.compile_flags, *plain]
    objects = {str(folder / f"{name}.o"): job for name, job in jobs.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda out: run([*words, *objects[out], "-o", out], root), objects))
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


# ---- counting -----------------------------------------------------------------------------------


def count(
    driver: Driver, kernels: Sequence[str] = KERNELS, levels: Sequence[str] = ()
) -> list[Count]:
    """Of each kernel and instruction set that valgrind runs; that excludes AVX-512."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise NotCounted("valgrind is not on PATH")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        levels = (
            levels
            or run([valgrind, "-q", "--tool=none", str(driver.program)], folder).stdout.split()
        )
        wanted = [(kernel, level) for level in levels for kernel in kernels]
        return list(pool.map(lambda both: _count(valgrind, driver, *both, folder), wanted))


def _count(valgrind: str, driver: Driver, kernel: str, level: str, folder: Path) -> Count:
    own, libraries = [], []
    for chunks in (FEW, MANY):
        out = folder / f"{kernel}.{level}.{chunks}"
        command = [valgrind, "-q", "--tool=callgrind", "--toggle-collect=measured_call"]
        command += [f"--callgrind-out-file={out}", *driver.command(level, kernel, chunks, 1)]
        run(command, folder)
        counts = instructions_by_object(out.read_text())
        own.append(counts.pop(str(driver.program), 0))
        libraries.append(sum(counts.values()))
    elements = (MANY - FEW) * in_a_chunk(kernel)
    return Count(kernel, level, *((many - few) / elements for few, many in (own, libraries)))


def instructions_by_object(profile: str) -> dict[str, int]:
    """Executed instructions by the program or library they belong to, from callgrind's file."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    current, is_call = "", False
    for line in profile.splitlines():
        named = re.match(r"(c?ob)=(\(\d+\))(?: (.*))?$", line)
        if named:
            if named[3]:
                names[named[2]] = named[3]
            if named[1] == "ob":
                current = names[named[2]]
        elif line.startswith("calls="):
            is_call = True  # the next line repeats what the callee has counted
        elif re.match(r"[+\-*\d]", line):
            if not is_call:
                counts[current] = counts.get(current, 0) + int(line.split()[1])
            is_call = False
    return counts


def cycles(driver: Driver, kernel: str, level: str) -> tuple[str, list[float], str]:
    """Unit, samples, and a note on the clock."""
    counted = _counted_cycles(driver, kernel, level)
    if counted:
        return "cycles", counted, "perf stat, user mode"
    chunks = timed_chunks(kernel)
    done = run(driver.command(level, kernel, chunks, CALLS), Path())
    elements = chunks * in_a_chunk(kernel)
    ticks = [int(line) / elements for line in done.stdout.split()][CALLS // 10 :]
    if driver.machine != "x86_64":
        return "ns", ticks, "no hardware counters here: a clock"
    clock = "the time-stamp counter, at its own constant rate"
    return "tsc ticks", ticks, f"no hardware counters here: {clock}"


def _counted_cycles(driver: Driver, kernel: str, level: str) -> list[float]:
    """By perf stat, per element, each the difference of two runs; empty where it counts nothing."""
    perf, chunks = shutil.which("perf"), timed_chunks(kernel)
    samples = []
    for _ in range(PERF_SAMPLES if perf else 0):
        counts = []
        for calls in (CALLS, 2 * CALLS):
            command = [str(perf), "stat", "-x,", "-e", PERF_EVENT]
            command += driver.command(level, kernel, chunks, calls)
            said = subprocess.run(command, capture_output=True, text=True).stderr
            found = re.search(rf"^(\d+),[^,]*,{PERF_EVENT},", said, re.MULTILINE)
            if found is None:
                return []
            counts.append(int(found[1]))
        samples.append((counts[1] - counts[0]) / (CALLS * chunks * in_a_chunk(kernel)))
    return samples


# ---- bounds -------------------------------------------------------------------------------------


def read_bounds(path: Path = BOUNDS) -> list[Bound]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        _, *lines = csv.reader(file)
    return [Bound(*words, float(count), float(bound)) for *words, count, bound in lines]


def _compiler_of_the_bounds() -> str:
    names = (f"g++-{major(bound.compiler).split()[1]}" for bound in read_bounds())
    return next(filter(shutil.which, names), "")


def write_bounds(counts: Sequence[Count], driver: Driver, path: Path = BOUNDS) -> None:
    """In the place of those of this machine and version of the compiler."""
    same = (driver.machine, major(driver.compiler))
    kept = [b for b in read_bounds(path) if (b.machine, major(b.compiler)) != same]
    here = driver.machine, driver.compiler
    new = [Bound(c.kernel, c.level, *here, c.per_element, MARGIN * c.per_element) for c in counts]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Bound._fields)
        writer.writerows((*b[:4], f"{b.per_element:.4f}", f"{b.bound:.4f}") for b in (*kept, *new))


def verdict(measured: Count, driver: Driver, bounds: Sequence[Bound]) -> str:
    """`held`, `ABOVE ...`, `BELOW ...`, or why the count was not judged."""
    mine = [b for b in bounds if b[:3] == (measured.kernel, measured.level, driver.machine)]
    same = [b for b in mine if major(b.compiler) == major(driver.compiler)]
    if not same:
        known = ", ".join(sorted({f"{major(b.compiler)}" for b in mine})) or "no compiler"
        return f"not judged: the bound is for {known}"
    (bound,) = same
    if measured.per_element > bound.bound:
        return f"ABOVE its bound of {bound.bound:.4g}"
    if measured.per_element < SLACK * bound.bound:
        return f"BELOW its bound of {bound.bound:.4g} by over 10 %: lower it with --set-bounds"
    return "held"


# ---- the command --------------------------------------------------------------------------------


def add_figures(report: Report, counts: Sequence[Count], driver: Driver) -> None:
    """The counts, and the cycles at every instruction set of this CPU."""
    for c in counts:
        note = f"{driver.compiler}; callgrind; and {c.in_libraries:.3f} in libm and libc"
        report.add("instructions_per_element", "instructions", [c.per_element], note=note,
                   case=f"simd-{c.level}", pipeline=f"fusedopt_cpu:{c.kernel}")  # fmt: skip
    for level in run([str(driver.program)], Path()).stdout.split():
        for kernel in KERNELS:
            unit, samples, note = cycles(driver, kernel, level)
            note = (
                f"{driver.compiler}; {timed_chunks(kernel) * in_a_chunk(kernel)} elements; {note}"
            )
            report.add("cycles_per_element", unit, samples, note=note,
                       case=f"simd-{level}", pipeline=f"fusedopt_cpu:{kernel}")  # fmt: skip


def table(counts: Sequence[Count], verdicts: Sequence[str]) -> str:
    header = ("kernel", "SIMD", "instructions / element", "in libraries", "")
    pairs = zip(counts, verdicts, strict=True)
    return rows.markdown(
        header, ((*c[:2], f"{c[2]:.3f}", f"{c[3]:.3f}", said) for c, said in pairs)
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = args_of.parser("instructions", __doc__)
    parser.add_argument("--set-bounds", action="store_true", help=f"write {BOUNDS.name} anew")
    rows.add_options(parser, "the counts alone")
    args = parser.parse_args(arguments)
    args.out = rows.destination(args)
    return args


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    args = parse(arguments)
    required = os.environ.get(REQUIRED) == "1"
    report = Report(rows.provenance() | {"threads": 1}, args.out)
    with tempfile.TemporaryDirectory() as folder:
        try:
            driver = compile_driver(Path(folder), _compiler_of_the_bounds(), root)
            counts = count(driver)
        except NotCounted as problem:
            print(f"instructions were not counted: {problem}")
            return int(required)
        if args.set_bounds:
            write_bounds(counts, driver)
        bounds = read_bounds()
        verdicts = [verdict(c, driver, bounds) for c in counts]
        print(f"compiled by {driver.compiler} for {driver.machine}\n{table(counts, verdicts)}")
        if args.out is not None:
            add_figures(report, counts, driver)
            clocked = [f for f in report.figures() if f["figure"] == "cycles_per_element"]
            print("\n" + rows.table(clocked))
    print(rows.told(args.out))
    failed = any(said.startswith(("ABOVE", "BELOW")) for said in verdicts)
    return int(failed or (required and any(said.startswith("not") for said in verdicts)))
