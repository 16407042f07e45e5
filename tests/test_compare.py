"""`python -m benchmarks compare`: what counts as slower."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare

ROOT = Path(__file__).parent.parent
OLD, NEW = "a" * 40, "b" * 40


def row(commit: str, ratio: tuple[float, float, float], **changes: str) -> dict[str, str]:
    values = {
        "timestamp": "2026-01-01T00:00:00+00:00",
        "commit": commit,
        "machine": "a machine",
        "threads": "2",
        "case": "adamw-tiny",
        "pipeline": "fusedopt_adamw",
        "reference": "adamw_fused",
        "grads": "new",
        "quiet": "1",
    }
    values |= {f"ratio_{p}": str(r) for p, r in zip(("p20", "p50", "p80"), ratio, strict=True)}
    return values | changes


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ((1.8, 2.0, 2.2), "same"),
        ((1.5, 1.6, 1.75), "SLOWER"),  # all of it below all of the old
        ((1.5, 1.6, 1.85), "same"),  # the ranges overlap
        ((2.25, 2.4, 2.5), "faster"),
    ],
)
def test_beyond_the_noise(tmp_path: Path, new: tuple[float, float, float], verdict: str) -> None:
    write(tmp_path / "machine.csv", [row(OLD, (1.8, 2.0, 2.2)), row(NEW, new)])
    old, newer = (compare.read(commit[:7], tmp_path) for commit in (OLD, NEW))
    (change,) = compare.changes(old, newer)
    assert change.verdict == verdict


def test_a_disturbed_figure_accuses_nobody(tmp_path: Path) -> None:
    write(tmp_path / "m.csv", [row(OLD, (2, 2, 2)), row(NEW, (1, 1, 1), quiet="0")])
    (change,) = compare.changes(compare.read("aaaaaaa", tmp_path), compare.read(NEW, tmp_path))
    assert change.verdict == "disturbed"


def test_the_latest_row_counts_and_other_figures_are_not_compared(tmp_path: Path) -> None:
    rows = [
        row(OLD, (3, 3, 3), timestamp="2026-01-03T00:00:00+00:00"),
        row(OLD, (1, 1, 1), timestamp="2026-01-02T00:00:00+00:00"),
        row(OLD, (9, 9, 9), grads="kept"),
        row(NEW, (2, 2, 2)),
        row(NEW, (8, 8, 8), machine="another"),
    ]
    write(tmp_path / "m.csv", rows)
    (change,) = compare.changes(compare.read(OLD, tmp_path), compare.read(NEW, tmp_path))
    assert (change.old.p50, change.new.p50) == (3, 2)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(("ratio", "status"), [(2.0, 0), (1.0, 1)])
def test_the_command(tmp_path: Path, ratio: float, status: int) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write(old, [row(OLD, (2, 2, 2))])
    write(new, [row(NEW, (ratio, ratio, ratio))])
    done = run("compare", str(old), str(new))
    assert done.returncode == status, done.stderr
    assert f"{status} slower beyond the noise" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "nowhere.csv", "aaaaaaa"], "no such file"),
        (["compare", "HEAD", "aaaaaaa"], "neither a .csv nor seven digits"),
        (["compare", "0000000", "0000000"], "no row of this commit"),
        (["dance"], "python -m benchmarks COMMAND"),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0 and words in done.stderr


def test_our_own_rows_can_be_compared() -> None:
    commits = {"8c2e0b3", "78eccae"}
    figures = [compare.read(commit) for commit in sorted(commits)]
    assert all(figures) and compare.changes(*figures)
