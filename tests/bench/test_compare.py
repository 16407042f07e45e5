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


def change(folder: Path, *rows: dict[str, str]) -> compare.Change:
    write(folder / "machine.csv", *rows)
    old, new = (compare.read(commit[:7], folder) for commit in (OLD, NEW))
    (found,) = compare.changes(old, new)
    return found


DRIFT = [1.0, 3.0, 2.0, 5.0, 4.0, 1.5]  # of a machine, and no noise: it is in both times of a pair


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (timed(OLD, "1.8 2.0 2.2"), timed(NEW, "1.8 2.0 2.2"), "same"),
        (timed(OLD, "1.8 2.0 2.2"), timed(NEW, "1.5 1.6 1.75"), "SLOWER"),  # all below all
        (timed(OLD, "1.8 2.0 2.2"), timed(NEW, "1.5 1.6 1.85"), "same"),  # the intervals overlap
        (timed(OLD, "1.8 2.0 2.2"), timed(NEW, "2.25 2.4 2.5"), "faster"),
        (timed(OLD, "2 2 2"), timed(NEW, "1 1 1", quiet="0"), "disturbed"),
        (*(row(" ".join(map(str, DRIFT)), " ".join(str(ratio * d) for d in DRIFT), commit=commit)
           for commit, ratio in ((OLD, 2.0), (NEW, 1.9))), "SLOWER"),
    ],
)  # fmt: skip
def test_beyond_the_noise(
    tmp_path: Path, old: dict[str, str], new: dict[str, str], verdict: str
) -> None:
    assert change(tmp_path, old, new).verdict == verdict


def test_runs_of_a_commit_are_one_figure_and_other_figures_are_not_compared(tmp_path: Path) -> None:
    found = change(
        tmp_path,
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
    assert (found.old.median, found.new) == (2.5, (2, 2, 2))
    assert (found.runs, found.verdict) == ((2, 1), "same")


def test_a_csv_is_read_at_its_newest_commit(tmp_path: Path) -> None:
    path, later = tmp_path / "m.csv", {"timestamp": "2026-02-01T00:00:00+00:00"}
    for newer in (timed(NEW, "2 2", **later), timed(OLD, "2 2", dirty="1", **later)):
        write(path, timed(OLD, "1 1"), newer)
        assert [figure.rows for figure in compare.read(str(path)).values()] == [[newer]]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, 1, "1 slower beyond the noise, 1 of ours"),
        ({"pipeline": "adamw_foreach"}, 0, "1 slower beyond the noise, 0 of ours"),
    ],
)
def test_only_ours_decide(
    changes: dict[str, str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old = write(tmp_path / "old.csv", timed(OLD, "2 2", **changes))
    new = write(tmp_path / "new.csv", timed(NEW, "1 1", **changes))
    assert compare.main([str(old), str(new)]) == status
    told = capsys.readouterr().out
    assert "| 1, 1 | SLOWER |" in told and said in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"machine": "a Xeon"}, "machine is an EPYC in OLD and a Xeon in NEW"),
        ({"machine": "an EPYC", "torch": "2.11"}, "torch is 2.13.0 in OLD and 2.11 in NEW"),
    ],
)
def test_machines_are_not_compared(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    old = write(tmp_path / "old.csv", timed(OLD, "2 2", machine="an EPYC"))
    new = write(tmp_path / "new.csv", timed(NEW, "2 2", **changes))
    with pytest.raises(SystemExit, match=said):
        compare.main([str(old), str(new)])


def test_rows_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    write(tmp_path / "m.csv", timed(OLD, "1 1", dirty="1"))
    (tmp_path / "other.csv").write_text("commit,figure,p50\naaa,peak,7\n")
    for source, said in (
        (OLD, "measured with changes in the tree"),
        (str(tmp_path / "other.csv"), "no row with a reference"),
        ("0000000", "has no row of this commit"),
        ("no-such-branch", "neither a .csv nor a commit"),
        ("nowhere.csv", "no such file"),
    ):
        with pytest.raises(SystemExit, match=said):
            compare.read(source, tmp_path)
    if (ROOT / ".git").exists():
        with pytest.raises(SystemExit, match="has no row of this commit"):
            compare.read("HEAD", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["compare", "nowhere.csv", "aaaaaaa"], "no such file"), (["dance"], "benchmarks COMMAND")],
)
def test_the_command(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and words in done.stderr
