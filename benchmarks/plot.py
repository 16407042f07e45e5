"""Pictures of the rows of a CSV, and of nothing else: the same rows give the same picture.

python -m benchmarks plot ROWS.csv                                   into benchmarks/results/local
python -m benchmarks plot ROWS.csv --commit 1234567 --out FOLDER     of one commit's rows
python -m benchmarks plot benchmarks/results/MACHINE.csv --record    into docs/pictures

A picture shows the clean and quiet rows of one commit, the newest that has a sweep of sizes; it
names machine, commit and command, and its file carries a checksum of what is drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure

from benchmarks import fidelity_tables
from benchmarks.registry import base_kinds, gpu_kinds
from benchmarks.rows import (
    LOCAL,
    RESULTS,
    ROOT,
    Figure,
    Row,
    figures,
    find,
    parser,
    predicted_ms,
    read,
)

PICTURES = ROOT / "docs" / "pictures"
CHECKSUM = "fusedopt-figures"  # a text chunk of the PNG
OURS = "fusedopt_adamw"
# A decoder's tensors, of so many elements in all; on a GPU models beside them.
SWEEP_CPU = "adamw-gpt-"
SWEEP_GPU = ("adamw-1M", "adamw-10M", "adamw-resnet50", "adamw-gpt2-124M", "adamw-llama-1.24B")
MIN_SIZES = 3  # of a sweep
STYLES = {  # of the lines and their legend, ours first
    OURS: ("#d1495b", "o"),
    "fusedopt_adamw_triton": ("#e58a97", "o"),
    "adamw_fused": ("#1f5f8b", "s"),
    "adamw_foreach": ("#6fa8c9", "^"),
    "adamw_deepspeed": ("#5b8c5a", "D"),
}
RIVALS = ("adamw_fused", "sgd_fused", "adamw_bf16_torch_ops")
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
}
Drawn = tuple[Any, object]  # matplotlib's figure, and the numbers in it


def time_of(figure: Figure) -> bool:
    return figure["figure"] in ("step", "gpu") and bool(figure["reference"])


def in_sweep(figure: Figure) -> bool:
    on_gpu = figure["figure"] == "gpu"
    swept = figure["case"] in SWEEP_GPU if on_gpu else figure["case"].startswith(SWEEP_CPU)
    return time_of(figure) and swept


def step_time(known: Sequence[Figure]) -> Drawn:
    """Time of a whole step against the number of params, and the roof of the memory."""
    ways = [way for figure in known if in_sweep(figure) for way in (figure, figure.swapped())]
    ways.sort(key=lambda way: way["reference"] != "stream_huge")  # from the samples beside the roof
    lines: dict[str, dict[int, Any]] = {name: {} for name in STYLES}
    roof: dict[int, float] = {}
    for way in ways:
        numel, name = int(way["params"]), way["pipeline"]
        if name in STYLES:
            lines[name].setdefault(numel, way.value())
        if name == "stream_huge" and way["reference"] == OURS:
            roof[numel] = way.median()
        elif name == OURS and way["figure"] == "gpu":
            roof[numel] = predicted_ms(way.rows[-1])
    kinds = base_kinds() | gpu_kinds({"cuda": "cuda", "triton": "triton"})
    figure = matplotlib.figure.Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        if len(points) >= MIN_SIZES:
            colour, marker = STYLES[name]
            sizes = sorted(points)
            found = [points[size] for size in sizes]
            bars = [[p.median - p.low for p in found], [p.high - p.median for p in found]]
            axes.errorbar(sizes, [p.median for p in found], bars, color=colour, marker=marker,
                          markersize=5, capsize=3, label=kinds[name].label,
                          linewidth=2.6 if name.startswith("fusedopt") else 1.4)  # fmt: skip
    axes.plot(*zip(*sorted(roof.items()), strict=True), color="#222222", linestyle="--",
              linewidth=1.2, label="roof: our bytes, hardly computed")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="parameters, fp32", ylabel="ms for a whole step")
    axes.set_title("unscale, check, clip, AdamW: one step", loc="left", fontsize=11)
    axes.legend(fontsize=9)
    return figure, [{name: sorted(points.items()) for name, points in lines.items()}, roof]


def ratio_by_model(known: Sequence[Figure]) -> Drawn:
    """How many times faster than torch's fused=True, by parameter list."""
    ours = [figure for figure in known if time_of(figure) and figure["reference"] in RIVALS]
    ours = [f for f in ours if f["pipeline"] in (OURS, "fusedopt_sgd", "fusedopt_adamw_bf16")]
    bars = sorted(((f["case"], f.ratio()) for f in ours), key=lambda bar: bar[1].median)
    figure = matplotlib.figure.Figure(figsize=(8.0, 1.3 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, ratio) in enumerate(bars):
        spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        axes.barh(place, ratio.median, color="#d1495b", height=0.66, xerr=spread, ecolor="#555555")
        axes.text(ratio.high, place, f"  {ratio.median:.1f}x", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [case for case, _ in bars], fontsize=9)
    axes.grid(False, axis="y")
    axes.margins(x=0.1)
    axes.set_xlabel("times")
    title = "times faster than torch (fused=True; with bf16: torch operations on masters)"
    axes.set_title(title, loc="left", fontsize=11)
    return figure, bars


PICTURE_OF: dict[str, Callable[[Sequence[Figure]], Drawn]] = {
    "step-time": step_time,
    "ratio-by-model": ratio_by_model,
}
AGAINST = "adamw_fused"  # a sweep compares every size with it
FIDELITY = "fidelity"  # of other rows, where a CSV has them


def of_commit(rows: Sequence[Row], commit: str) -> list[Figure]:
    """What is drawn, of the newest setting that has a sweep of sizes; nothing without one."""
    clean = [
        row
        for row in rows
        if row["commit"].startswith(commit)
        and (row["dirty"], row["quiet"]) == ("0", "1")
        and row["grads"] in ("new", "")
    ]
    known = list(figures(clean).values())
    ours = [f for f in known if (f["pipeline"], f["reference"]) == (OURS, AGAINST)]
    swept = [figure for figure in ours if in_sweep(figure)]
    if len({figure["params"] for figure in swept}) < MIN_SIZES:
        return []
    setting = [max(swept, key=lambda f: f["timestamp"])[c] for c in ("machine", "torch", "threads")]
    return [f for f in known if [f[c] for c in ("machine", "torch", "threads")] == setting]


def read_figures(path: Path, commit: str = "") -> list[Figure]:
    try:
        rows = read(path)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from error
    if not rows or "figure" not in rows[0]:
        raise SystemExit(f"{path}: no rows of steps")
    newest_first = sorted(rows, key=lambda row: row["timestamp"], reverse=True)
    for candidate in [commit] if commit else dict.fromkeys(row["commit"] for row in newest_first):
        if found := of_commit(rows, candidate):
            return found
    raise SystemExit(f"{path}: no commit has clean rows of {MIN_SIZES} sizes")


def read_fidelity(path: Path) -> list[Figure]:
    """The newest clean figures of trainings with states of fewer bits, of one commit."""
    own = [row for row in read(path) if row["case"] in fidelity_tables.TRAININGS]
    clean = sorted((r for r in own if r["dirty"] == "0"), key=lambda r: r["timestamp"])
    return list(figures(r for r in clean if r["commit"] == clean[-1]["commit"]).values())


def caption(known: Sequence[Figure]) -> str:
    first = find(known, pipeline=OURS) or known[0]
    on_gpu, runs = first["figure"] != "step", max(len(figure.rows) for figure in known)
    where = first["machine"] if on_gpu else f"{first['machine']}, {first['threads']} threads"
    command = "bash benchmarks/gpu.sh" if on_gpu else "python -m benchmarks cpu"
    several = f"up to {runs} runs of " if runs > 1 else ""
    return f"{where}, torch {first['torch']}; commit {first['commit'][:7]}; {several}{command}"


def draw(name: str, known: Sequence[Figure], path: Path) -> str:
    """The picture as PNG; its checksum."""
    drawn, told = PICTURE_OF.get(name, fidelity_tables.picture), caption
    if name == FIDELITY:
        told = fidelity_tables.caption
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure, numbers = drawn(known)
        figure.supxlabel(told(known), fontsize=7.5, color="#555555")
        said = json.dumps([numbers, told(known)], sort_keys=True)
        digest = hashlib.sha256(said.encode()).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={CHECKSUM: digest})
    return digest


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser("plot", __doc__)
    args.add_argument("rows", metavar="CSV", type=Path)
    args.add_argument("--commit", default="", help="at least seven digits")
    where = args.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="FOLDER", default=RESULTS / LOCAL)
    where.add_argument("--record", action="store_const", dest="out", const=PICTURES,
                       help="draw those of the documents, in docs/pictures")  # fmt: skip
    options = args.parse_args(arguments)
    known = dict.fromkeys(PICTURE_OF, read_figures(options.rows, options.commit))
    if trainings := read_fidelity(options.rows):
        known[FIDELITY] = trainings
    for name, own in known.items():
        path = options.out / f"{options.rows.stem}-{name}.png"
        draw(name, own, path)
        print(path)
    return 0
