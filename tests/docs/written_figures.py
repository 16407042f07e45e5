# ruff: noqa: RUF001
"""Figures in documents and in rows of ``benchmarks/results``; see test_figures.py."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
Row = dict[str, str]
SAME_RUNS = ("commit", "dirty", "machine", "torch", "threads", "case", "params", "dtype",
             "pipeline", "reference", "grads")  # fmt: skip

# ---- how a figure is written ---------------------------------------------------------------------

# What is compared, and how many of it a unit is. Bytes and counts of any kind go by their name.
UNITS = {
    "": ("ratio", 1.0),
    "x": ("ratio", 1.0),
    "%": ("ratio", 0.01),
    "s": ("time", 1.0),
    "ms": ("time", 1e-3),
    "us": ("time", 1e-6),
    "ns": ("time", 1e-9),
    "GB/s": ("bandwidth", 1e9),
    "TB/s": ("bandwidth", 1e12),
    "bytes": ("memory", 1.0),
    "KB": ("memory", 1e3),
    "MB": ("memory", 1e6),
    "GB": ("memory", 1e9),
    "KiB": ("memory", 2.0**10),
    "MiB": ("memory", 2.0**20),
    "GiB": ("memory", 2.0**30),
}
SPELLINGS = {"µs": "us", "μs": "us", "×": "x", "share": "", "fraction": "", "count": ""}
COUNTS = ("instructions per element", "instructions", "cycles per element", "cycles", "times")
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_WORDS = sorted([*filter(None, UNITS), *COUNTS, "µs", "μs", "×"], key=len, reverse=True)
_UNIT = "|".join(_WORDS)

FIGURE = re.compile(rf"(?<![\w.,])({_NUMBER}) ?({_UNIT})? \[({_NUMBER})–({_NUMBER})\]")
# Bytes alone are counted in nearly every page, by reading the source.
MEASURED_LOOK = re.compile(rf"(?<![\w.,])({_NUMBER}) ?(?!bytes)({_UNIT})(?![\w/])")
CELL = re.compile(r"(?<=\|) *\**(\d+\.\d+)\** *(?=\|)")  # a number alone in a cell of a table
# Written by a program that another test holds to the page.
GENERATED = re.compile(r"<!-- begin: (\w+) -->.*?<!-- end: \1 -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


class Figure(NamedTuple):
    """Median, p20 and p80 in one unit."""

    dimension: str
    p50: float
    p20: float
    p80: float


class Written(NamedTuple):
    """The same as a document has it."""

    text: str
    unit: str
    numbers: tuple[str, str, str]

    def is_rounded(self, figure: Figure) -> bool:
        dimension, scale = scale_of(self.unit)
        if dimension != figure.dimension:
            return False
        pairs = zip(self.numbers, figure[1:], strict=True)
        return all(rounds_to(value / scale, number) for number, value in pairs)


def scale_of(unit: str) -> tuple[str, float]:
    unit = SPELLINGS.get(unit, unit)
    return UNITS.get(unit, (unit, 1.0))


def rounds_to(value: float, number: str) -> bool:
    decimals = len(number.partition(".")[2])
    return f"{value:.{decimals}f}" == number.replace(",", "")


def figures_in(text: str) -> Iterator[Written]:
    for match in FIGURE.finditer(without_code(text)):
        p50, unit, p20, p80 = match.groups()
        yield Written(match[0], unit or "", (p50, p20, p80))


def without_code(text: str) -> str:
    return CODE.sub(" ", GENERATED.sub(" ", text))


# ---- the rows ------------------------------------------------------------------------------------


def figures_of(row: Row) -> Iterator[tuple[str, Figure]]:
    """All that a row says, by name: its spreads, and what follows from them."""
    if "figure" in row:  # figures that are no times of a step, one a row
        yield from spread(row, "", row["unit"])
        return
    for column in row:
        name, _, percentile = column.rpartition("_")
        if percentile == "p50":
            unit = next((u for u in ("ms", "us", "s") if name.split("_")[-1] == u), "x")
            yield from spread(row, f"{name}_", unit)
    if row.get("bytes_per_param") and row.get("params") and row.get("ms_p50"):
        n_bytes = float(row["bytes_per_param"]) * float(row["params"])
        times = [1e-3 * float(row[f"ms_{p}"]) for p in ("p50", "p80", "p20")]
        yield "bandwidth", Figure("bandwidth", *(n_bytes / t for t in times))
    if row.get("predicted_ms"):
        times = [float(row[f"ms_{p}"]) for p in ("p50", "p20", "p80")]
        over = (t / float(row["predicted_ms"]) for t in times)
        yield "over predicted", Figure("ratio", *over)


def spread(row: Row, name: str, unit: str) -> Iterator[tuple[str, Figure]]:
    numbers = [row.get(f"{name}{p}") for p in ("p50", "p20", "p80")]
    if all(numbers):
        dimension, scale = scale_of(unit)
        p50, p20, p80 = (float(number or "nan") * scale for number in numbers)
        yield name, Figure(dimension, p50, p20, p80)


def known_figures(rows: Iterable[Row]) -> Iterator[tuple[Figure, Row]]:
    """Each with its row. Runs of one commit say one thing together, and nothing alone: the median
    of their medians, from the lowest p20 to the highest p80, of the quiet ones if there are any. Of
    figures that are no times of a step the last run counts."""
    runs: dict[tuple[str | None, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(same_runs(row), []).append(row)
    for every in runs.values():
        own = [row for row in every if row.get("quiet", "1") == "1"] or every
        own = own[-1:] if "figure" in own[0] else own
        figures = [dict(figures_of(row)) for row in own]
        for name in set.intersection(*map(set, figures)):
            dimension = figures[0][name].dimension
            _, p50s, p20s, p80s = zip(*(found[name] for found in figures), strict=True)
            yield Figure(dimension, statistics.median(p50s), min(p20s), max(p80s)), own[-1]


def same_runs(row: Row) -> tuple[str | None, ...]:
    """Rows that agree in this are runs of one figure. A GPU's rows have columns of their own."""
    kernel, _, dtype = row.get("pipeline", "").rpartition(":")
    known = row | ({"dtype": dtype} if kernel.endswith(":reduce") else {})
    return tuple(known.get(name) for name in (*SAME_RUNS, "figure", "gpu", "driver"))


