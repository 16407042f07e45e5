"""Rows: where a run puts them, and what they say when they are read."""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_helpers import COMMIT, OLDER, ROOT, row, write

from benchmarks import goals, rows
from benchmarks.__main__ import COMMANDS
from benchmarks.gpu import machine

np = pytest.importorskip("numpy")
CPU, GPU = "A CPU (R) 7", "NVIDIA H100 80GB"
WRITERS = ("cpu", "host", "distributed", "kernels", "gpu", "instructions", "memory", "profile",
           "fidelity")  # fmt: skip
writers = pytest.mark.parametrize("command", WRITERS)


def module(command: str) -> Any:
    return importlib.import_module(f"benchmarks.{COMMANDS[command]}")


def rows_of(command: str, *options: str) -> Path | None:
    """The file that a run would write to."""
    args = module(command).parse(options)
    if command == "gpu":
        return machine.output(args, SimpleNamespace(dry=False, name=GPU))
    return args.out


@pytest.fixture(autouse=True)
def cpu_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "cpu_model", lambda: CPU)


@writers
def test_rows_go_to_a_file_that_git_ignores(command: str) -> None:
    out = rows_of(command)
    assert out is not None and out.parent == rows.RESULTS / "local"
    assert out.name == ("nvidia-h100-80gb.csv" if command == "gpu" else "a-cpu-r-7.csv")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    asked = subprocess.run(["git", "check-ignore", "-q", str(out)], cwd=ROOT)
    assert asked.returncode == 0


@writers
def test_other_places_are_asked_for(command: str, tmp_path: Path, capsys: Any) -> None:
    local, out = rows_of(command), tmp_path / "rows.csv"
    assert local is not None
    for options, wanted in (
        (["--record"], rows.RESULTS / local.name),
        (["--quick", "--record"], rows.RESULTS / local.name),
        (["--quick"], None),
        (["--out", str(out)], out),
        (["--quick", "--out", str(out)], out),
    ):
        assert rows_of(command, *options) == wanted
    with pytest.raises(SystemExit):
        module(command).parse(["--out", "rows.csv", "--record"])
    assert "not allowed with" in capsys.readouterr().err
    others = {"list", "roofline", "compare", "plot", "tables"}  # these measure nothing
    assert {*WRITERS} == {*COMMANDS} - others


@pytest.mark.parametrize("command", ["gpu", "kernels"])
@pytest.mark.parametrize("place", [["--record"], ["--out", str(rows.RESULTS / "local" / "x.csv")]])
def test_a_dry_run_is_not_recorded(command: str, place: list[str], capsys: Any) -> None:
    options = ["--backends", "cuda", "triton"] if command == "kernels" else []
    with pytest.raises(SystemExit):
        module(command).parse([*options, "--dry-run", *place])
    assert "measures nothing" in capsys.readouterr().err


def test_columns_are_explained_and_tracked_rows_have_them() -> None:
    text = (rows.RESULTS / "README.md").read_text()
    assert [column for column in rows.COLUMNS if f"`{column}`" not in text] == []
    for path in rows.RESULTS.glob("*.csv"):
        rows.check_header(path)
        assert all(None not in one and None not in one.values() for one in rows.read(path))


# ---- writing -------------------------------------------------------------------------------------


def test_rows_are_appended_as_they_come_and_other_columns_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "machine.csv"
    report = rows.Report(rows.provenance(), path)
    report.add("step", "ms", [1.0, 2.0], [3.0, 4.0], case="a", pipeline="p", reference="r")
    assert len(rows.read(path)) == 1
    report.add("state_mib", "MiB", [1 / 3], case="a", pipeline="p", quiet=0)
    assert rows.read(path) == report.rows
    assert [one["values"] for one in report.rows] == ["1 2", "0.33333"]
    assert [one["quiet"] for one in report.rows] == ["1", "0"]
    with pytest.raises(ValueError, match="surprise"):
        report.add("step", "ms", [1.0], surprise=1)
    path.write_text("other,columns\n1,2\n")
    for use in (lambda: rows.append(path, report.rows), lambda: rows.Report({}, path)):
        with pytest.raises(SystemExit, match="columns"):
            use()


