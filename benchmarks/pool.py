"""Several runs as one figure.

Where tensors lie, and how fast a shared machine's memory is at that hour, is the same for all
samples of a run; so runs lie further apart than the samples of one tell. The figure of several is
the median of their medians, from the lowest p20 to the highest p80.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Row = dict[str, str]
Key = tuple[str, ...]
# Rows that agree in these, and in their commit, are runs of one figure.
KEY = ("machine", "torch", "threads", "case", "params", "dtype", "pipeline", "reference", "grads")
SINGLE = (  # figures of a row that have no spread of their own
    "reference_ms_p50", "ceiling_fraction", "gb_s", "ceiling_gb_s", "predicted_ms",
    "measured_over_predicted", "copy_gb_s", "copy_fraction",
)  # fmt: skip


class Figure(NamedTuple):
    p20: float
    p50: float
    p80: float


def runs_by_key(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """By `KEY` the runs of the last measured sources, without disturbed ones if others remain."""
    found: dict[Key, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        found.setdefault(_key(row), []).append(row)
    return {key: _undisturbed(_of_the_last_sources(own)) for key, own in found.items()}


def _key(row: Row) -> Key:
    reduced = re.search(r":reduce:(\w+)$", row.get("pipeline", ""))  # whatever the params are
    return tuple(
        reduced[1] if reduced and column == "dtype" else row.get(column, "") for column in KEY
    )


def _of_the_last_sources(runs: Sequence[Row]) -> list[Row]:
    """Two runs of a changed tree may be of different changes: only the last one counts."""

    def sources(row: Row) -> tuple[str, ...]:
        changed = row.get("dirty", "0") != "0"
        return row["commit"], row["timestamp"] if changed else ""

    return [row for row in runs if sources(row) == sources(runs[-1])]


def _undisturbed(runs: list[Row]) -> list[Row]:
    return [row for row in runs if row.get("quiet", "1") == "1"] or runs


def spread(runs: Sequence[Row], column: str, over: str = "") -> Figure:
    """Of the figure in ``column``_p20, _p50 and _p80, divided by what stands in column ``over``."""

    def values(percentile: str) -> list[float]:
        name = f"{column}_{percentile}" if column else percentile
        return [float(row[name]) / (float(row[over]) if over else 1.0) for row in runs]

    return Figure(min(values("p20")), statistics.median(values("p50")), max(values("p80")))


def one_row(runs: Sequence[Row]) -> Row:
    """The last run's row with the figures of all of them, and their number in `runs`."""
    row = runs[-1] | {"runs": str(len(runs))}
    if len(runs) == 1:
        return row
    for name in SINGLE:
        found = [float(run[name]) for run in runs if run.get(name)]
        if found:
            row[name] = f"{statistics.median(found):.6g}"
    for name in [name.removesuffix("_p50") for name in row if name.endswith("_p50")]:
        if all(run.get(f"{name}_{p}") for run in runs for p in Figure._fields):
            for percentile, value in spread(runs, name)._asdict().items():
                row[f"{name}_{percentile}"] = f"{value:.6g}"
    return row
