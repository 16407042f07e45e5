"""`python -m benchmarks compare`: what counts as slower."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bench_helpers import COMMIT as OLD, OLDER as NEW, ROOT, row, write

from benchmarks import compare


def timed(commit: str, ratios: str, **changes: str) -> dict[str, str]:
    own = " ".join("1" for _ in ratios.split())
    return row(own, ratios, commit=commit, **changes)


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ("1.8 2.0 2.2", "same"),
        ("1.5 1.6 1.75", "SLOWER"),  # all of it below all of the old
        ("1.5 1.6 1.85", "same"),  # the intervals overlap
        ("2.25 2.4 2.5", "faster"),
    ],
)
def test_beyond_the_noise(tmp_path: Path, new: str, verdict: str) -> None:
    write(tmp_path / "machine.csv", timed(OLD, "1.8 2.0 2.2"), timed(NEW, new))
    old, newer = (compare.read(commit[:7], tmp_path) for commit in (OLD, NEW))
    (change,) = compare.changes(old, newer)
    assert change.verdict == verdict


def test_drift_of_a_machine_is_not_taken_for_noise(tmp_path: Path) -> None:
    drift = [1.0, 3.0, 2.0, 5.0, 4.0, 1.5]
    rows = [
        row(" ".join(map(str, drift)), " ".join(str(ratio * d) for d in drift), commit=commit)
        for commit, ratio in ((OLD, 2.0), (NEW, 1.9))
    ]
    write(tmp_path / "m.csv", *rows)
    (change,) = compare.changes(compare.read(OLD, tmp_path), compare.read(NEW, tmp_path))
    assert change.verdict == "SLOWER"


def test_a_disturbed_figure_accuses_nobody(tmp_path: Path) -> None:
    write(tmp_path / "m.csv", timed(OLD, "2 2 2"), timed(NEW, "1 1 1", quiet="0"))
    (change,) = compare.changes(compare.read("aaaaaaa", tmp_path), compare.read(NEW, tmp_path))
    assert change.verdict == "disturbed"


def test_runs_of_a_commit_are_one_figure_and_other_figures_are_not_compared(tmp_path: Path) -> None:
    write(
        tmp_path / "m.csv",
        timed(OLD, "3 3 4", timestamp="2026-01-03T00:00:00+00:00"),
        timed(OLD, "1 2 2", timestamp="2026-01-02T00:00:00+00:00"),
        timed(OLD, "7 7 7", quiet="0"),
        timed(OLD, "8 8 8", dirty="1", timestamp="2026-01-04T00:00:00+00:00"),
        timed(OLD, "9 9 9", grads="kept"),
        timed(NEW, "2 2 2"),
        timed(NEW, "8 8 8", machine="another"),
        timed(NEW, "8 8 8", torch="2.11.0"),
        timed(NEW, "8 8 8", reference=""),
    )
    (change,) = compare.changes(compare.read(OLD, tmp_path), compare.read(NEW, tmp_path))
    assert (change.old.median, change.new) == (2.5, (2, 2, 2))
    assert (change.runs, change.verdict) == ((2, 1), "same")


def test_a_csv_is_read_at_its_newest_commit(tmp_path: Path) -> None:
    path, later = tmp_path / "m.csv", {"timestamp": "2026-02-01T00:00:00+00:00"}
    for newer in (timed(NEW, "2 2", **later), timed(OLD, "2 2", dirty="1", **later)):
        write(path, timed(OLD, "1 1"), newer)
        assert [figure.rows for figure in compare.read(str(path)).values()] == [[newer]]


def test_rows_with_changes_in_the_tree_are_not_those_of_the_commit(tmp_path: Path) -> None:
    write(tmp_path / "m.csv", timed(OLD, "1 1", dirty="1"))
    with pytest.raises(SystemExit, match="measured with changes in the tree"):
        compare.read(OLD, tmp_path)


def test_only_ours_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.csv", timed(OLD, "2 2", pipeline="adamw_foreach"))
    new = write(tmp_path / "new.csv", timed(NEW, "1 1", pipeline="adamw_foreach"))
    assert compare.main([str(old), str(new)]) == 0
    told = capsys.readouterr().out
    assert "| 1, 1 | SLOWER |" in told and "1 slower beyond the noise, 0 of ours" in told


def test_machines_are_not_compared(tmp_path: Path) -> None:
    old = write(tmp_path / "old.csv", timed(OLD, "2 2", machine="an EPYC"))
    for changes, said in (
        ({"machine": "a Xeon"}, "machine is an EPYC in OLD and a Xeon in NEW"),
        ({"machine": "an EPYC", "case": "another"}, "case is adamw-gpt-1M in OLD and another in"),
    ):
        new = write(tmp_path / "new.csv", timed(OLD, "2 2", **changes))
        with pytest.raises(SystemExit, match=said):
            compare.main([str(old), str(new)])


def test_a_csv_of_other_figures_says_so(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("commit,figure,p50\naaa,peak,7\n")
    with pytest.raises(SystemExit, match="no row with a"):
        compare.read(str(tmp_path / "old.csv"))
    write(tmp_path / "times.csv", timed(OLD, "2 2"))
    assert len(compare.read(OLD, tmp_path)) == 1


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(("ratio", "status"), [("2 2", 0), ("1 1", 1)])
def test_the_command(tmp_path: Path, ratio: str, status: int) -> None:
    old = write(tmp_path / "old.csv", timed(OLD, "2 2"))
    new = write(tmp_path / "new.csv", timed(NEW, ratio))
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


def test_a_name_that_git_knows_is_a_commit(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    with pytest.raises(SystemExit, match="has no row of this commit"):
        compare.read("HEAD", tmp_path)
    with pytest.raises(SystemExit, match="neither a"):
        compare.read("no-such-branch", tmp_path)
