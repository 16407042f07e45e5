"""Instructions per element of the CPU kernels, one thread.

python -m benchmarks instructions            rows go to benchmarks/results/local
python -m benchmarks instructions --quick    printed only: what CI runs

They are those of a small program without Python or torch, benchmarks/instructions.cpp, compiled
with the kernels as setup.py has them compiled. The instructions are those that valgrind's callgrind
sees the kernels execute (what they call in libc and libm is named apart), so they are the same at
every run. Each count has a bound in benchmarks/instructions.csv. It holds for one version of the
compiler: under another one counts are printed and not judged. The exit status is 1 where a count is
above its bound, or so far below it that the bound should be lowered (`--set-bounds`).

Times of the same kernels are those of `python -m benchmarks kernels`.
"""

from __future__ import annotations

import csv
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks import rows
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

    def is_of(self, driver: Driver) -> bool:
        """Of this machine, and of the same major version of the compiler."""
        same_compiler = major(self.compiler) == major(driver.compiler)
        return self.machine == driver.machine and same_compiler


# ---- the program ---------------------------------------------------------------------------------


def compile_driver(folder: Path, root: Path = ROOT) -> Driver:
    """With the sources in `root`, a checkout; by `CXX`, else the compiler of the bounds, else what
    there is."""
    setup = _setup(root)
    native, units = setup["build_native"], setup["MODULES"][0].units
    of_the_bounds = (f"g++-{major(bound.compiler).split()[1]}" for bound in read_bounds())
    env = {"CXX": next(filter(shutil.which, of_the_bounds), "")}
    env |= {name: os.environ[name] for name in ("PATH", "CXX") if name in os.environ}
    try:
        tool = native.with_openmp(native.find_cxx(env), env)
    except native.NotBuilt as problem:
        raise NotCounted(str(problem)) from None
    levels = [unit for unit in units if unit.simd and unit.machine in ("", tool.machine)]
    levels = [unit for unit in levels if unit.simd != "avx512"]  # valgrind does not run it
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
    return Driver(program, release(tool.version), tool.machine)


def _setup(root: Path) -> dict[str, Any]:
    """What setup.py defines: the modules, with their sources and flags."""
    try:
        import setuptools  # noqa: F401

        with mock.patch("setuptools.setup"), mock.patch.object(sys, "path", [*sys.path]):
            return runpy.run_path(str(root / "setup.py"))
    except (ImportError, OSError) as error:
        raise NotCounted(f"the flags of the build, in setup.py, cannot be read: {error}") from None


def release(version: str) -> str:
    """`gcc 12.2.0` from the first line of `c++ --version`."""
    found = re.findall(r"\d+\.\d+(?:\.\d+)?", version)
    return f"{'clang' if 'clang' in version else 'gcc'} {found[-1] if found else '0.0'}"


def major(compiler: str) -> str:
    return compiler.split(".")[0]


def run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        text = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
        raise NotCounted(f"{Path(command[0]).name} failed: {text}")
    return done.stdout


# ---- counting -----------------------------------------------------------------------------------


def count(
    driver: Driver, kernels: Sequence[str] = KERNELS, levels: Sequence[str] = ()
) -> list[Count]:
    """Of each kernel and instruction set that valgrind runs."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise NotCounted("valgrind is not on PATH")
    program = str(driver.program)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        levels = levels or run([valgrind, "-q", "--tool=none", program], folder).split()

        def callgrind(kernel: str, level: str, chunks: int) -> tuple[int, int]:
            out = folder / f"{kernel}.{level}.{chunks}"
            options = ["--toggle-collect=measured_call", "--compress-strings=no"]
            options += ["--compress-pos=no", f"--callgrind-out-file={out}"]
            command = [valgrind, "-q", "--tool=callgrind", *options, program]
            run([*command, level, kernel, str(chunks)], folder)
            counts = instructions_by_object(out.read_text())
            return counts.pop(program, 0), counts.total()

        def one(level: str, kernel: str) -> Count:
            few, many = (callgrind(kernel, level, chunks) for chunks in (FEW, MANY))
            small = re.search(r":tensors-of-(\d+)$", kernel)  # each of them a chunk of its own
            elements = (MANY - FEW) * (int(small[1]) if small else CHUNK)
            return Count(
                kernel, level, *((m - f) / elements for f, m in zip(few, many, strict=True))
            )

        wanted = [(level, kernel) for level in levels for kernel in kernels]
        return list(pool.map(lambda both: one(*both), wanted))


def instructions_by_object(profile: str) -> Counter[str]:
    """Executed instructions by the program or library they belong to, from callgrind's file."""
    counts: Counter[str] = Counter()
    current, is_call = "", False
    for line in profile.splitlines():
        if line.startswith("ob="):
            current = line.removeprefix("ob=")
        elif line.startswith("calls="):
            is_call = True  # the next line repeats what the callee has counted
        elif line[:1].isdigit():
            counts[current] += 0 if is_call else int(line.split()[1])
            is_call = False
    return counts


