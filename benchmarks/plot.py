"""Pictures of the rows of a CSV, and of nothing else: the same rows give the same picture.

python -m benchmarks plot benchmarks/results/amd-epyc.csv               into docs/pictures
python -m benchmarks plot ROWS.csv --commit 1234567 --out FOLDER        of one commit's rows

A picture shows the rows of one commit, the newest that has enough of them; it names machine,
commit and command, and its file carries a checksum of the figures drawn.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np

from benchmarks.registry import base_kinds, gpu_kinds
from benchmarks.report import ROOT

PICTURES = ROOT / "docs" / "pictures"
CHECKSUM = "fusedopt-figures"  # a text chunk of the PNG
SWEEP_CPU = "adamw-gpt-"  # a decoder's 148 tensors, of so many elements in all
SWEEP_GPU = ("adamw-1M", "adamw-10M", "adamw-resnet50", "adamw-gpt2-124M", "adamw-llama-1.24B")
MIN_SIZES = 3  # of a sweep

# Of the lines and their legend, ours first.
STYLES = {
    "fusedopt_adamw": ("#d1495b", "o"),
    "fusedopt_adamw_triton": ("#e58a97", "o"),
    "adamw_fused": ("#1f5f8b", "s"),
    "adamw_foreach": ("#6fa8c9", "^"),
    "adamw_compiled": ("#a9c6d9", "v"),
    "adamw_deepspeed": ("#5b8c5a", "D"),
}
OURS, THEIRS = "#d1495b", "#6fa8c9"
ROOF = "#222222"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
}


class NothingToDraw(Exception):
    """The rows have too little for this picture."""


@dataclass(frozen=True)
class Bar:
    """A ratio or a count; `low` and `high` are p20 and p80 where there is a spread."""

    label: str
    value: float
    low: float
    high: float
    pipeline: str


@dataclass(frozen=True)
class Rows:
    """Undisturbed rows of one commit, the latest of each case, pipeline and reference."""

    rows: list[dict[str, str]]

    @classmethod
    def of(cls, found: Sequence[dict[str, str]], commit: str) -> Rows:
        latest: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in sorted(found, key=lambda row: row["timestamp"]):
            clean = row["dirty"] == "0" and row.get("quiet", "1") == "1"
            if clean and row["commit"].startswith(commit) and row["grads"] in ("new", ""):
                latest[row["case"], row["pipeline"], row.get("reference", "")] = row
        return cls(list(latest.values()))

    @property
    def on_gpu(self) -> bool:
        return "gpu" in self.rows[0]

    @property
    def caption(self) -> str:
        row = self.rows[0]
        if self.on_gpu:
            machine, command = row["gpu"], "bash benchmarks/gpu.sh"
        else:
            machine = f"{row['machine']}, {row['threads']} threads"
            command = "python -m benchmarks cpu"
        return f"{machine}, torch {row['torch']}; commit {row['commit'][:7]}; {command}"

    def sweep(self) -> dict[str, list[tuple[int, float, float, float]]]:
        """By pipeline: elements and ms (p50, p20, p80), in the order of elements."""
        points: dict[str, dict[int, tuple[float, float, float]]] = {}
        for row in self.rows:
            in_sweep = (
                row["case"] in SWEEP_GPU if self.on_gpu else row["case"].startswith(SWEEP_CPU)
            )
            if not in_sweep:
                continue
            clock = "gpu_ms" if self.on_gpu else "ms"
            numel = int(row["params"])
            if row[f"{clock}_p50"] and row["pipeline"] in STYLES:
                p50, p20, p80 = (float(row[f"{clock}_{p}"]) for p in ("p50", "p20", "p80"))
                points.setdefault(row["pipeline"], {})[numel] = (p50, p20, p80)
            reference = row.get("reference", "")
            if reference in STYLES and row["pipeline"] == "fusedopt_adamw":
                ms = float(row["reference_ms_p50"])
                points.setdefault(reference, {}).setdefault(numel, (ms, ms, ms))
        return {
            name: [(numel, *points[name][numel]) for numel in sorted(points[name])]
            for name in STYLES
            if len(points.get(name, {})) >= MIN_SIZES
        }

    def roof(self) -> list[tuple[int, float]]:
        """Elements and ms that the bytes of our step take: in a stream, timed in turns with it
        over as many elements; on a GPU at the speed of a copy."""
        found = []
        for row in self.rows:
            if row["pipeline"] != "fusedopt_adamw" or not self._in_sweep(row):
                continue
            numel = int(row["params"])
            if self.on_gpu:
                n_bytes = float(row["bytes_per_param"]) * numel
                found.append((numel, n_bytes / float(row["copy_gb_s"]) / 1e6))
            elif row["reference"] == "stream_huge":
                found.append((numel, float(row["reference_ms_p50"])))
        if len(found) < MIN_SIZES:
            raise NothingToDraw(f"the roof is known for {len(found)} sizes")
        return sorted(found)

    def _in_sweep(self, row: dict[str, str]) -> bool:
        return row["case"] in SWEEP_GPU if self.on_gpu else row["case"].startswith(SWEEP_CPU)

    def ours_per_param(self) -> float:
        for row in self.rows:
            if row["pipeline"] == "fusedopt_adamw" and row["bytes_per_param"]:
                return float(row["bytes_per_param"])
        raise NothingToDraw("no row of fusedopt_adamw")


Figure = Any  # matplotlib's; it has no types of its own


def step_time(rows: Rows) -> tuple[Figure, object]:
    """Time of a whole step against the number of params, and the roof of the bandwidth."""
    lines, roof = rows.sweep(), rows.roof()
    if "fusedopt_adamw" not in lines:
        raise NothingToDraw(f"fewer than {MIN_SIZES} sizes of fusedopt_adamw")
    per_param, kinds = rows.ours_per_param(), base_kinds()
    kinds |= gpu_kinds({"cuda": "cuda", "triton": "triton"})
    figure, axes = _figure()
    for name, points in lines.items():
        colour, marker = STYLES[name]
        numel, p50, p20, p80 = (np.array(column) for column in zip(*points, strict=True))
        ours = name.startswith("fusedopt")
        axes.fill_between(numel, p20, p80, color=colour, alpha=0.18, linewidth=0)
        axes.plot(numel, p50, color=colour, marker=marker, markersize=5, label=kinds[name].label,
                  linewidth=2.6 if ours else 1.4, zorder=3 if ours else 2)  # fmt: skip
    what = "copied" if rows.on_gpu else "streamed, nothing computed"
    axes.plot(*zip(*roof, strict=True), color=ROOF, linestyle=(0, (5, 3)), linewidth=1.2,
              label=f"roof: our {per_param:g} bytes/param {what}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters, fp32")
    axes.set_ylabel("ms for a whole step")
    axes.set_title("unscale, check, clip, AdamW: one step", loc="left", fontsize=11)
    axes.legend(fontsize=9)
    return figure, {"lines": lines, "roof": roof, "bytes_per_param": per_param}


def bytes_per_param(rows: Rows) -> tuple[Figure, object]:
    """What each pipeline has to read and write."""
    kinds = base_kinds()
    bars: dict[tuple[str, str], Bar] = {}
    for row in rows.rows:
        kind = kinds.get(row["pipeline"])
        if kind is not None and row["bytes_per_param"]:
            count, group = float(row["bytes_per_param"]), _group(row)
            name = f"{kind.label}  ({group})"
            bars[group, row["pipeline"]] = Bar(name, count, count, count, row["pipeline"])
    if not bars:
        raise NothingToDraw("no bytes per param")
    shown = [bars[key] for key in sorted(bars, key=lambda key: (key[0], bars[key].value))]
    figure = _bars(shown, "bytes per parameter and step, read and written", "bytes", "{:g}")
    return figure, [vars(bar) for bar in shown]


def ratio_by_model(rows: Rows) -> tuple[Figure, object]:
    """How many times faster than torch's fused=True, by parameter list."""
    shown = []
    for row in rows.rows:
        if rows.on_gpu:
            wanted = row["pipeline"] in ("adamw_fused", "sgd_fused")
            columns = ["wall_ratio_p50", "wall_ratio_p20", "wall_ratio_p80"]
        else:
            wanted = row["reference"] in ("adamw_fused", "sgd_fused", "adamw_bf16_torch_ops")
            wanted &= row["pipeline"] in ("fusedopt_adamw", "fusedopt_sgd", "fusedopt_adamw_bf16")
            columns = ["ratio_p50", "ratio_p20", "ratio_p80"]
        if wanted and row[columns[0]]:
            shown.append(
                Bar(row["case"], *(float(row[name]) for name in columns), "fusedopt_adamw")
            )
    if not shown:
        raise NothingToDraw("no ratio against torch")
    shown.sort(key=lambda bar: bar.value)
    title = "times faster than torch (fused=True; with bf16: torch operations on masters)"
    return _bars(shown, title, "times", "{:.1f}x"), [vars(bar) for bar in shown]


