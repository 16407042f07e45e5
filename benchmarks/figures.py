"""Figures that are no comparison of two steps: how a row is made, where it goes, how it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import FIGURE_COLUMNS, append_figures, check_header, provenance
from benchmarks.timing import spread

Row = dict[str, object]


def common_columns(device: torch.device) -> Row:
    """The provenance of a run. The machine is the GPU where that is what the figures are about.

    Set the number of threads before.
    """
    gpu = gpu_name(device)
    return provenance() | ({"machine": gpu} if gpu else {})


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


class Figures:
    """Collects the figures of a run, and appends them to a CSV case by case."""

    def __init__(self, common: Row, path: Path | None) -> None:
        if path is not None:
            check_header(path, FIGURE_COLUMNS)
        self.rows: list[Row] = []
        self._common, self._path, self._written = common, path, 0

    def add(
        self,
        case: str,
        pipeline: str,
        figure: str,
        unit: str,
        values: Sequence[float],
        note: str = "",
    ) -> None:
        own = spread(values)
        self.rows.append(
            self._common
            | {"case": case, "pipeline": pipeline, "figure": figure, "unit": unit}
            | {"p20": f"{own.p20:.4f}", "p50": f"{own.p50:.4f}", "p80": f"{own.p80:.4f}"}
            | {"samples": len(values), "note": note}
        )

    def save(self) -> None:
        """What was added since the last time; nothing without a path."""
        new, self._written = self.rows[self._written :], len(self.rows)
        if self._path is not None and new:
            append_figures(self._path, new)


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A line for each case and pipeline, a column for each of these figures, as documents write it:
    median [p20–p80]."""
    columns = [name for name in columns if any(row["figure"] == name for row in rows)]
    cells = {(row["case"], row["pipeline"], row["figure"]): _cell(row) for row in rows}
    units = ("_ms", "_mib")  # they stand behind each value
    names = [next((n[: -len(u)] for u in units if n.endswith(u)), n) for n in columns]
    titles = ["case", "pipeline", *(name.replace("_", " ") for name in names)]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for case, pipeline in dict.fromkeys((row["case"], row["pipeline"]) for row in rows):
        values = [cells.get((case, pipeline, name), "-") for name in columns]
        lines.append(_line([str(case), str(pipeline), *values]))
    return "\n".join(lines)


def _cell(row: Row) -> str:
    unit = str(row["unit"])
    if unit == "count":
        return f"{float(str(row['p50'])):.0f}"
    p20, p50, p80 = (f"{float(str(row[name])):.2f}" for name in ("p20", "p50", "p80"))
    median = f"{p50}x" if unit == "x" else f"{p50} {unit}"
    return f"{median} [{p20}\u2013{p80}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