def results() -> list[Row]:
    rows: list[Row] = []
    for path in sorted(RESULTS.glob("*.csv")):
        with path.open() as file:
            rows += csv.DictReader(file)
    return rows


# ---- what is wrong with a document ---------------------------------------------------------------


def unfounded(text: str, rows: Iterable[Row]) -> list[str]:
    """Figures without a row, or whose row was measured at a commit that the text does not name."""
    known = list(known_figures(rows))
    problems = []
    for line in without_code(text).splitlines():
        told: set[str] = set()  # what the rows behind this line say besides
        for written in figures_in(line):
            found = [row for figure, row in known if written.is_rounded(figure)]
            commits = {row["commit"][:7] for row in found if row["dirty"] == "0"}
            told.update(value for row in found for value in row.values())
            if not found:
                problems.append(f"{written.text}: no row of benchmarks/results has it")
            elif not any(commit in text for commit in commits):
                problems.append(
                    f"{written.text}: measured at {sorted(commits)}, which is not named"
                )
        if told:
            counts = {f"{f.p50:.0f}" for f, row in known if row.get("unit") == "count"}
            cells = {cell.strip().replace(",", "") for cell in line.split("|")}
            problems += [f"{c}: no row has it" for c in cells - told - counts if c.isdigit()]
    return problems


def loose(text: str, allowed: Iterable[str]) -> list[str]:
    """Numbers that look measured and are not written as a figure. A median may be repeated."""
    medians = {(w.numbers[0], scale_of(w.unit)[0]) for w in figures_in(text)}
    prose = one_line(FIGURE.sub(" ", without_code(text)))
    for phrase in allowed:
        prose = prose.replace(one_line(phrase), " ")
    found = [m[0] for m in CELL.finditer(prose) if (m[1], "ratio") not in medians]
    for match in MEASURED_LOOK.finditer(prose):
        if (match[1], scale_of(match[2])[0]) not in medians:
            found.append(f"…{prose[max(0, match.start() - 30) : match.end() + 10]}…")
    return found


def one_line(text: str) -> str:
    return " ".join(text.split())
