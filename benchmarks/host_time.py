"""The host's share of a step with Triton, as far as it can be measured without a GPU.

python -m benchmarks host            rows go to benchmarks/results/local
python -m benchmarks host --quick    printed only

The whole step of `adamw-300x1k` runs but for its work: launches, the copy of the table and CUDA's
events and streams are replaced by calls that do nothing. What a GPU adds to these figures is
Triton's launcher twice, and torch's copy and event where the table has moved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fusedopt
from benchmarks.arguments import positive
from benchmarks.param_sets import Gradients, equal, make_params
from benchmarks.pipelines import ADAMW, MAX_GRAD_NORM, Ours, Pipeline
from benchmarks.registry import KINDS
from benchmarks.report import COLUMNS, append, check_header, provenance
from benchmarks.row_files import add_options, destination, told
from benchmarks.timing import Sample, Sampler, Spread, spread
from fusedopt.backends import triton as backend

SHAPES = equal(300, 1000)
CASE = "host-300x1k"
PIPELINE = "fusedopt_adamw_triton_host"

# What has moved since the last step: nothing; gradients (new tensors); the learning rate.
MOVED = {"nothing": "kept", "gradients": "new", "lr": "kept"}


class _Over:
    """In the place of a CUDA event."""

    def query(self) -> bool:
        return True


class NoLaunches(backend.TritonDriver):
    """Serves CPU tensors; computes nothing."""

    device_type = "cpu"
    pins = False

    def launcher(
        self, device: torch.device, variant: backend.Key, values: dict[str, int]
    ) -> backend.Launch:
        return lambda programs, stream: None

    def reduce_programs(self, device: torch.device) -> int:
        return 32 * 132

    def event(self, device: torch.device) -> Any:
        return _Over()

    def stream(self, device: torch.device) -> int:
        return 0

    def capturing(self, device: torch.device) -> bool:
        return False

    def index(self, device: torch.device) -> int:
        return 0

    def record_stream(self, tensor: Tensor, device: torch.device) -> None:
        pass


class HostOnly(Ours):
    """Our scaler's step and update."""

    def __init__(self, moved: str) -> None:
        params = make_params(SHAPES, torch.float32)
        grads = Gradients(SHAPES, torch.float32, MOVED[moved])
        super().__init__(
            params,
            grads,
            lambda p: fusedopt.FusedAdamW(
                p, max_grad_norm=MAX_GRAD_NORM, backend="triton", **ADAMW
            ),
            fusedopt.GradScaler,
        )
        self._lr_moves = moved == "lr"

    def prepare(self) -> None:
        super().prepare()
        if self._lr_moves:
            self.optimizer.param_groups[0]["lr"] *= 0.999


def measure(rounds: int) -> dict[str, list[Sample]]:
    """Samples by what has moved, taken in turns."""
    pipelines: dict[str, Pipeline] = {moved: HostOnly(moved) for moved in MOVED}
    samplers = {moved: Sampler(pipeline) for moved, pipeline in pipelines.items()}
    samples: dict[str, list[Sample]] = {moved: [] for moved in MOVED}
    for _ in range(rounds):
        for moved, take in samplers.items():
            samples[moved].append(take())
    return samples


def row(moved: str, samples: Sequence[Sample], common: dict[str, object]) -> dict[str, object]:
    """Of the CSV of `benchmarks/report.py`; there is no reference."""
    clean = [sample for sample in samples if not sample.disturbed]
    quiet = len(clean) >= max(3, len(samples) // 4)
    used = clean if quiet else list(samples)
    ms: Spread = spread([1e3 * sample.seconds for sample in used])
    return dict.fromkeys(COLUMNS, "") | common | {
        "case": CASE,
        "pipeline": PIPELINE,
        "params": sum(torch.Size(shape).numel() for shape in SHAPES),
        "tensors": len(SHAPES),
        "dtype": "float32",
        "grads": MOVED[moved],
        "bytes_per_param": KINDS["fusedopt_adamw"].bytes_per_param,
        "ms_p20": f"{ms.p20:.4f}",
        "ms_p50": f"{ms.p50:.4f}",
        "ms_p80": f"{ms.p80:.4f}",
        "samples": len(used),
        "disturbed": len(samples) - len(clean),
        "quiet": int(quiet),
        "note": f"moved: {moved}; launches do nothing",
    }  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, help="samples of each (default: 41)")
    add_options(parser, "few rounds")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (5 if args.quick else 41)
    args.out = destination(args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.out is not None:
        check_header(args.out)
    torch.set_num_threads(1)  # nothing here is parallel, and a waiting thread spins
    before, backend.driver.made = backend.driver.made, NoLaunches()
    try:
        samples = measure(args.rounds)
    finally:
        backend.driver.made = before
    rows = [row(moved, own, provenance()) for moved, own in samples.items()]
    if args.out is not None:
        append(args.out, rows)
    print("| moved since the last step | host us, p50 [p20-p80] | samples | disturbed | quiet |")
    print("|---|---|---|---|---|")
    for moved, one in zip(MOVED, rows, strict=True):
        p20, p50, p80 = (1e3 * float(str(one[f"ms_p{n}"])) for n in (20, 50, 80))
        counts = f"{one['samples']} | {one['disturbed']} | {one['quiet']}"
        print(f"| {moved} | {p50:.1f} [{p20:.1f}-{p80:.1f}] | {counts} |")
    print(told(args.out))