PICTURE_OF: dict[str, Callable[[Rows], tuple[Figure, object]]] = {
    "step-time": step_time,
    "bytes-per-param": bytes_per_param,
    "ratio-by-model": ratio_by_model,
}


def _group(row: dict[str, str]) -> str:
    optimizer = "SGD" if "sgd" in row["pipeline"] else "AdamW"
    dtypes = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return f"{optimizer}, {dtypes.get(row['dtype'], row['dtype'])}"


def _figure(height: float = 4.6) -> tuple[Figure, Any]:
    figure = matplotlib.figure.Figure(figsize=(8.0, height), layout="constrained")
    return figure, figure.subplots()


def _bars(bars: Sequence[Bar], title: str, unit: str, form: str) -> Figure:
    figure, axes = _figure(1.3 + 0.3 * len(bars))
    for place, bar in enumerate(bars):
        ours = bar.pipeline.startswith("fusedopt")
        spread = [[bar.value - bar.low], [bar.high - bar.value]]
        axes.barh(place, bar.value, color=OURS if ours else THEIRS, height=0.66,
                  xerr=spread if bar.high > bar.low else None, ecolor="#555555")  # fmt: skip
        axes.text(bar.high, place, "  " + form.format(bar.value), va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=9)
    axes.grid(False, axis="y")
    axes.margins(x=0.1)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def checksum(figures: object) -> str:
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def draw(name: str, rows: Rows, path: Path) -> str:
    """The picture as PNG; its checksum."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure, figures = PICTURE_OF[name](rows)
        figure.supxlabel(rows.caption, fontsize=7.5, color="#555555")
        digest = checksum([figures, rows.caption])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None, CHECKSUM: digest})
    return digest


def read(path: Path, commit: str = "") -> Rows:
    """Rows of `commit`, or of the newest commit that has a sweep of sizes."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    newest_first = sorted(found, key=lambda row: row["timestamp"], reverse=True)
    commits = [commit] if commit else list(dict.fromkeys(row["commit"] for row in newest_first))
    for candidate in commits:
        rows = Rows.of(found, candidate)
        if rows.rows and (commit or "fusedopt_adamw" in rows.sweep()):
            return rows
    raise SystemExit(f"{path}: no commit has clean rows of {MIN_SIZES} sizes")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", metavar="CSV", type=Path)
    parser.add_argument("--commit", default="", help="at least seven digits")
    parser.add_argument("--out", type=Path, default=PICTURES)
    options = parser.parse_args(arguments)
    rows = read(options.rows, options.commit)
    drawn = 0
    for name in PICTURE_OF:
        path = options.out / f"{options.rows.stem}-{name}.png"
        try:
            draw(name, rows, path)
        except NothingToDraw as error:
            print(f"{name}: not drawn, {error}")
        else:
            drawn += 1
            print(path)
    return 0 if drawn else 1
