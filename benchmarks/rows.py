"""Rows: what a run leaves behind, where they go, and what they say when they are read.

A row is one figure of one pipeline in one run: its samples, and beside each the sample of the
reference that was timed in turns with it. Medians, ratios and their intervals are worked out when
rows are read, so that the runs of one commit are taken together.

A command that measures appends its rows to benchmarks/results/local/<machine>.csv, which git
ignores, so that a run leaves a checkout as it was. With --record they go to the tracked file of the
same name in benchmarks/results, the project's own figures, and with --out to any other file.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # it takes its time to import, and some commands only count
    import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LOCAL = "local"  # of RESULTS: the folder that git ignores

Row = dict[str, str]
Key = tuple[str, ...]
Samples = np.ndarray[Any, np.dtype[np.float64]]

PROVENANCE = ("timestamp", "commit", "dirty", "machine", "cpus", "threads", "torch", "python")
WHAT = ("case", "params", "tensors", "dtype", "grads", "pipeline", "reference", "figure", "unit")
COLUMNS = (
    *(*PROVENANCE, "versions", *WHAT, "values", "reference_values"),
    *("bytes_per_param", "reference_bytes", "ceiling_gb_s", "disturbed", "quiet", "note"),
)
# Rows that agree in these, and in their commit, are runs of one figure.
KEY = ("machine", "torch", "threads", *(name for name in WHAT if name not in ("tensors", "unit")))
_SWAPPED = {"pipeline": "reference", "values": "reference_values"}
_SWAPPED |= {"bytes_per_param": "reference_bytes"}
_SWAPPED |= {new: old for old, new in _SWAPPED.items()}

RESAMPLES = 2000
CONFIDENCE = 0.95


# ---- writing -------------------------------------------------------------------------------------


def provenance(machine: str | None = None, versions: str = "") -> dict[str, object]:
    """What a row needs so that the run can be repeated. Set the number of threads before."""
    import torch

    now = datetime.datetime.now(datetime.timezone.utc)
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "timestamp": now.isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--verify", "HEAD") or os.environ.get("GIT_COMMIT", "none"),
        "dirty": int(changes != ""),
        "machine": machine or cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "versions": versions,
    }


def git(*arguments: str) -> str:
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


class Report:
    """The rows of a run, which are appended to a CSV as soon as they are known."""

    def __init__(self, common: dict[str, object], path: Path | None) -> None:
        if path is not None:
            check_header(path)
        self.common, self.path = common, path
        self.rows: list[Row] = []

    def add(self, figure: str, unit: str, *samples: Iterable[float], **columns: object) -> None:
        """With the samples of the pipeline and, where there is one, of the reference."""
        joined = [" ".join(f"{value:.5g}" for value in values) for values in samples]
        given = dict(zip(("values", "reference_values"), joined, strict=False))
        whole = {"disturbed": 0, "quiet": 1, "figure": figure, "unit": unit} | self.common
        whole |= columns | given
        row = {name: str(whole.pop(name, "")) for name in COLUMNS}
        if whole:
            raise ValueError(f"no columns of a row: {sorted(whole)}")
        self.rows.append(row)
        if self.path is not None:
            append(self.path, [row])

    def figures(self) -> list[Figure]:
        return list(figures(self.rows).values())


def append(path: Path, new_rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    check_header(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(new_rows)


def check_header(path: Path) -> None:
    if path.exists() and path.read_text().split("\n", 1)[0] != ",".join(COLUMNS):
        raise SystemExit(f"{path} has other columns than this version writes; use another --out")


# ---- the options of the commands, and where rows go ----------------------------------------------


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    prog = f"python -m benchmarks {command}"
    return argparse.ArgumentParser(prog, description=description, formatter_class=form)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def positive_float(text: str) -> float:
    if not 0.0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a finite number above 0")
    return float(text)


def device(text: str) -> torch.device:
    import torch

    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text}: torch.cuda.is_available() is False")
    return found


def gpu_name(device: torch.device) -> str | None:
    """The machine that figures are about, where that is a GPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def add_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """--quick, which ``quick`` explains, and where rows go: see `destination`."""
    parser.add_argument(
        "--quick", action="store_true", help=f"{quick}; no rows without --out or --record"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    record = "append them to the tracked file of this machine: the project's own figures"
    where.add_argument("--record", action="store_true", help=record)


def destination(args: argparse.Namespace, machine: str | None = None) -> Path | None:
    """The CSV that rows go to, if any, by the options of `add_options`.

    Its name is that of the processor, or of ``machine``: a GPU.
    """
    if args.out is not None or (args.quick and not args.record):
        return args.out
    slug = re.sub(r"[^a-z0-9]+", "-", (machine or cpu_model()).lower()).strip("-")
    return (RESULTS if args.record else RESULTS / LOCAL) / f"{slug}.csv"


def told(path: Path | None) -> str:
    """The last words of a command that measures; benchmarks/gpu.sh reads them."""
    return f"rows in {path}" if path else "no rows written"


# ---- reading -------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A median, and the interval that holds it with a confidence of 95 %."""

    low: float
    median: float
    high: float


def estimate(own: Samples, reference: Samples | None = None) -> Estimate:
    """Of the samples, or of how many times longer the reference took, sample by sample.

    The interval is a bootstrap of the samples, in which those of a pair stay together.
    """

    def statistic(own: Samples, *others: Samples, axis: int = -1) -> Any:
        return np.median(others[0] / own if others else own, axis=axis)

    data = (own,) if reference is None else (own, reference)
    median = float(statistic(*data))
    if len(own) < 2 or not importlib.util.find_spec("scipy"):  # on a machine without a network
        return Estimate(median, median, median)
    from scipy import stats

    found = stats.bootstrap(
        data, statistic, paired=True, method="percentile", confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Estimate(float(found.low), median, float(found.high))


def need_intervals() -> None:
    """For what judges by them, or writes them down."""
    if not importlib.util.find_spec("scipy"):
        raise SystemExit("scipy is not installed: pip install 'fusedopt[bench]'")


@dataclass(frozen=True)
class Figure:
    """The runs of one figure."""

    rows: Sequence[Row]

    def __getitem__(self, column: str) -> str:
        """What the last run's row says."""
        return self.rows[-1][column]

    def swapped(self) -> Figure:
        """The reference against the pipeline."""
        return Figure([{c: row[_SWAPPED.get(c, c)] for c in row} for row in self.rows])

    def ways(self) -> list[Figure]:
        """From either side, where there are two."""
        return [self, self.swapped()] if self["reference"] else [self]

    def samples(
        self, column: str = "values", over: Callable[[Row], float] = lambda row: 1.0
    ) -> Samples:
        """Of all runs, each over what belongs to its run."""
        return np.concatenate(
            [np.array(row[column].split(), float) / over(row) for row in self.rows]
        )

    def median(self) -> float:
        return float(np.median(self.samples()))

    def value(self) -> Estimate:
        return estimate(self.samples())

    def ratio(self) -> Estimate:
        """How many times faster the pipeline is than the reference."""
        return estimate(self.samples(), self.samples("reference_values"))

    def gb_s(self) -> float:
        """What has to be moved, over the time."""
        return float(self["bytes_per_param"]) * float(self["params"]) / self.median() / 1e6

    def predicted(self) -> bool:
        return bool(self["ceiling_gb_s"] and self["bytes_per_param"] and self["unit"] == "ms")

    def over_predicted(self) -> Estimate:
        """The time over that of the bytes at the run's own ceiling."""
        return estimate(self.samples(over=predicted_ms))

    def quiet(self) -> bool:
        return all(row["quiet"] == "1" for row in self.rows)


def predicted_ms(row: Row) -> float:
    return float(row["bytes_per_param"]) * float(row["params"]) / float(row["ceiling_gb_s"]) / 1e6


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def every_file(results: Path) -> list[Path]:
    """The tracked CSVs, then the local ones."""
    return [*sorted(results.glob("*.csv")), *sorted((results / LOCAL).glob("*.csv"))]


def figures(rows: Iterable[Row]) -> dict[Key, Figure]:
    """By `KEY` the runs of the last measured sources, without disturbed ones if others remain."""

    def sources(row: Row) -> tuple[str, ...]:
        # Two runs of a changed tree may be of different changes: only the last one counts.
        return row["commit"], row["timestamp"] if row["dirty"] != "0" else ""

    found: dict[Key, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        found.setdefault(tuple(row[column] for column in KEY), []).append(row)
    for key, own in found.items():
        last = [row for row in own if sources(row) == sources(own[-1])]
        found[key] = [row for row in last if row["quiet"] == "1"] or last
    return {key: Figure(own) for key, own in found.items()}


def find(known: Iterable[Figure], **columns: str) -> Figure | None:
    """The first figure that says so, be it of the pipeline or of its reference."""
    ways = (way for figure in known for way in figure.ways())
    return next((way for way in ways if columns.items() <= way.rows[-1].items()), None)


# ---- showing -------------------------------------------------------------------------------------


def shown(found: Estimate, unit: str) -> str:
    """`2.10x [2.02-2.17]`, and the median alone where all samples are the same."""
    whole = found.median >= 100 or unit in ("count", "B")
    digits = 0 if whole else 1 if found.median >= 10 else 4 if 0 < found.median < 0.1 else 2
    low, median, high = (f"{value:.{digits}f}" for value in found)
    separated = unit if unit in ("x", "") else f" {unit}"
    return f"{median}{separated}" + (f" [{low}\u2013{high}]" if low != high else "")


def markdown(header: Sequence[str], lines: Iterable[Iterable[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)
    )


def table(known: Iterable[Figure]) -> str:
    """A line for each figure: the time, against whom, how many times faster, and the memory's."""
    header = ("case", "pipeline", "figure", "median", "against", "ratio", "GB/s", "over predicted")
    return markdown((*header, ""), map(_line, known))


def _line(figure: Figure) -> Iterator[str]:
    yield from (figure["case"], figure["pipeline"], figure["figure"])
    yield shown(figure.value(), figure["unit"])
    yield figure["reference"]
    yield shown(figure.ratio(), "x") if figure["reference_values"] else ""
    yield f"{figure.gb_s():.4g}" if figure["unit"] == "ms" and figure["bytes_per_param"] else ""
    yield shown(figure.over_predicted(), "") if figure.predicted() else ""
    yield "; ".join(filter(None, ("" if figure.quiet() else "DISTURBED", figure["note"])))


def wide(
    known: Sequence[Figure], columns: Sequence[str], names: dict[str, str] | None = None
) -> str:
    """A line for each case and pipeline, a column for each figure that is known of any; a column
    `<figure>_ratio` tells how many times longer it takes than what was timed in turns with it."""
    cells: dict[tuple[str, str, str], str] = {}
    for figure in known:
        case, name = figure["case"], figure["figure"]
        for way in figure.ways():
            cells[case, way["pipeline"], name] = shown(way.value(), way["unit"])
        if figure["reference"]:
            cells[case, figure["reference"], f"{name}_ratio"] = shown(figure.ratio(), "x")
    columns = [name for name in columns if any(cell[2] == name for cell in cells)]
    lines = (
        (case, (names or {}).get(pipeline, pipeline),
         *(cells.get((case, pipeline, name), "") for name in columns))
        for case, pipeline in dict.fromkeys((c, p) for c, p, name in cells if name in columns)
    )  # fmt: skip
    return markdown(["case", "pipeline", *(name.replace("_", " ") for name in columns)], lines)
