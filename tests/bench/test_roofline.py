"""The roofline's times, the columns that come from it, and the page that shows it."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

pytest.importorskip("numpy")
pytest.importorskip("tqdm")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import registry, report, roofline, stream, timing  # noqa: E402
from benchmarks.cases import Comparison, all_cases  # noqa: E402
from benchmarks.traffic import Options, traffic  # noqa: E402

# ---- the literals that other files carry --------------------------------------------------------

_BOTH: dict[str, Any] = {"clip": True, "scaler": "ours"}
# Counted by hand, pipeline by pipeline; benchmarks/registry.py derives most of them.
OF_KINDS = {
    "adamw_fused": 48,
    "adamw_foreach": 100,
    "adamw_deepspeed": 48,
    "sgd_fused": 40,
    "sgd_foreach": 64,
    "adamw_bf16_torch_ops": 60,
    "megatron_fp16": 60,
    "fusedopt_adamw": 32,
    "fusedopt_adamw_amp_scaling": 40,
    "fusedopt_adamw_fp16": 32,
    "fusedopt_adamw_fp16_amp_scaling": 36,
    "fusedopt_adamw_bf16": 32,
    "fusedopt_sgd": 24,
}
ON_GPU = registry.gpu_kinds({"cuda": "cpu", "triton": "cpu"})


@pytest.mark.parametrize("name", OF_KINDS)
def test_rows_carry_these_bytes(name: str) -> None:
    kinds = [kinds[name] for kinds in (report.KINDS, ON_GPU) if name in kinds]
    assert {kind.bytes_per_param for kind in kinds} == {OF_KINDS[name]}


@pytest.mark.parametrize(
    ("options", "ours", "norm_free", "fused", "foreach"),
    [
        (Options(**_BOTH), 32, 28, 48, 100),
        (Options("sgd-momentum", **_BOTH), 24, 20, 40, 64),
        (Options("sgd", **_BOTH), 16, 12, 32, 44),
        (Options(params="fp16", **_BOTH), 30, 28, 60, 112),
        (Options("sgd-momentum", "fp16", **_BOTH), 22, 20, 52, 76),
    ],
)
def test_floors(options: Options, ours: int, norm_free: int, fused: int, foreach: int) -> None:
    """Counted by hand from the sources, before this was written."""
    counted = traffic(options)
    update = counted.sweeps[-1]
    assert (counted.floor, update.floor) == (ours, norm_free)
    assert traffic(options, "torch fused").total == fused
    assert traffic(options, "torch foreach").total == foreach


def test_the_stream_moves_the_bytes_of_adamw() -> None:
    assert traffic(Options(clip=True)).total == stream.BYTES_PER_PARAM


# ---- the time -----------------------------------------------------------------------------------


def test_bytes_over_bandwidth_and_what_is_fixed() -> None:
    assert roofline.predict_seconds(32, 10**9, 4e12) == pytest.approx(8e-3)
    assert roofline.predict_seconds(32, 10**9, 4e12, fixed_s=5e-6) == pytest.approx(8.005e-3)
    sharded = roofline.predict_seconds(32, 10**9, 4e12, ranks=8, alpha_s=1e-3)
    assert sharded == pytest.approx(1e-3 + 3e-3)
    assert roofline.predict_seconds(1, 9, 1.0, ranks=8, alpha_s=0.0) == 2  # the fullest rank


@pytest.mark.parametrize("flag", ["--bandwidth", "--numel"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "many"])
def test_numbers_that_make_no_sense_are_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        roofline.parse([flag, value])
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(("numel", "ranks"), [(1, 1), (5_000, 1), (5_001, 2), (80_001, 32)])
def test_the_fewest_ranks_with_room(numel: int, ranks: int) -> None:
    assert roofline.ranks_needed(numel, 16, 100_000.0) == ranks


def result(seconds: float, ceiling_gb_s: float | None = None) -> report.Result:
    case = all_cases()["adamw-one-1M"]
    summary = timing.summarize([timing.Trial(seconds, seconds, False)] * 3)
    comparison = Comparison("fusedopt_adamw", "adamw_fused")
    return report.Result(case, comparison, summary, ceiling_gb_s=ceiling_gb_s)


def test_rows_say_measured_over_predicted() -> None:
    (row,) = report.rows([result(2e-3, 32.0)], report.provenance())
    figures = [float(str(row[name])) for name in report.ROOFLINE]
    assert figures == [16.0, 32.0, 1.0, 2.0]
    assert "| 2.00 |" in report.table([result(2e-3, 32.0)])
    (row,) = report.rows([result(2e-3)], report.provenance())
    assert [row[name] for name in report.ROOFLINE] == ["16.000", "", "", ""]


def test_the_ceiling_is_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([1.0, 1e-3, 2.0, 5e-4, 4e-3])

    class Sampler:
        def __init__(self, pipeline: stream.Stream) -> None:
            pass

        def __call__(self) -> timing.Sample:
            seconds = next(taken)
            return timing.Sample(seconds, disturbed=seconds > 0.5)

    monkeypatch.setattr(stream, "Sampler", Sampler)
    monkeypatch.setattr(stream, "_compiled", lambda: lambda *arguments: 0.0)
    assert stream.ceiling_gb_s(100_000, rounds=5) == pytest.approx(3.2)
    monkeypatch.setattr(stream, "_compiled", lambda: None)
    assert stream.ceiling_gb_s(100_000) is None


def test_all_cpu_results_have_the_columns() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.csv"):
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        if "ceiling_fraction" in header:
            assert header == report.COLUMNS
        assert {len(row) for row in rows} <= {len(header)}


def test_readme_of_results_names_the_columns_of_figures() -> None:
    text = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    assert [column for column in report.FIGURE_COLUMNS if f"`{column}`" not in text] == []


# ---- the page and the command -------------------------------------------------------------------

PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"<!-- begin: (\w+) -->\n(.*?)\n<!-- end: \1 -->", re.DOTALL)


@pytest.mark.skipif(not PAGE.exists(), reason="the documents are not here")
def test_the_tables_of_the_page_are_the_functions() -> None:
    blocks = dict(BLOCK.findall(PAGE.read_text()))
    assert blocks.keys() == roofline.TABLES.keys()
    for name, make in roofline.TABLES.items():
        assert blocks[name] == make(), f"docs/performance.md: run roofline --table {name}"


def test_predictions_are_marked() -> None:
    table = roofline.predictions()
    assert "**PREDICTED, not measured" in table
    rows = [line for line in table.splitlines() if re.match(r"\| 1?\d*[MBT] ", line)]
    assert all(line.count(" ms (") == len(roofline.GPUS) for line in rows)
    assert len(rows) % len(roofline.NUMELS) == 0 and rows


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    half = ["--params", "bf16", "--clip", "--scaler", "ours"]
    roofline.main([*half, "--bandwidth", "32", "--numel", "1e6"])
    out = capsys.readouterr().out
    assert "**32**, floor 30" in out and "16 bytes per parameter" in out
    assert "| fusedopt | 1 ms |" in out
    roofline.main(["--no-masters", "--params", "fp16", "--optimizer", "sgd"])
    assert "| fusedopt | update | grad 2, param 2 | param 2 | 6 |" in capsys.readouterr().out
    roofline.main(["--table"])
    assert capsys.readouterr().out == roofline.predictions() + "\n"
