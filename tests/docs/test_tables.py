"""Blocks of README and docs that a program writes are what it writes now."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import rows, tables  # noqa: E402

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not here")
NAMES = [(path, name) for path, made in tables.BLOCKS.items() for name in made]
MARK = re.compile(r"<!-- (begin|end): (\w+) -->")
ROW = dict.fromkeys(rows.COLUMNS, "") | {
    "timestamp": "2026-01-02", "commit": "a" * 40, "dirty": "0", "quiet": "1", "machine": "A CPU",
    "threads": "2", "torch": "2.13", "case": "adamw-gpt-100M", "grads": "new", "unit": "ms",
    "figure": "step", "pipeline": "fusedopt_adamw", "reference": "adamw_fused",
    "params": "100000000", "values": "1 1", "reference_values": "2 2", "bytes_per_param": "32",
    "reference_bytes": "48",
}  # fmt: skip


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_a_block_is_current(path: str, name: str) -> None:
    found = tables.block((ROOT / path).read_text(), name)[0]
    assert found == tables.BLOCKS[path][name](), "python -m benchmarks tables --record"


def test_every_block_is_written_by_the_program() -> None:
    for path in ("README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))):
        marks = MARK.findall((ROOT / path).read_text())
        known = [(mark, name) for name in tables.BLOCKS.get(path, ()) for mark in ("begin", "end")]
        assert sorted(marks) == sorted(known), path


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "PICTURES", tmp_path / "pictures")
    return tmp_path / "machine.csv"


def test_without_rows_a_table_says_so(results: Path) -> None:
    for path, name in NAMES:
        if tables.BLOCKS[path][name] not in (*tables.roofline.TABLES.values(),):
            assert tables.BLOCKS[path][name]().startswith("*No ")


def test_a_table_is_of_the_clean_and_quiet_rows_that_its_lines_name(results: Path) -> None:
    left_out = ({"dirty": "1"}, {"quiet": "0"}, {"grads": "kept"}, {"case": "adamw-gpt-10M x"},
                {"reference": "adamw_optimi"})  # fmt: skip
    others = [ROW | change | {"timestamp": "2026-02-01", "values": "9 9"} for change in left_out]
    older = ROW | {"commit": "b" * 40, "timestamp": "2026-01-01", "values": "7 7"}
    rows.append(results, [ROW, older, *others])
    table = tables.BLOCKS["README.md"]["steps"]()
    assert table.startswith("*Commit aaaaaaa; medians")
    assert "| parameters | against | A CPU, 2 threads, torch 2.13 |" in table
    assert "| AdamW, 100M in 148 tensors | torch `fused=True` | 2.00x |" in table
    assert table.count("\u2013 |") == len(tables.STEPS) - 1


def test_every_machine_has_a_column_and_either_side_of_a_row_counts(results: Path) -> None:
    swapped = {"pipeline": "adamw_fused", "reference": "fusedopt_adamw"}
    rows.append(results, [ROW, ROW | swapped | {"machine": "Another", "threads": "1"}])
    table = tables.BLOCKS["README.md"]["steps"]()
    assert "| A CPU, 2 threads, torch 2.13 | Another, 1 thread, torch 2.13 |" in table
    assert "| torch `fused=True` | 2.00x | 0.50x |" in table


def test_measured_over_predicted_and_figures_by_case(results: Path) -> None:
    roof = ROW | {"reference": "stream_huge", "ceiling_gb_s": "3200"}
    kept = {"case": "digits", "figure": "optimizer", "reference": "torch_fused"}
    state = {"figure": "state_mib", "unit": "MiB", "reference": "", "reference_values": ""}
    rows.append(results, [roof, ROW | kept | {"pipeline": "fusedopt"}, ROW | state])
    over = tables.BLOCKS["docs/performance.md"]["over_predicted"]()
    assert "| AdamW, fp32: 32 bytes | fusedopt | 1.00 |" in over
    profile, memory = (tables.BLOCKS["docs/training.md"][name]() for name in ("profile", "memory"))
    assert "| digits | torch `fused=True` | 2.00 ms | 2.00x |" in profile and "MiB" not in profile
    assert "| adamw-gpt-100M | fusedopt_adamw | 1.00 MiB |" in memory and "digits" not in memory


def test_a_stale_block_is_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "before\n<!-- begin: steps -->\n| old |\n<!-- end: steps -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "BLOCKS", {"README.md": {"steps": lambda: "| new |"}})
    assert tables.main([]) == 1 and (tmp_path / "README.md").read_text() == text
    assert tables.main(["--record"]) == 0 and tables.main([]) == 0
    assert (tmp_path / "README.md").read_text() == text.replace("old", "new")
    assert "README.md: steps" in capsys.readouterr().out
