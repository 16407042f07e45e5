"""The guard on instructions per element: what it counts, and that it fails when it should."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bench_helpers import ROOT, read

from benchmarks import instructions
from benchmarks.instructions import Bound, Count

UPDATE = "update:adamw:float32"
GCC12 = instructions.Driver(Path("none"), "gcc 12.2.0", "x86_64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("driver")


def compiled(folder: Path, root: Path = ROOT) -> instructions.Driver:
    """The driver; skips where there is no compiler, or no valgrind, and nobody insists."""
    try:
        if shutil.which("valgrind") is None:
            raise instructions.NotCounted("valgrind is not on PATH")
        compiler = instructions._compiler_of_the_bounds()
        return instructions.compile_driver(folder, compiler, root)
    except instructions.NotCounted as problem:
        if os.environ.get(instructions.REQUIRED) == "1":
            pytest.fail(f"{problem} and {instructions.REQUIRED}=1", pytrace=False)
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def driver(folder: Path) -> instructions.Driver:
    return compiled(folder)


@pytest.fixture(scope="module")
def counts(driver: instructions.Driver) -> list[Count]:
    return instructions.count(driver)


def verdicts(counts: list[Count], driver: instructions.Driver) -> list[str]:
    bounds = instructions.read_bounds()
    return [instructions.verdict(count, driver, bounds) for count in counts]


def test_every_kernel_holds_its_bound(counts, driver) -> None:
    said = verdicts(counts, driver)
    judged = [text for text in said if not text.startswith("not judged")]
    assert set(judged) <= {"held"}, list(zip(counts, said, strict=True))
    if driver.machine == "x86_64" and driver.compiler.startswith("gcc 12."):
        assert len(judged) == len(counts)
    assert {count.kernel for count in counts} == set(instructions.KERNELS)
    assert "generic" in {count.level for count in counts}
    assert "avx512" not in {count.level for count in counts}  # valgrind does not run it


def test_a_count_is_the_same_twice(counts, driver) -> None:
    for level in {count.level for count in counts}:
        (again,) = instructions.count(driver, [UPDATE], [level])
        assert again in counts


def test_one_more_operation_per_element_is_above_the_bound(counts, tmp_path) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    for name in ("setup.py", "build_native.py", "build_compilers.py"):
        shutil.copy(ROOT / name, copy)
    rules = copy / "csrc" / "rules" / "adamw.h"
    text, line = rules.read_text(), "    param = param - div(h.step_size * exp_avg,"
    assert line in text
    rules.write_text(text.replace(line, f"    param = fma(h.eps, exp_avg_sq, param);\n{line}"))
    driver = compiled(tmp_path, copy)
    for level in {count.level for count in counts}:
        (slower,) = instructions.count(driver, [UPDATE], [level])
        (before,) = (c for c in counts if (c.kernel, c.level) == (UPDATE, level))
        bound = bound_of(before.per_element, level)
        assert instructions.verdict(before, GCC12, [bound]) == "held"
        assert instructions.verdict(slower, GCC12, [bound]).startswith("ABOVE"), (before, slower)


def bound_of(per_element: float, level: str = "avx2") -> Bound:
    bound = per_element * instructions.MARGIN
    return Bound(UPDATE, level, "x86_64", "gcc 12.2.0", per_element, bound)


@pytest.mark.parametrize(
    ("measured", "wanted"),
    [(10.0, "held"), (10.29, "held"), (10.31, "ABOVE"), (9.3, "held"), (9.2, "BELOW")],
)
def test_a_count_is_held_to_its_bound_from_both_sides(measured: float, wanted: str) -> None:
    found = instructions.verdict(Count(UPDATE, "avx2", measured, 9.0), GCC12, [bound_of(10.0)])
    assert found.startswith(wanted)


@pytest.mark.parametrize(
    ("compiler", "machine", "judged"),
    [
        ("gcc 12.3.1", "x86_64", True),
        ("gcc 13.2.0", "x86_64", False),
        ("clang 12.0.1", "x86_64", False),
        ("gcc 12.2.0", "aarch64", False),
    ],
)
def test_other_compilers_are_not_judged(compiler: str, machine: str, judged: bool) -> None:
    driver = instructions.Driver(Path("none"), compiler, machine)
    found = instructions.verdict(Count(UPDATE, "avx2", 99.0, 0.0), driver, [bound_of(10.0)])
    assert found.startswith("ABOVE" if judged else "not judged")


@pytest.mark.parametrize(
    ("said", "release"),
    [
        ("c++ (Debian 12.2.0-14+deb12u1) 12.2.0", "gcc 12.2.0"),
        ("g++-12 (Ubuntu 12.3.0-17ubuntu1) 12.3.0", "gcc 12.3.0"),
        ("Ubuntu clang version 18.1.3 (1ubuntu1)", "clang 18.1.3"),
    ],
)
def test_the_release_of_a_compiler(said: str, release: str) -> None:
    assert instructions._release(said) == release


def test_bounds_are_complete_and_written_as_they_are_read(tmp_path) -> None:
    bounds = instructions.read_bounds()
    pairs = {(bound.kernel, bound.level) for bound in bounds}
    assert pairs == {(k, level) for k in instructions.KERNELS for level in ("avx2", "generic")}
    for bound in bounds:
        assert bound.bound == pytest.approx(instructions.MARGIN * bound.per_element, rel=1e-3)
    copy = tmp_path / "bounds.csv"
    shutil.copy(instructions.BOUNDS, copy)
    counts = [Count(b.kernel, b.level, b.per_element, 0.0) for b in bounds]
    instructions.write_bounds(counts, GCC12, copy)
    again = instructions.read_bounds(copy)
    assert [b.bound for b in again] == pytest.approx([b.bound for b in bounds], rel=1e-3)
    other = instructions.Driver(Path("none"), "gcc 13.1.0", "x86_64")
    instructions.write_bounds(counts, other, copy)  # leaves those of gcc 12
    assert len(instructions.read_bounds(copy)) == 2 * len(bounds)


PROFILE = """version: 1
events: Ir

