"""Pictures of the rows of a CSV, and of nothing else: the same rows give the same picture.

python -m benchmarks plot ROWS.csv                                   into benchmarks/results/local
python -m benchmarks plot ROWS.csv --commit 1234567 --out FOLDER     of one commit's rows
python -m benchmarks plot benchmarks/results/amd-epyc.csv --record   into docs/pictures

A picture shows the rows of one commit, the newest that has enough of them; it names machine,
commit and command, and its file carries a checksum of the figures drawn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np

from benchmarks.plot_rows import MIN_SIZES, STYLES, NothingToDraw, Rows, read
from benchmarks.registry import base_kinds, gpu_kinds
from benchmarks.row_files import LOCAL, RESULTS, ROOT

PICTURES = ROOT / "docs" / "pictures"
CHECKSUM = "fusedopt-figures"  # a text chunk of the PNG
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


@dataclass(frozen=True)
class Bar:
    """A ratio or a count; `low` and `high` are p20 and p80 where there is a spread."""

    label: str
    value: float
    low: float
    high: float
    pipeline: str


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
        spread = p80 > p20  # a rival without a row of its own at a size has a median alone
        bars = [(p50 - p20)[spread], (p80 - p50)[spread]]
        axes.errorbar(numel[spread], p50[spread], bars, fmt="none", ecolor=colour, capsize=3)
        axes.plot(numel, p50, color=colour, marker=marker, markersize=5, label=kinds[name].label,
                  linewidth=2.6 if ours else 1.4, zorder=3 if ours else 2)  # fmt: skip
    what = "copied" if rows.on_gpu else "streamed, hardly computed"
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
        figure.savefig(path, metadata={CHECKSUM: digest})
    return digest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", metavar="CSV", type=Path)
    parser.add_argument("--commit", default="", help="at least seven digits")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="FOLDER", default=RESULTS / LOCAL)
    where.add_argument("--record", action="store_const", dest="out", const=PICTURES,
                       help="draw those of the documents, in docs/pictures")  # fmt: skip
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