# ---- bounds -------------------------------------------------------------------------------------


def read_bounds(path: Path = BOUNDS) -> list[Bound]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        _, *lines = csv.reader(file)
    return [Bound(*words, float(count), float(bound)) for *words, count, bound in lines]


def write_bounds(counts: Sequence[Count], driver: Driver, path: Path = BOUNDS) -> None:
    """In the place of those of this machine and version of the compiler."""
    here = driver.machine, driver.compiler
    new = [Bound(c.kernel, c.level, *here, c.per_element, MARGIN * c.per_element) for c in counts]
    kept = [bound for bound in read_bounds(path) if not bound.is_of(driver)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Bound._fields)
        writer.writerows((*b[:4], f"{b.per_element:.4f}", f"{b.bound:.4f}") for b in (*kept, *new))


def verdict(measured: Count, driver: Driver, bounds: Sequence[Bound]) -> str:
    """`held`, `ABOVE ...`, `BELOW ...`, or why the count was not judged."""
    mine = [b for b in bounds if b[:3] == (measured.kernel, measured.level, driver.machine)]
    same = [bound.bound for bound in mine if bound.is_of(driver)]
    if not same:
        known = ", ".join(sorted({major(b.compiler) for b in mine})) or "no compiler"
        return f"not judged: the bound is for {known}"
    (bound,) = same
    if measured.per_element > bound:
        return f"ABOVE its bound of {bound:.4g}"
    if measured.per_element < SLACK * bound:
        return f"BELOW its bound of {bound:.4g} by over 10 %: lower it with --set-bounds"
    return "held"


# ---- the command --------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> Any:
    parser = rows.parser("instructions", __doc__)
    parser.add_argument("--set-bounds", action="store_true", help=f"write {BOUNDS.name} anew")
    rows.add_options(parser, "printed only")
    args = parser.parse_args(arguments)
    args.out = rows.destination(args)
    return args


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    args = parse(arguments)
    required = os.environ.get(REQUIRED) == "1"
    report = Report(rows.provenance() | {"threads": 1}, args.out)
    with tempfile.TemporaryDirectory() as folder:
        try:
            driver = compile_driver(Path(folder), root)
            counts = count(driver)
        except NotCounted as problem:
            print(f"instructions were not counted: {problem}")
            return int(required)
    if args.set_bounds:
        write_bounds(counts, driver)
    bounds = read_bounds()
    verdicts = [verdict(one, driver, bounds) for one in counts]
    print(f"compiled by {driver.compiler} for {driver.machine}")
    header = ("kernel", "SIMD", "instructions / element", "in libraries", "")
    lines = ((c.kernel, c.level, f"{c.per_element:.3f}", f"{c.in_libraries:.3f}") for c in counts)
    print(rows.markdown(header, ((*line, v) for line, v in zip(lines, verdicts, strict=True))))
    for one in counts:
        note = f"{driver.compiler}; callgrind; and {one.in_libraries:.3f} in libm and libc"
        report.add("instructions_per_element", "instructions", [one.per_element], note=note,
                   case=f"simd-{one.level}", pipeline=f"fusedopt_cpu:{one.kernel}")  # fmt: skip
    print(rows.told(args.out))
    failed = any(said.startswith(("ABOVE", "BELOW")) for said in verdicts)
    return int(failed or (required and any(said.startswith("not") for said in verdicts)))