# ---- reading -------------------------------------------------------------------------------------


def figure(*found: rows.Row) -> rows.Figure:
    (one,) = rows.figures(found).values()
    return one


def test_figures_of_a_row() -> None:
    one = figure(row("2 2 4", "4 6 8", ceiling_gb_s="32"))
    assert (one.median(), one.ratio().median) == (2.0, 2.0)
    assert (one.gb_s(), one.over_predicted().median) == (16.0, 2.0)
    other = one.swapped()
    assert (other["pipeline"], other["reference"]) == ("adamw_fused", "fusedopt_adamw")
    assert (other.median(), other.ratio().median) == (6.0, 0.5)
    assert other.gb_s() == 8.0 and other.swapped().rows == one.rows


def test_the_interval_is_a_bootstrap_of_pairs() -> None:
    rng = np.random.default_rng(1)
    drift = np.exp(rng.normal(0.0, 1.0, 40))  # of the machine: it is in both times of a pair
    own, reference = drift, 2.0 * drift * np.exp(rng.normal(0.0, 0.01, 40))
    low, median, high = rows.estimate(own, reference)
    assert 1.99 < low < median < high < 2.01
    apart = rows.estimate(own, rng.permutation(reference))
    assert apart.high - apart.low > 0.5
    assert rows.estimate(own, reference) == (low, median, high), "the same rows, the same table"
    assert rows.estimate(np.array([3.0])) == (3.0, 3.0, 3.0)
    assert rows.estimate(np.full(5, 7.0)) == (7.0, 7.0, 7.0)


def test_without_scipy_a_run_is_told_and_nothing_is_judged(monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert rows.estimate(np.array([1.0, 2.0, 9.0])) == (2.0, 2.0, 2.0)
    for command in ("compare", "tables"):
        with pytest.raises(SystemExit, match="scipy is not installed"):
            module(command).main(["a", "b"] if command == "compare" else [])


def test_the_interval_holds_the_median_as_often_as_it_says(n: int = 7) -> None:
    rng = np.random.default_rng(2)
    found = [rows.estimate(np.exp(rng.normal(0.0, 0.2, n))) for _ in range(100)]
    assert 80 <= sum(low <= 1.0 <= high for low, _, high in found) <= 100


def test_runs_of_a_commit_are_one_figure() -> None:
    first = row("1 1", "2 2", ceiling_gb_s="32")
    later = row("2 2", "2 2", ceiling_gb_s="16", timestamp="2026-01-03T00:00:00+00:00", note="last")
    one = figure(later, first)
    assert (len(one.rows), one["note"], one.median()) == (2, "last", 1.5)
    assert one.ratio().low == 1.0 and one.ratio().high == 2.0
    assert [*one.samples(over=rows.predicted_ms)] == [1.0, 1.0, 1.0, 1.0]  # each over its own
    assert figure(first, later | {"quiet": "0"}).rows == [first], "disturbed, and left out"
    assert figure(first | {"commit": OLDER}, later).rows == [later], "the newer commit"
    changed = [first | {"dirty": "1"}, later | {"dirty": "1"}]
    assert figure(*changed).rows == changed[1:], "two changed trees may be two programs"


@pytest.mark.parametrize("column", rows.KEY)
def test_what_differs_is_kept_apart(column: str) -> None:
    found = rows.figures([row(), row(**{column: "another"})])
    assert len(found) == 2


def test_a_figure_is_found_from_either_side() -> None:
    known = list(rows.figures([row(), row(theirs="", reference="", figure="launches")]).values())
    found = rows.find(known, pipeline="adamw_fused", figure="step")
    assert found is not None and found.median() == 4.0
    assert rows.find(known, pipeline="adamw_fused", figure="launches") is None


# ---- showing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "unit", "wanted"),
    [
        ((2.021, 2.104, 2.2), "x", "2.10x [2.02\u20132.20]"),
        ((11.21, 12.34, 13.0), "ms", "12.3 ms [11.2\u201313.0]"),
        ((110.0, 120.4, 131.0), "us", "120 us [110\u2013131]"),
        ((0.001, 0.0012, 0.0013), "ms", "0.0012 ms [0.0010\u20130.0013]"),
        ((5.0, 5.0, 5.0), "count", "5 count"),
        ((8.0, 8.0, 8.0), "B", "8 B"),
    ],
)  # fmt: skip
def test_how_a_figure_is_written(found: Any, unit: str, wanted: str) -> None:
    assert rows.shown(rows.Estimate(*found), unit) == wanted


