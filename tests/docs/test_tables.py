"""The measured tables of README and docs are those of the rows that their keys name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import tables  # noqa: E402

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not here")
NAMES = [(path, name) for path, made in tables.TABLES.items() for name in made]


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_a_table_is_that_of_its_rows(path: str, name: str) -> None:
    found = tables.block((ROOT / path).read_text(), name)[0]
    assert found == tables.TABLES[path][name]()


def test_the_headline_is_that_of_its_rows() -> None:
    claims = re.findall(r"\*\*(\d+\.\d+)x\*\*", (ROOT / "README.md").read_text())
    cells = [tables.ratio(tables.step_runs(tables.XEON, key)) for key in tables.HEADLINE]
    assert claims == [cell.partition("x")[0] for cell in cells]


@pytest.mark.parametrize("path", tables.TABLES)
def test_the_commits_are_named(path: str) -> None:
    text = (ROOT / path).read_text()
    every = [commit for commits in tables.STEPS.values() for commit in commits]
    commits = {"README.md": every, "docs/training.md": [tables.TRAINING]}.get(path, every[:1])
    assert [commit for commit in commits if commit not in text] == []


def test_another_row_is_not_taken_for_it() -> None:
    case, pipeline, reference, _ = tables.HEADLINE[0]
    assert tables.step_runs(tables.XEON, (case, pipeline, reference, "bucket")) == []
    assert tables.step_runs(tables.EPYC, ("adamw-gpt2-124M", pipeline, reference, "new")) == []


def test_a_run_with_another_setting_is_not_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tables.step_runs(tables.XEON, tables.HEADLINE[0])
    assert len(runs) > 1
    for other in ({"threads": "1"}, {"torch": "2.11.0"}, {"machine": "another"}):
        monkeypatch.setattr(tables, "_rows", lambda *_, o=other: [*runs, runs[-1] | o])
        with pytest.raises(SystemExit, match="2 settings"):
            tables.step_runs(tables.XEON, tables.HEADLINE[0])


def test_a_table_without_rows_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_rows", lambda *_: [])
    for made in (made for named in tables.TABLES.values() for made in named.values()):
        with pytest.raises(SystemExit, match="row"):
            made()


def test_a_stale_table_is_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "before\n<!-- rows: steps -->\n| old |\n<!-- end of rows: steps -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "TABLES", {"README.md": {"steps": lambda: "| new |"}})
    assert tables.main([]) == 1 and (tmp_path / "README.md").read_text() == text
    assert tables.main(["--record"]) == 0 and tables.main([]) == 0
    assert (tmp_path / "README.md").read_text() == text.replace("old", "new")
    assert "README.md: steps" in capsys.readouterr().out
