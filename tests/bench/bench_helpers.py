"""The checkout's benchmarks on the path, behind the package under test, and rows as they read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

for package in ("numpy", "scipy", "tqdm"):
    pytest.importorskip(package)
ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks import rows  # noqa: E402

COMMIT, OLDER = "a" * 40, "b" * 40
SHAPES = [(40, 5), (7,), (1,), (300,)]


def read(path: Path) -> list[rows.Row]:
    """The rows of a run, each of which has what a row must have."""
    found = rows.read(path)
    for row in found:
        assert tuple(row) == rows.COLUMNS
        assert all(float(value) > -1 for value in row["values"].split()) and row["values"]
        if row["reference_values"]:
            assert len(row["values"].split()) == len(row["reference_values"].split())
        assert len(row["commit"]) == 40 or row["commit"] == "none"
    return found


def medians(found: list[rows.Row], figure: str) -> dict[tuple[str, str], float]:
    """By case and pipeline, be it that of a row or its reference."""
    known = [f for f in rows.figures(found).values() if f["figure"] == figure]
    return {(w["case"], w["pipeline"]): w.median() for one in known for w in one.ways()}


def row(values: object = "1 2 3", theirs: object = "2 4 6", **changes: object) -> rows.Row:
    known = dict.fromkeys(rows.COLUMNS, "") | {
        "timestamp": "2026-01-02T00:00:00+00:00", "commit": COMMIT, "dirty": "0", "quiet": "1",
        "machine": "A CPU", "threads": "2", "torch": "2.13.0", "disturbed": "0",
        "case": "adamw-gpt-1M", "params": "1000000", "dtype": "float32", "grads": "new",
        "pipeline": "fusedopt_adamw", "reference": "adamw_fused", "figure": "step", "unit": "ms",
        "bytes_per_param": "32", "reference_bytes": "48",
    }  # fmt: skip
    changes |= {"values": values, "reference_values": theirs}
    return known | {name: str(value) for name, value in changes.items()}


def write(path: Path, *found: rows.Row) -> Path:
    path.unlink(missing_ok=True)
    rows.append(path, found)
    return path
