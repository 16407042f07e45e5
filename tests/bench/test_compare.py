"""`python -m benchmarks compare`: what counts as slower."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import compare  # noqa: E402

OLD, NEW = "a" * 40, "b" * 40


def row(commit: str, ratio: tuple[float, float, float], **changes: str) -> dict[str, str]:
    values = {
        "timestamp": "2026-01-01T00:00:00+00:00",
        "commit": commit,
        "dirty": "0",
        "machine": "a machine",
        "torch": "2.13.0",
        "threads": "2",
        "case": "adamw-tiny",
        "params": "8000",
        "dtype": "float32",
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


def test_runs_of_a_commit_are_one_figure_and_other_figures_are_not_compared(tmp_path: Path) -> None:
    rows = [
        row(OLD, (3, 3, 4), timestamp="2026-01-03T00:00:00+00:00"),
        row(OLD, (1, 2, 2), timestamp="2026-01-02T00:00:00+00:00"),
        row(OLD, (7, 7, 7), quiet="0"),
        row(OLD, (8, 8, 8), dirty="1", timestamp="2026-01-04T00:00:00+00:00"),
        row(OLD, (9, 9, 9), grads="kept"),
        row(NEW, (2, 2, 2)),
        row(NEW, (8, 8, 8), machine="another"),
        row(NEW, (8, 8, 8), torch="2.11.0"),
    ]
    write(tmp_path / "m.csv", rows)
    (change,) = compare.changes(compare.read(OLD, tmp_path), compare.read(NEW, tmp_path))
    assert (change.old, change.new) == ((1, 2.5, 4), (2, 2, 2))
    assert change.verdict == "same"


def test_a_csv_is_read_at_its_newest_commit(tmp_path: Path) -> None:
    path, later = tmp_path / "m.csv", {"timestamp": "2026-02-01T00:00:00+00:00"}
    write(path, [row(OLD, (1, 1, 1)), row(NEW, (2, 2, 2)) | later])
    assert [[r["ratio_p50"] for r in runs] for runs in compare.read(str(path)).values()] == [["2"]]
    write(path, [row(OLD, (1, 1, 1)), row(OLD, (2, 2, 2), dirty="1") | later])
    assert [[r["ratio_p50"] for r in runs] for runs in compare.read(str(path)).values()] == [["2"]]


def test_rows_with_changes_in_the_tree_are_not_those_of_the_commit(tmp_path: Path) -> None:
    write(tmp_path / "m.csv", [row(OLD, (1, 1, 1), dirty="1")])
    with pytest.raises(SystemExit, match="measured with changes in the tree"):
        compare.read(OLD, tmp_path)


def test_rows_without_a_ratio_and_new_columns_do_no_harm(tmp_path: Path) -> None:
    stream = row(OLD, (5, 5, 5), pipeline="fusedopt:update", reference="stream_read", grads="")
    host = row(OLD, (1, 1, 1)) | dict.fromkeys(("ratio_p20", "ratio_p50", "ratio_p80"), "")
    rows = [row(OLD, (2, 2, 2)), stream, host | {"timestamp": "2026-02-01"}]
    write(tmp_path / "old.csv", rows)
    write(tmp_path / "new.csv", [one | {"gb_s": "7", "predicted_ms": ""} for one in rows])
    found = compare.changes(*(compare.read(str(tmp_path / f"{n}.csv")) for n in ("old", "new")))
    assert [(c.key[6], c.new.p50) for c in found] == [("fusedopt:update", 5), ("fusedopt_adamw", 2)]


def test_sizes_and_dtypes_are_kept_apart(tmp_path: Path) -> None:
    rows = [
        row(OLD, (r, r, r), params=params, dtype=dtype)
        for r, params, dtype in ((1, "8", "float32"), (2, "9", "float32"), (3, "9", "bfloat16"))
    ]
    write(tmp_path / "m.csv", rows)
    assert sorted(run["ratio_p50"] for (run,) in compare.read(OLD, tmp_path).values()) == [*"123"]


def test_only_ours_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write(old, [row(OLD, (2, 2, 2), pipeline="adamw_foreach")])
    write(new, [row(NEW, (1, 1, 1), pipeline="adamw_foreach")])
    assert compare.main([str(old), str(new)]) == 0
    told = capsys.readouterr().out
    assert "| 1, 1 | SLOWER |" in told and "1 slower beyond the noise, 0 of ours" in told


def test_a_stream_that_has_changed_is_another_reference(tmp_path: Path) -> None:
    times = ("2026-11-21T21:59:59+00:00", "2026-11-21T22:00:00+00:00", "2026-12-01T00:00:00+00:00")
    rows = [
        row(commit * 40, (2, 2, 2), reference="stream_huge", timestamp=time)
        for commit, time in zip("abc", times, strict=True)
    ]
    write(tmp_path / "m.csv", rows)
    a, b, c = (compare.read(commit * 40, tmp_path) for commit in "abc")
    assert compare.changes(a, b) == [] and len(compare.changes(b, c)) == 1


def test_machines_are_not_compared(tmp_path: Path) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write(old, [row(OLD, (2, 2, 2), machine="an EPYC")])
    write(new, [row(OLD, (2, 2, 2), machine="a Xeon")])
    with pytest.raises(SystemExit, match="machine is an EPYC in OLD and a Xeon in NEW"):
        compare.main([str(old), str(new)])
    write(new, [row(OLD, (2, 2, 2), machine="an EPYC", case="another")])
    with pytest.raises(SystemExit, match="case is adamw-tiny in OLD and another in NEW"):
        compare.main([str(old), str(new)])


def test_a_csv_of_other_figures_says_so(tmp_path: Path) -> None:
    write(tmp_path / "memory.csv", [{"commit": OLD, "figure": "peak", "p50": "7"}])
    with pytest.raises(SystemExit, match="no row with a ratio"):
        compare.read(str(tmp_path / "memory.csv"))
    write(tmp_path / "times.csv", [row(OLD, (2, 2, 2))])
    assert len(compare.read(OLD, tmp_path)) == 1


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
    assert f"{status} slower beyond the noise, {status} of ours" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "nowhere.csv", "aaaaaaa"], "no such file"),
        (["compare", "no-such-branch", "aaaaaaa"], "neither a .csv nor a commit"),
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


def test_a_name_that_git_knows_is_a_commit(tmp_path: Path) -> None:
    if not (Path(__file__).parents[2] / ".git").exists():
        pytest.skip("not a checkout")
    with pytest.raises(SystemExit, match="has no row of this commit"):
        compare.read("HEAD", tmp_path)
    with pytest.raises(SystemExit, match="neither a"):
        compare.read("no-such-branch", tmp_path)
