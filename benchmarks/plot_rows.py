"""Which rows of a CSV a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pool import one_row, runs_by_key
from benchmarks.row_files import read as read_rows

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


class NothingToDraw(Exception):
    """The rows have too little for this picture."""


@dataclass(frozen=True)
class Rows:
    """Undisturbed rows of one commit, machine, torch and number of threads: those of the newest;
    of each case, pipeline and reference one, for all runs."""

    rows: list[dict[str, str]]

    @classmethod
    def of(cls, found: Sequence[dict[str, str]], commit: str) -> Rows:
        in_order = sorted(found, key=lambda row: row["timestamp"])
        clean = [
            row
            for row in in_order
            if row["commit"].startswith(commit)
            and (row["dirty"], row.get("quiet", "1")) == ("0", "1")
            and row["grads"] in ("new", "")
        ]
        settings = [_setting(row) for row in clean if _in_sweep(row)]
        own = [row for row in clean if settings and _setting(row) == settings[-1]]
        return cls([one_row(runs) for runs in runs_by_key(own).values()])

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
        counts = sorted({int(row["runs"]) for row in self.rows})
        least, most = counts[0], counts[-1]
        runs = f"{least} runs of " if least == most else f"{least} to {most} runs of "
        runs = "" if most == 1 else runs
        return f"{machine}, torch {row['torch']}; commit {row['commit'][:7]}; {runs}{command}"

    def sweep(self) -> dict[str, list[tuple[float, ...]]]:
        """By pipeline: elements and ms (p50, p20, p80), in the order of elements."""
        points: dict[str, dict[int, tuple[float, ...]]] = {}
        for row in self.rows:
            if not _in_sweep(row):
                continue
            clock = "gpu_ms" if self.on_gpu else "ms"
            numel, of_roof = int(row["params"]), row.get("reference") == "stream_huge"
            if row[f"{clock}_p50"] and row["pipeline"] in STYLES:
                triple = tuple(float(row[f"{clock}_{p}"]) for p in ("p50", "p20", "p80"))
                sizes = points.setdefault(row["pipeline"], {})
                if of_roof or numel not in sizes:  # beside the roof, from the samples between it
                    sizes[numel] = triple
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
            if row["pipeline"] != "fusedopt_adamw" or not _in_sweep(row):
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

    def ours_per_param(self) -> float:
        for row in self.rows:
            if row["pipeline"] == "fusedopt_adamw" and row["bytes_per_param"]:
                return float(row["bytes_per_param"])
        raise NothingToDraw("no row of fusedopt_adamw")


def _in_sweep(row: dict[str, str]) -> bool:
    return row["case"] in SWEEP_GPU if "gpu" in row else row["case"].startswith(SWEEP_CPU)


def _setting(row: dict[str, str]) -> list[str | None]:
    return [row.get(name) for name in ("machine", "gpu", "driver", "torch", "threads")]


def read(path: Path, commit: str = "") -> Rows:
    """Rows of `commit`, or of the newest commit that has a sweep of sizes."""
    try:
        found = read_rows(path)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from error
    if not found or not {"case", "pipeline", "grads", "bytes_per_param"} <= found[0].keys():
        raise SystemExit(f"{path}: no rows of steps")
    newest_first = sorted(found, key=lambda row: row["timestamp"], reverse=True)
    commits = [commit] if commit else list(dict.fromkeys(row["commit"] for row in newest_first))
    for candidate in commits:
        rows = Rows.of(found, candidate)
        if rows.rows and (commit or "fusedopt_adamw" in rows.sweep()):
            return rows
    raise SystemExit(f"{path}: no commit has clean rows of {MIN_SIZES} sizes")
