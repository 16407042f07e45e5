"""Instructions and cycles per element of the CPU kernels, one thread, tensors in the cache.

python -m benchmarks instructions            rows go to benchmarks/results/local
python -m benchmarks instructions --quick    the counts alone, printed only: what CI runs

The instructions are those that valgrind's callgrind sees the kernels execute (what they call in
libc and libm is named apart), so they are the same at every run. Each count has a bound in
benchmarks/instructions.csv. It holds for one version of the compiler: under another one counts are
printed and not judged. The exit status is 1 where a count is above its bound, or so far below it
that the bound should be lowered (`--set-bounds`).
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figures, table as figure_table
from benchmarks.kernel_program import (
    FEW,
    MANY,
    Driver,
    NotCounted,
    compile_driver,
    cycles,
    in_a_chunk,
    major,
    run,
    timed_elements,
)
from benchmarks.report import provenance
from benchmarks.row_files import ROOT, add_options, destination, told

KERNELS = (
    "reduce:float32",
    "reduce:bfloat16",
    "update:adamw:float32",
    "update:adamw:bfloat16",  # with masters
    "update:sgd-momentum:float32",
    "reduce:float32:tensors-of-8",
    "update:adamw:float32:tensors-of-8",
)
BOUNDS = ROOT / "benchmarks" / "instructions.csv"
MARGIN = 1.03  # bound over count when it is set
SLACK = 0.90  # a count below this share of its bound leaves room for a regression to hide in
REQUIRED = "FUSEDOPT_REQUIRE_VALGRIND"


@dataclass(frozen=True)
class Count:
    kernel: str
    level: str
    per_element: float  # in the kernels themselves
    in_libraries: float  # in what they call: libm's fmaf, libc's memcmp


@dataclass(frozen=True)
class Bound:
    kernel: str
    level: str
    machine: str
    compiler: str
    per_element: float
    bound: float


# ---- counting -----------------------------------------------------------------------------------


def count(
    driver: Driver, kernels: Sequence[str] = KERNELS, levels: Sequence[str] = ()
) -> list[Count]:
    """Of each kernel and instruction set that valgrind runs; that excludes AVX-512."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise NotCounted("valgrind is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        command = [valgrind, "-q", "--tool=none", str(driver.program)]
        levels = levels or run(command, Path(folder)).stdout.split()
        wanted = [(kernel, level) for level in levels for kernel in kernels]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(
                pool.map(lambda w: _count(valgrind, driver, w[0], w[1], Path(folder)), wanted)
            )


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
    per_element = [(many - few) / elements for few, many in (own, libraries)]
    return Count(kernel, level, *per_element)


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


# ---- bounds -------------------------------------------------------------------------------------


def read_bounds(path: Path = BOUNDS) -> list[Bound]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Bound(
                row["kernel"],
                row["level"],
                row["machine"],
                row["compiler"],
                float(row["per_element"]),
                float(row["bound"]),
            )
            for row in csv.DictReader(file)
        ]


def _compiler_of_the_bounds() -> str:
    for bound in read_bounds():
        name = f"g++-{major(bound.compiler).split()[1]}"
        if shutil.which(name):
            return name
    return ""


def write_bounds(counts: Sequence[Count], driver: Driver, path: Path = BOUNDS) -> None:
    """In the place of those of this machine and version of the compiler."""
    same = (driver.machine, major(driver.compiler))
    kept = [b for b in read_bounds(path) if (b.machine, major(b.compiler)) != same]
    new = [
        Bound(c.kernel, c.level, driver.machine, driver.compiler, c.per_element, bound)
        for c in counts
        for bound in [c.per_element * MARGIN]
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Bound.__dataclass_fields__)
        for b in (*kept, *new):
            figures = f"{b.per_element:.4f}", f"{b.bound:.4f}"
            writer.writerow((b.kernel, b.level, b.machine, b.compiler, *figures))


def verdict(measured: Count, driver: Driver, bounds: Sequence[Bound]) -> str:
    """`held`, `ABOVE ...`, `BELOW ...`, or why the count was not judged."""
    mine = [b for b in bounds if (b.kernel, b.level) == (measured.kernel, measured.level)]
    mine = [b for b in mine if b.machine == driver.machine]
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


def add_figures(figures: Figures, counts: Sequence[Count], driver: Driver) -> None:
    """The counts, and the cycles at every instruction set of this CPU."""
    for c in counts:
        name = "instructions_per_element"
        note = f"{driver.compiler}; callgrind; and {c.in_libraries:.3f} in libm and libc"
        where = f"simd-{c.level}", f"fusedopt_cpu:{c.kernel}"
        figures.add(*where, name, "instructions", [c.per_element], note)
    for level in run([str(driver.program)], Path()).stdout.split():
        for kernel in KERNELS:
            unit, samples, note = cycles(driver, kernel, level)
            note = f"{driver.compiler}; {timed_elements(kernel)} elements; {note}"
            where = f"simd-{level}", f"fusedopt_cpu:{kernel}"
            figures.add(*where, "cycles_per_element", unit, samples, note)
    figures.save()


def table(counts: Sequence[Count], verdicts: Sequence[str]) -> str:
    lines = ["| kernel | SIMD | instructions / element | in libraries | |", "|---|---|---|---|---|"]
    lines += [
        f"| {c.kernel} | {c.level} | {c.per_element:.3f} | {c.in_libraries:.3f} | {said} |"
        for c, said in zip(counts, verdicts, strict=True)
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--set-bounds", action="store_true", help=f"write {BOUNDS.name} anew")
    add_options(parser, "the counts alone")
    args = parser.parse_args(arguments)
    args.out = destination(args, "-instructions")
    return args


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    args = parse(arguments)
    required = os.environ.get(REQUIRED) == "1"
    figures = Figures(provenance() | {"threads": 1}, args.out)
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
        print(f"compiled by {driver.compiler} for {driver.machine}")
        print(table(counts, verdicts))
        if args.out is not None:
            add_figures(figures, counts, driver)
            print("\n" + figure_table(figures.rows, ["cycles_per_element"]))
    print(told(args.out))
    failed = any(said.startswith(("ABOVE", "BELOW")) for said in verdicts)
    return int(failed or (required and any(said.startswith("not") for said in verdicts)))


if __name__ == "__main__":
    sys.exit(main())
