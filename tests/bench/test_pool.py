"""Several runs of one commit as one figure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import pool


def run(hour: int, *values: float, **changes: str) -> pool.Row:
    p20, p50, p80 = map(str, values)
    return {
        "timestamp": f"2026-01-01T{hour:02}:00:00+00:00", "commit": "a", "dirty": "0", "quiet": "1",
        "machine": "m", "torch": "2", "threads": "2", "case": "one", "params": "8",
        "dtype": "float", "pipeline": "p", "reference": "r", "grads": "new", "ms_p20": p20,
        "ms_p50": p50, "ms_p80": p80, "reference_ms_p50": p50,
        "predicted_ms": "2", "note": f"run {hour}", **changes,
    }  # fmt: skip


RUNS = [run(1, 1, 2, 3), run(2, 2, 4, 5, predicted_ms="4"), run(3, 2, 3, 9)]


def test_the_range_takes_in_every_run() -> None:
    assert pool.spread(RUNS, "ms") == (1, 3, 9)
    assert pool.spread(RUNS[:1], "ms") == (1, 2, 3)
    # each run over its own prediction: 2 / 2, 4 / 4 and 3 / 2
    assert pool.spread(RUNS, "ms", over="predicted_ms") == (0.5, 1.0, 4.5)


def test_one_row_for_all() -> None:
    row = pool.one_row(RUNS)
    assert [float(row[f"ms_{p}"]) for p in ("p20", "p50", "p80")] == [1, 3, 9]
    assert (float(row["reference_ms_p50"]), float(row["predicted_ms"])) == (3, 2)
    assert (row["case"], row["note"], row["runs"]) == ("one", "run 3", "3")
    assert pool.one_row(RUNS[:1]) == RUNS[0] | {"runs": "1"}
    for absent in ("ms_p50", "ms_p20"):  # then the last run's spread stands
        without = [RUNS[0] | {absent: ""}, *RUNS[1:]]
        found = pool.one_row(without)
        assert [found[f"ms_{p}"] for p in ("p20", "p50", "p80")] == ["2", "3", "9"]
    assert pool.one_row([RUNS[0] | {"predicted_ms": ""}, *RUNS[1:]])["predicted_ms"] == "3"
    assert pool.one_row([run | {"predicted_ms": ""} for run in RUNS])["predicted_ms"] == ""


def test_which_runs_belong_together() -> None:
    rows = [
        *reversed(RUNS),
        run(0, 7, 7, 7, commit="b"),
        run(4, 8, 8, 8, quiet="0"),
        run(5, 1, 1, 1, case="two", quiet="0"),
        run(5, 1, 1, 1, case="two", dirty="1", quiet="0"),
    ]
    assert [*pool.runs_by_key(rows).values()] == [RUNS, [rows[-1]]]
    newer = run(9, 7, 7, 7, commit="b")
    assert next(iter(pool.runs_by_key([*rows, newer]).values())) == [rows[3], newer]


@pytest.mark.parametrize("column", pool.KEY)
def test_what_differs_is_kept_apart(column: str) -> None:
    found = pool.runs_by_key([RUNS[0], RUNS[1] | {column: "another"}])
    assert [*found.values()] == [[RUNS[0]], [RUNS[1] | {column: "another"}]]


def test_a_reduction_is_the_same_for_all_params() -> None:
    pair = [run | {"pipeline": "fusedopt_cpu:reduce:bfloat16"} for run in RUNS[:2]]
    pair[0]["dtype"], pair[1]["dtype"] = "float32", "bfloat16"
    assert [*pool.runs_by_key(pair).values()] == [pair]


def test_runs_of_changed_trees_are_not_one_figure() -> None:
    changed = [run(hour, 1, 1, 1, dirty="1") for hour in (4, 5)]
    assert [*pool.runs_by_key([*RUNS, *changed]).values()] == [changed[1:]]
