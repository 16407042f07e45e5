"""What a run leaves behind: rows of the CSV with their provenance, and a table to read."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import stream
from benchmarks.cases import Case, Comparison
from benchmarks.registry import KINDS
from benchmarks.roofline import predict_seconds
from benchmarks.row_files import ROOT, cpu_model
from benchmarks.timing import Summary

PROVENANCE = ["timestamp", "commit", "dirty", "machine", "cpus", "threads", "torch", "python"]
WHAT = ["case", "pipeline", "reference", "params", "tensors", "dtype", "grads", "bytes_per_param"]
TIMES = ["ms_p20", "ms_p50", "ms_p80", "reference_ms_p50"]
RATIOS = ["ratio_p20", "ratio_p50", "ratio_p80", "ceiling_fraction", "target"]
ROOFLINE = ["gb_s", "ceiling_gb_s", "predicted_ms", "measured_over_predicted"]
COLUMNS = [*PROVENANCE, *WHAT, *TIMES, *RATIOS, "samples", "disturbed", "quiet", "note", *ROOFLINE]
RATIOS_SAY = """\
ratio: how many times faster the first is than the second, timed in turns. measured / predicted:
its time over that of its bytes at the memory's speed in this run (docs/performance.md)."""
GOALS_SAY = """\
goal: the ratio that the project works towards on its own machines (2 threads of an Intel Xeon, an
AMD EPYC). Some are missed there too; on another processor NO is no sign of a fault."""


@dataclass(frozen=True)
class Result:
    """A comparison that was measured, or the note why not."""

    case: Case
    comparison: Comparison
    summary: Summary | None = None
    note: str = ""
    wrong: bool = False
    ceiling_gb_s: float | None = None  # `stream.ceiling_gb_s()` at that time: of the prediction

    @property
    def label(self) -> str:
        names = {name: kind.label for name, kind in KINDS.items()} | stream.LABELS
        pipeline, reference = self.comparison.pipeline, self.comparison.reference
        return f"{self.case.label}: {names[pipeline]} against {names[reference]}"


def provenance() -> dict[str, object]:
    """What a row needs so that the run can be repeated."""
    now = datetime.datetime.now(datetime.timezone.utc)
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "timestamp": now.isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--verify", "HEAD") or os.environ.get("GIT_COMMIT", "none"),
        "dirty": int(changes != ""),
        "machine": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def rows(results: Sequence[Result], common: dict[str, object]) -> list[dict[str, object]]:
    """One row of the CSV per measured comparison; benchmarks/results/README.md has the schema."""
    ceilings = {
        (r.case.name, r.comparison.pipeline): r.summary.ratio.p50
        for r in results
        if r.summary and r.comparison.reference == "stream_huge"
    }
    return [
        common | _row(result, result.summary, ceilings) | _roofline(result)
        for result in results
        if result.summary is not None
    ]


def _row(
    result: Result, summary: Summary, ceilings: dict[tuple[str, str], float]
) -> dict[str, object]:
    case, comparison = result.case, result.comparison
    ceiling = ceilings.get((case.name, comparison.pipeline))
    return {
        "case": case.name,
        "pipeline": comparison.pipeline,
        "reference": comparison.reference,
        "params": case.numel,
        "tensors": len(case.shapes()),
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes_per_param": KINDS[comparison.pipeline].bytes_per_param,
        "ms_p20": f"{summary.ms.p20:.4f}",
        "ms_p50": f"{summary.ms.p50:.4f}",
        "ms_p80": f"{summary.ms.p80:.4f}",
        "reference_ms_p50": f"{summary.reference_ms.p50:.4f}",
        "ratio_p20": f"{summary.ratio.p20:.4f}",
        "ratio_p50": f"{summary.ratio.p50:.4f}",
        "ratio_p80": f"{summary.ratio.p80:.4f}",
        "ceiling_fraction": "" if ceiling is None else f"{ceiling:.4f}",
        "target": "" if comparison.target is None else comparison.target,
        "samples": summary.samples,
        "disturbed": summary.disturbed,
        "quiet": int(summary.quiet),
        "note": result.note,
    }


def _roofline(result: Result) -> dict[str, object]:
    assert result.summary is not None
    bytes_per_param, numel = KINDS[result.comparison.pipeline].bytes_per_param, result.case.numel
    ms = result.summary.ms.p50
    row: dict[str, object] = dict.fromkeys(ROOFLINE, "")
    row["gb_s"] = f"{bytes_per_param * numel / ms / 1e6:.3f}"
    if result.ceiling_gb_s is not None:
        predicted_ms = 1e3 * predict_seconds(bytes_per_param, numel, 1e9 * result.ceiling_gb_s)
        row["ceiling_gb_s"] = f"{result.ceiling_gb_s:.3f}"
        row["predicted_ms"] = f"{predicted_ms:.4f}"
        row["measured_over_predicted"] = f"{ms / predicted_ms:.4f}"
    return row


def table(results: Sequence[Result], goals: bool = False) -> str:
    """What was measured, beside what the project works towards where ``goals`` are asked for."""
    lines = [
        "| figure | ratio | p20..p80 | measured / predicted |" + " goal | met? |" * goals,
        "|---|---|---|---|" + "---|---|" * goals,
    ]
    for result in results:
        cells = f"not measured: {result.note} | | "
        if result.summary is not None:
            ratio, mark = result.summary.ratio, "" if result.summary.quiet else " (disturbed)"
            over = _roofline(result)["measured_over_predicted"]
            cells = f"{ratio.p50:.2f}x{mark} | {ratio.p20:.2f}..{ratio.p80:.2f} | "
            cells += f"{float(str(over)):.2f}" if over else "-"
        lines.append(f"| {result.label} | {cells} |" + (_goal(result) if goals else ""))
    return "\n".join([*lines, "", RATIOS_SAY, *([GOALS_SAY] if goals else [])])


def _goal(result: Result) -> str:
    goal, summary = result.comparison.target, result.summary
    if goal is None:
        return " - | - |"
    met = "" if summary is None else "yes" if summary.ratio.p50 >= goal else "NO"
    if summary is not None and not summary.quiet:  # no ground for a verdict
        met = "?"
    return f" >= {goal:g}x | {met} |"


def append(
    path: Path, new_rows: Sequence[dict[str, object]], columns: Sequence[str] = COLUMNS
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    check_header(path, columns)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(new_rows)


def check_header(path: Path, columns: Sequence[str] = COLUMNS) -> None:
    if path.exists() and path.read_text().split("\n", 1)[0] != ",".join(columns):
        raise SystemExit(f"{path} has other columns than this version writes; use another --out")


# Figures that are no times of a step against another's: peak memory, shares, counts.
FIGURE = ["case", "pipeline", "figure", "unit", "p20", "p50", "p80", "samples", "note"]
FIGURE_COLUMNS = [*PROVENANCE, *FIGURE]


def append_figures(path: Path, figures: Sequence[dict[str, object]]) -> None:
    """Every row has exactly the keys FIGURE_COLUMNS; a file with another header is refused."""
    for row in figures:
        odd = set(FIGURE_COLUMNS) ^ set(row)
        if odd:
            raise ValueError(f"a row of figures has too few or too many keys: {sorted(odd)}")
    append(path, figures, FIGURE_COLUMNS)
