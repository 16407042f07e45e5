"""The guard on instructions per element: what it counts, and that it fails when it should.

`.ci/instructions` holds every kernel to its bound; here it is two of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bench_helpers import ROOT, read

from benchmarks import instructions
from benchmarks.instructions import Bound, Count

UPDATE, REDUCE = "update:adamw:float32", "reduce:float32:tensors-of-8"
GCC12 = instructions.Driver(Path("none"), "gcc 12.2.0", "x86_64")


def compiled(folder: Path, root: Path = ROOT) -> instructions.Driver:
    """The driver; skips where there is no compiler, or no valgrind, and nobody insists."""
    try:
        if shutil.which("valgrind") is None:
            raise instructions.NotCounted("valgrind is not on PATH")
        return instructions.compile_driver(folder, root)
    except instructions.NotCounted as problem:
        if os.environ.get(instructions.REQUIRED) == "1":
            pytest.fail(f"{problem} and {instructions.REQUIRED}=1", pytrace=False)
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> instructions.Driver:
    return compiled(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def counts(driver: instructions.Driver) -> list[Count]:
    return instructions.count(driver, [UPDATE, REDUCE])


def test_kernels_hold_their_bounds_at_every_run(counts, driver) -> None:
    bounds = instructions.read_bounds()
    said = [instructions.verdict(count, driver, bounds) for count in counts]
    judged = [text for text in said if not text.startswith("not judged")]
    assert set(judged) <= {"held"}, list(zip(counts, said, strict=True))
    if driver.machine == "x86_64" and driver.compiler.startswith("gcc 12."):
        assert len(judged) == len(counts)
    assert "generic" in {count.level for count in counts}
    (again,) = instructions.count(driver, [UPDATE], ["generic"])
    assert again in counts


def test_one_more_operation_per_element_is_above_the_bound(counts, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    for name in ("setup.py", "build_native.py", "build_compilers.py"):
        shutil.copy(ROOT / name, copy)
    rules = copy / "csrc" / "rules" / "adamw.h"
    text, line = rules.read_text(), "    param = param - div(h.step_size * exp_avg,"
    assert line in text
    rules.write_text(text.replace(line, f"    param = fma(h.eps, exp_avg_sq, param);\n{line}"))
    setup = copy / "setup.py"  # one instruction set is enough, and takes a third of the time
    setup.write_text(setup.read_text() + SCALAR_ONLY)
    slower_driver = compiled(tmp_path, copy)
    (slower,) = instructions.count(slower_driver, [UPDATE], ["generic"])
    (before,) = (c for c in counts if (c.kernel, c.level) == (UPDATE, "generic"))
    bound = bound_of(before.per_element, "generic")
    assert instructions.verdict(before, GCC12, [bound]) == "held"
    assert instructions.verdict(slower, GCC12, [bound]).startswith("ABOVE"), (before, slower)


SCALAR_ONLY = """
import dataclasses
_units = tuple(unit for unit in MODULES[0].units if unit.simd in ("", "generic"))
MODULES = (dataclasses.replace(MODULES[0], units=_units),)
"""


def bound_of(per_element: float, level: str = "avx2") -> Bound:
    bound = per_element * instructions.MARGIN
    return Bound(UPDATE, level, "x86_64", "gcc 12.2.0", per_element, bound)


@pytest.mark.parametrize(
    ("measured", "compiler", "machine", "wanted"),
    [
        (10.0, "gcc 12.2.0", "x86_64", "held"),
        (10.29, "gcc 12.2.0", "x86_64", "held"),
        (10.31, "gcc 12.2.0", "x86_64", "ABOVE"),
        (9.3, "gcc 12.2.0", "x86_64", "held"),
        (9.2, "gcc 12.2.0", "x86_64", "BELOW"),
        (99.0, "gcc 12.3.1", "x86_64", "ABOVE"),
        (99.0, "gcc 13.2.0", "x86_64", "not judged"),
        (99.0, "clang 12.0.1", "x86_64", "not judged"),
        (99.0, "gcc 12.2.0", "aarch64", "not judged"),
    ],
)
def test_a_count_is_held_to_its_bound_from_both_sides(
    measured: float, compiler: str, machine: str, wanted: str
) -> None:
    driver = instructions.Driver(Path("none"), compiler, machine)
    found = instructions.verdict(Count(UPDATE, "avx2", measured, 9.0), driver, [bound_of(10.0)])
    assert found.startswith(wanted)


@pytest.mark.parametrize(
    ("said", "release"),
    [
        ("c++ (Debian 12.2.0-14+deb12u1) 12.2.0", "gcc 12.2.0"),
        ("g++-12 (Ubuntu 12.3.0-17ubuntu1) 12.3.0", "gcc 12.3.0"),
        ("Ubuntu clang version 18.1.3 (1ubuntu1)", "clang 18.1.3"),
    ],
)
def test_the_release_of_a_compiler(said: str, release: str) -> None:
    assert instructions.release(said) == release


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

ob=/lib/libc.so.6
fn=start
0 5
cob=/folder/driver
cfn=main
calls=1 0
0 700

ob=/folder/driver
fn=main
3 100
cob=/lib/libm.so.6
cfn=fmaf
calls=9 0
3 90
2 7

ob=/lib/libm.so.6
fn=fmaf
0 90
"""


def test_instructions_are_told_apart_by_their_object() -> None:
    assert instructions.instructions_by_object(PROFILE) == {
        "/lib/libc.so.6": 5,
        "/folder/driver": 107,  # without what fmaf took
        "/lib/libm.so.6": 90,
    }


@pytest.mark.parametrize(
    ("per_element", "compiler", "required", "status"),
    [
        (1.00, "gcc 12.2.0", "0", 0),
        (1.04, "gcc 12.2.0", "0", 1),
        (0.90, "gcc 12.2.0", "0", 1),
        (1.04, "gcc 13.2.0", "0", 0),
        (1.04, "gcc 13.2.0", "1", 1),  # nothing was judged
        (None, "gcc 12.2.0", "0", 0),  # no valgrind
        (None, "gcc 12.2.0", "1", 1),
    ],
)
def test_exit_status_and_rows(
    monkeypatch, per_element, compiler, required, status, tmp_path, capsys
) -> None:
    bounds, out = instructions.read_bounds(), tmp_path / "rows.csv"
    monkeypatch.setattr(
        instructions, "compile_driver", lambda *_: GCC12._replace(compiler=compiler)
    )
    monkeypatch.setenv(instructions.REQUIRED, required)
    if per_element is None:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        counts = [Count(b.kernel, b.level, per_element * b.per_element, 0.0) for b in bounds]
        monkeypatch.setattr(instructions, "count", lambda driver: counts)
    assert instructions.main(["--quick", "--out", str(out)]) == status
    if per_element is None:
        assert "not counted: valgrind is not on PATH" in capsys.readouterr().out
        return
    found = {(row["case"], row["pipeline"]): row for row in read(out)}
    assert set(found) == {(f"simd-{b.level}", f"fusedopt_cpu:{b.kernel}") for b in bounds}
    for row in found.values():
        assert row["threads"] == "1" and compiler in row["note"]
        assert row["figure"] == "instructions_per_element" and float(row["values"]) > 0


def test_script_of_ci_runs_the_guard() -> None:
    script = ROOT / ".ci" / "instructions"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "python -m benchmarks instructions --quick" in script.read_text()
    assert ".ci/instructions" in (ROOT / ".ci" / "run").read_text()
