"""What a run on a GPU leaves behind: rows of the CSV, and the tables it prints."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.gpu.first_step import FirstSteps
from benchmarks.gpu.kernels import KernelTimes
from benchmarks.gpu.machine import DRY_RUN, Machine
from benchmarks.gpu.measure import Measured
from benchmarks.gpu.targets import (
    FIRST_STEP,
    FIRST_STEP_MS,
    PREDICTIONS,
    TARGETS,
    Prediction,
)
from benchmarks.report import check_header, provenance
from benchmarks.row_files import RESULTS, destination
from benchmarks.timing import Spread
from benchmarks.verbs import VERBS, Workload

Row = dict[str, object]

_SPREADS = ("gpu_ms", "wall_ms", "host_us", "gpu_ratio", "wall_ratio")
COLUMNS = [
    *("timestamp", "commit", "dirty", "gpu", "driver", "torch", "cuda", "triton", "python"),
    *("case", "pipeline", "params", "tensors", "dtype", "grads", "bytes_per_param"),
    *(f"{name}_{percentile}" for name in _SPREADS for percentile in ("p20", "p50", "p80")),
    *("gb_s", "copy_gb_s", "copy_fraction", "dram_bytes_per_param"),
    *("predicted_gpu_ms", "predicted_wall_ms", "launches", "samples", "note"),
    "measured_over_predicted",
]
GOALS_SAY = """\
goals: what the project works towards on an H200, written down before anything was measured there.
MISSED is a result and no failure; on another GPU it says little. open: not measured."""
_CLOCK_OF_RATIO = {"gpu_ratio": "gpu_ms", "wall_ratio": "wall_ms"}


class Report:
    """Collects rows; every row carries the run's provenance and its copy bandwidth."""

    def __init__(self, machine: Machine) -> None:
        whole = provenance()
        kept = {name: whole[name] for name in ("timestamp", "commit", "dirty", "torch", "python")}
        self._common: Row = {**kept, **machine.facts()}
        self._dry = machine.dry
        self._mark = "dry-run:" if machine.dry else ""  # before the case's name
        self.copy_gb_s = 0.0
        self.rows: list[Row] = []

    def streams(self, speeds: dict[str, Spread], note: str) -> list[Row]:
        self.copy_gb_s = speeds["copy"].p50
        return [
            self._row("bandwidth", name, gb_s=speed.p50, note=note)
            for name, speed in speeds.items()
        ]

    def case(self, measured: Sequence[Measured]) -> list[Row]:
        return [self._measured(item) for item in measured if item.samples]

    def _measured(self, item: Measured) -> Row:
        case, prediction = item.case, PREDICTIONS[item.pipeline]
        row = self._row(case.name, item.pipeline, item.note)
        shapes = case.shapes()
        row |= {"params": case.numel, "tensors": len(shapes), "grads": case.grads}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "samples": len(item.samples)}
        for name in _SPREADS:
            clock = _CLOCK_OF_RATIO.get(name)
            row |= _spread_columns(name, item.ratio(clock) if clock else item.figure(name))
        row["launches"] = "" if item.launches is None else item.launches
        row["predicted_gpu_ms"] = _digits(prediction.gpu_ms(item.kind, case))
        row["predicted_wall_ms"] = _digits(prediction.wall_ms(item.kind, case))
        gpu_ms = item.figure("gpu_ms")
        return row if gpu_ms is None else self._bytes(row, item.kind.bytes_per_param, gpu_ms)

    def kernels(self, case: str, times: KernelTimes, verbs: Sequence[str] = VERBS) -> list[Row]:
        rows = []
        for verb in verbs:
            row = self._row(case, times.pipeline(verb), _launch_note(times.launches))
            row |= {"params": times.numel, **_spread_columns("gpu_ms", times.ms[verb])}
            row |= {"dtype": times.workload.dtypes.params, "samples": times.samples}
            if times.launches is not None and not self._dry:
                row["launches"] = len(times.launches) / 2
            n_bytes = times.workload.bytes_per_param(verb)
            rows.append(self._bytes(row, n_bytes, times.ms[verb]))
        return rows

    def counters(
        self, case: str, numel: int, workload: Workload, backend: str, measured: dict[str, float]
    ) -> list[Row]:
        kernels = ", ".join(f"{_short(kernel)} {value:.3f}" for kernel, value in measured.items())
        row = self._row(case, f"fusedopt_{backend}:counters:{workload}", kernels)
        row |= {"params": numel, "bytes_per_param": workload.traffic().total}
        row["dram_bytes_per_param"] = _digits(sum(measured.values()))
        return [row]

    def first_step(self, measured: FirstSteps) -> list[Row]:
        row = self._row(FIRST_STEP, f"fusedopt_adamw_triton:{measured.cache}", measured.note)
        row |= {"params": measured.numel, "tensors": measured.tensors, "dtype": "float32"}
        row |= {"grads": "new", "samples": measured.samples}
        row |= _spread_columns("wall_ms", measured.wall_ms)
        row["predicted_wall_ms"] = _digits(FIRST_STEP_MS[measured.cache])
        return [row]

    def _bytes(self, row: Row, bytes_per_param: float, ms: Spread) -> Row:
        gb_s = bytes_per_param * float(str(row["params"])) / ms.p50 / 1e6
        row |= {"bytes_per_param": bytes_per_param, "gb_s": _digits(gb_s)}
        if self.copy_gb_s:
            row["copy_fraction"] = _digits(gb_s / self.copy_gb_s)
            row["measured_over_predicted"] = _digits(self.copy_gb_s / gb_s)
        return row

    def _row(self, case: str, pipeline: str, note: str, gb_s: float | None = None) -> Row:
        row: Row = dict.fromkeys(COLUMNS, "") | self._common
        row |= {
            "case": self._mark + case,
            "pipeline": pipeline,
            "copy_gb_s": _digits(self.copy_gb_s),
        }
        if gb_s is not None:
            row |= {"gb_s": _digits(gb_s), "copy_fraction": _digits(gb_s / self.copy_gb_s)}
        row["note"] = f"{DRY_RUN}; {note}" if self._dry else note
        self.rows.append(row)
        return row

    def lookup(self, case: str, pipeline: str, column: str) -> float | None:
        for row in self.rows:
            found = (row["case"], row["pipeline"]) == (self._mark + case, pipeline)
            if found and row[column] != "":
                return float(str(row[column]))
        return None

    def goals(self) -> str:
        lines = [GOALS_SAY, "", "| goal | wanted | measured | |", "|---|---|---|---|"]
        for target in TARGETS:
            wanted = f"{'>=' if target.at_least else '<='} {target.value:g}{target.unit}"
            measured = target.figure(self.lookup)
            if measured is None:
                verdict, shown = "open", "not measured"
            elif self._dry:
                verdict, shown = "open", "DRY RUN"
            else:
                verdict = "met" if target.met(measured) else "MISSED"
                shown = f"{measured:.3g}{target.unit}"
            lines.append(f"| {target.label} | {wanted} | {shown} | {verdict} |")
        return "\n".join(lines)