def test_tables() -> None:
    found = [
        row("2 2", "4 4", ceiling_gb_s="16", note="backend cpu", quiet="0"),
        row("7 7", "", reference="", figure="launches", unit="count"),
    ]
    known = list(rows.figures(found).values())
    assert rows.table(known).splitlines()[2:] == [
        "| adamw-gpt-1M | fusedopt_adamw | step | 2.00 ms | adamw_fused | 2.00x | 16 | 1.00 "
        "| DISTURBED; backend cpu |",
        "| adamw-gpt-1M | fusedopt_adamw | launches | 7 count |  |  |  |  |  |",
    ]
    columns = ["launches", "step", "step_ratio", "not_measured"]
    assert rows.wide(known, columns, {"fusedopt_adamw": "ours"}).splitlines() == [
        "| case | pipeline | launches | step | step ratio |",
        "| --- | --- | --- | --- | --- |",
        "| adamw-gpt-1M | ours | 7 count | 2.00 ms |  |",
        "| adamw-gpt-1M | adamw_fused |  | 4.00 ms | 2.00x |",
    ]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    assert rows.read(write(tmp_path / "a.csv", row())) == [row()]
    write(tmp_path / "local" / "b.csv", row())
    assert [path.name for path in rows.every_file(tmp_path)] == ["a.csv", "b.csv"]


# ---- goals ---------------------------------------------------------------------------------------


def verdicts(goal: goals.Goal, *found: rows.Row, dry: bool = False) -> tuple[str, ...]:
    return goal.line(list(rows.figures(found).values()), dry)[2:]


def test_goals_are_met_or_missed() -> None:
    ratio = goals.Goal("adamw-gpt-1M", "fusedopt_adamw", "ratio", True, 2.0, "adamw_fused")
    assert verdicts(ratio, row()) == ("2", "met")
    assert verdicts(ratio._replace(value=2.5), row()) == ("2", "MISSED")
    assert verdicts(ratio, row(quiet="0")) == verdicts(ratio) == ("not measured", "open")
    assert verdicts(ratio, row(), dry=True) == ("DRY RUN", "open")
    time = goals.Goal("adamw-gpt-1M", "adamw_fused", "time", False, 3.0)
    assert verdicts(time, row()) == ("4", "MISSED")
    for of, wanted, at_least in (("share", 0.5, True), ("floors", 2.0, False)):
        goal = goals.Goal("adamw-gpt-1M", "fusedopt_adamw", of, at_least, wanted)
        assert verdicts(goal, row("2 2 2", ceiling_gb_s="32")) == (f"{wanted:g}", "met")
        assert verdicts(goal, row()) == ("not measured", "open"), "without a ceiling"


@pytest.mark.parametrize("asked", [False, True])
def test_goals_of_a_gpu_are_for_those_who_ask_and_explained(
    asked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = module("gpu")
    stand_in = machine.DryRun.__new__(machine.DryRun)  # without what stands in for a GPU
    stand_in.backends = {"cuda": "cpu", "triton": "cpu"}
    monkeypatch.setattr(step.gpu, "find_machine", lambda dry: stand_in)
    monkeypatch.setattr(step.Run, "all", lambda self: None)
    monkeypatch.setattr(step.signal, "signal", lambda *_: None)
    assert step.main(["--dry-run", *(["--goals"] if asked else [])]) == 0
    told = capsys.readouterr().out
    assert (goals.SAY in told, "| wanted |" in told, "H200" in told) == (asked,) * 3
    assert told.count("DRY RUN | open") == (len(goals.ON_GPU) if asked else 0)


def test_provenance_names_the_commit() -> None:
    said = rows.provenance()
    assert said["machine"] == CPU and said["commit"] != "" and math.isfinite(float(said["dirty"]))
    assert said["commit"] != COMMIT
