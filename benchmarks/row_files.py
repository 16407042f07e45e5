"""The files that rows go to, and that they are read from.

A command that measures appends its rows to benchmarks/results/local/<machine>.csv, which git
ignores, so that a run leaves a checkout as it was. With --record they go to the tracked file of the
same name in benchmarks/results, the project's own figures, and with --out to any other file.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
from pathlib import Path

from benchmarks.pool import Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LOCAL = "local"  # of RESULTS: the folder that git ignores

# In the names of pipelines, since commit e824931. What was timed is the same: before it, the option
# `amp_scaling=True` was the default.
RENAMED = ("_stock_scaler", "_amp_scaling")


def add_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """--quick, which ``quick`` explains, and where rows go: see `destination`."""
    parser.add_argument(
        "--quick", action="store_true", help=f"{quick}; no rows without --out or --record"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    record = "append them to the tracked file of this machine: the project's own figures"
    where.add_argument("--record", action="store_true", help=record)


def destination(
    args: argparse.Namespace, suffix: str = "", machine: str | None = None
) -> Path | None:
    """The CSV that rows go to, if any, by the options of `add_options`.

    Its name is that of the processor, or of ``machine``: a GPU.
    """
    if args.out is not None or (args.quick and not args.record):
        out: Path | None = args.out
        return out
    slug = re.sub(r"[^a-z0-9]+", "-", (machine or cpu_model()).lower()).strip("-")
    return (RESULTS if args.record else RESULTS / LOCAL) / f"{slug}{suffix}.csv"


def told(path: Path | None) -> str:
    """The line in which a command says where its rows are; benchmarks/gpu.sh reads it."""
    return f"rows in {path}" if path else "no rows written"


def cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def every_file(results: Path) -> list[Path]:
    """The tracked CSVs, then the local ones."""
    return [*sorted(results.glob("*.csv")), *sorted((results / LOCAL).glob("*.csv"))]


def read(path: Path) -> list[Row]:
    """The rows of a CSV, with the names that pipelines have today."""
    with path.open(newline="") as file:
        return [_renamed(row) for row in csv.DictReader(file)]


def _renamed(row: Row) -> Row:
    names = {name: row[name] for name in ("pipeline", "reference") if row.get(name)}
    return row | {column: name.replace(*RENAMED) for column, name in names.items()}