def output(args: argparse.Namespace, machine: Machine) -> Path | None:
    """Where the rows go."""
    if machine.dry:
        out = args.out or Path(tempfile.mkdtemp(prefix="fusedopt-")) / "dry-run.csv"
    else:
        out = destination(args, machine=machine.name)
    if out is not None:
        check_header(out, COLUMNS)
    return out


def refuse_results(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.dry_run:
        return
    if args.record:
        parser.error("--dry-run measures nothing: there is nothing to --record")
    if args.out is not None and args.out.resolve().is_relative_to(RESULTS):
        parser.error(f"--dry-run measures nothing: --out {args.out} is where results are")


def _spread_columns(name: str, values: Spread | None) -> Row:
    if values is None:
        return {}
    shown = (values.p20, values.p50, values.p80)
    return {f"{name}_p{n}": _digits(v) for n, v in zip((20, 50, 80), shown, strict=True)}


def _digits(value: float) -> str:
    return f"{value:.5g}"


def _launch_note(launches: Sequence[str] | None) -> str:
    if launches is None:
        return ""
    return f"{len(launches)} launches for both: {', '.join(map(_short, launches))}"[:200]


def _short(kernel: str) -> str:
    return kernel.split("(")[0].split("::")[-1][:40]


def table(rows: Iterable[Row]) -> str:
    """Rows of one kind, as measured; the prediction stands beside the figure."""
    lines = [
        "| case | pipeline | GPU ms (H200: predicted) | x ours | wall ms (H200: predicted) "
        "| x ours | host us "
        "| GB/s | of copy | launches |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gpu = _with_prediction(row["gpu_ms_p50"], row["predicted_gpu_ms"])
        wall = _with_prediction(row["wall_ms_p50"], row["predicted_wall_ms"])
        gb_s = f"{float(str(row['gb_s'])):.0f}" if row["gb_s"] != "" else ""
        cells: tuple[object, ...] = (row["case"], row["pipeline"], gpu, row["gpu_ratio_p50"], wall)
        cells += (row["wall_ratio_p50"], row["host_us_p50"], gb_s, row["copy_fraction"])
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, row["launches"])) + " |")
    return "\n".join(lines)


def _with_prediction(measured: object, predicted: object) -> str:
    return f"{measured} ({float(str(predicted)):.3g})" if predicted != "" else str(measured)


def predictions(measured: Sequence[Measured]) -> str:
    """Written before the first sample: what each pipeline of a case should take."""
    parts = []
    for item in measured:
        prediction: Prediction = PREDICTIONS[item.pipeline]
        gpu, wall = (f(item.kind, item.case) for f in (prediction.gpu_ms, prediction.wall_ms))
        parts.append(f"{item.pipeline} {gpu:.3g}/{wall:.3g} ms")
    return "predicted for an H200, GPU/wall: " + ", ".join(parts)