ob=(1) /lib/libc.so.6
fn=(1) start
0 5
cob=(2) /folder/driver
cfn=(2) main
calls=1 0
0 700

ob=(2)
fn=(2)
+3 100
cob=(3) /lib/libm.so.6
cfn=(3) fmaf
calls=9 0
* 90
-1 7

ob=(3)
fn=(3)
0 90
"""


def test_instructions_are_told_apart_by_their_object() -> None:
    assert instructions.instructions_by_object(PROFILE) == {
        "/lib/libc.so.6": 5,
        "/folder/driver": 107,  # without what fmaf took
        "/lib/libm.so.6": 90,
    }


def test_without_valgrind_it_says_so_and_passes_unless_it_is_required(
    monkeypatch, tmp_path, capsys
) -> None:
    driver = instructions.Driver(tmp_path, "gcc 12.2.0", "x86_64")
    monkeypatch.setattr(instructions, "compile_driver", lambda *_: driver)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv(instructions.REQUIRED, raising=False)
    assert instructions.main(["--quick"]) == 0
    assert "not counted: valgrind is not on PATH" in capsys.readouterr().out
    monkeypatch.setenv(instructions.REQUIRED, "1")
    assert instructions.main(["--quick"]) == 1


@pytest.mark.parametrize(
    ("per_element", "compiler", "required", "status"),
    [
        (1.00, "gcc 12.2.0", "0", 0),
        (1.04, "gcc 12.2.0", "0", 1),
        (0.90, "gcc 12.2.0", "0", 1),
        (1.04, "gcc 13.2.0", "0", 0),
        (1.04, "gcc 13.2.0", "1", 1),  # nothing was judged
    ],
)
def test_exit_status(monkeypatch, per_element, compiler, required, status) -> None:
    bounds = instructions.read_bounds()
    counts = [Count(b.kernel, b.level, per_element * b.per_element, 0.0) for b in bounds]
    driver = instructions.Driver(Path("none"), compiler, "x86_64")
    monkeypatch.setattr(instructions, "compile_driver", lambda *_: driver)
    monkeypatch.setattr(instructions, "count", lambda driver: counts)
    monkeypatch.setenv(instructions.REQUIRED, required)
    assert instructions.main(["--quick"]) == status


def test_rows_of_counts_and_cycles(monkeypatch, driver, counts, tmp_path) -> None:
    monkeypatch.setattr(instructions, "compile_driver", lambda *_: driver)
    monkeypatch.setattr(instructions, "count", lambda driver: counts)
    monkeypatch.setattr(instructions, "CALLS", 10)
    out = tmp_path / "rows.csv"
    instructions.main(["--out", str(out)])
    rows = read(out)
    counted = {(r["case"], r["pipeline"]): r for r in rows if r["unit"] == "instructions"}
    assert set(counted) == {(f"simd-{c.level}", f"fusedopt_cpu:{c.kernel}") for c in counts}
    clocked = [row for row in rows if row["figure"] == "cycles_per_element"]
    assert len(clocked) >= len(counted)  # and those of AVX-512, where this CPU has it
    for row in rows:
        assert row["threads"] == "1" and driver.compiler in row["note"]
        assert all(float(value) > 0 for value in row["values"].split())


PERF = """#!/usr/bin/env python3
import sys
calls = int(sys.argv[-1])
print(f"{1000 + calls * 4 * 8192 * 3},,cycles:u,99,100.00,,", file=sys.stderr)
"""


def test_cycles_come_from_hardware_counters_where_there_are_some(monkeypatch, tmp_path) -> None:
    perf = tmp_path / "perf"
    perf.write_text(PERF)
    perf.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert shutil.which("perf") == str(perf)
    unit, samples, note = instructions.cycles(GCC12, UPDATE, "avx2")
    assert (unit, set(samples)) == ("cycles", {3.0}) and "perf" in note
    refused = "<not supported>,,cycles:u,0,100.00,,"
    perf.write_text(f"#!/bin/sh\necho '{refused}' >&2\n")
    assert instructions._counted_cycles(GCC12, UPDATE, "avx2") == []


def test_script_of_ci_runs_the_guard() -> None:
    script = ROOT / ".ci" / "instructions"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "python -m benchmarks instructions --quick" in script.read_text()
    assert ".ci/instructions" in (ROOT / ".ci" / "run").read_text()
