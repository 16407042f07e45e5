"""What a run leaves behind: rows of the CSV with their provenance, and a table to read."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import stream
from benchmarks.cases import Case, Comparison
from benchmarks.registry import KINDS
from benchmarks.roofline import predict_seconds
from benchmarks.timing import Summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PROVENANCE = ["timestamp", "commit", "dirty", "machine", "cpus", "threads", "torch", "python"]
WHAT = ["case", "pipeline", "reference", "params", "tensors", "dtype", "grads", "bytes_per_param"]
TIMES = ["ms_p20", "ms_p50", "ms_p80", "reference_ms_p50"]
RATIOS = ["ratio_p20", "ratio_p50", "ratio_p80", "ceiling_fraction", "target"]
ROOFLINE = ["gb_s", "ceiling_gb_s", "predicted_ms", "measured_over_predicted"]
COLUMNS = [*PROVENANCE, *WHAT, *TIMES, *RATIOS, "samples", "disturbed", "quiet", "note", *ROOFLINE]


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


def cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def results_path(suffix: str = "", machine: str | None = None) -> Path:
    """The CSV of this machine, named after its processor, or after `machine`: a GPU."""
    slug = re.sub(r"[^a-z0-9]+", "-", (machine or cpu_model()).lower()).strip("-")
    return RESULTS / f"{slug}{suffix}.csv"


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


def table(results: Sequence[Result]) -> str:
    lines = [
        "| figure | ratio | p20..p80 | measured / predicted | target | met? |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        target = result.comparison.target
        wanted = "-" if target is None else f">= {target:g}x"
        if result.summary is None:
            lines.append(f"| {result.label} | not measured: {result.note} | | | {wanted} | |")
            continue
        ratio = result.summary.ratio
        met = "-" if target is None else "yes" if ratio.p50 >= target else "NO"
        mark = ""
        if not result.summary.quiet:  # no ground for a verdict
            met, mark = "-" if target is None else "?", " (disturbed)"
        over = _roofline(result)["measured_over_predicted"]
        lines.append(
            f"| {result.label} | {ratio.p50:.2f}x{mark} | {ratio.p20:.2f}..{ratio.p80:.2f} "
            f"| {f'{float(str(over)):.2f}' if over else '-'} | {wanted} | {met} |"
        )
    return "\n".join(lines)


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
