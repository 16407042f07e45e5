"""The host's share of a step with Triton, as far as it can be measured without a GPU.

python -m benchmarks host            rows go to benchmarks/results/local
python -m benchmarks host --quick    printed only

The whole step of `adamw-300x1k` runs but for its work: launches, the copy of the table and CUDA's
events and streams are replaced by calls that do nothing. What a GPU adds to these figures is
Triton's launcher twice, and torch's copy and event where the table has moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

import fusedopt
from benchmarks import rows
from benchmarks.clocks import HostClock
from benchmarks.measure import add_trials, sandwich
from benchmarks.param_sets import Gradients, equal, make_params
from benchmarks.pipelines import ADAMW, MAX_GRAD_NORM, Ours
from fusedopt.backends import triton as backend

SHAPES = equal(300, 1000)
CASE = "host-300x1k"
PIPELINE = "fusedopt_adamw_triton_host"

# What has moved since the last step: nothing; gradients (new tensors); the learning rate.
STILL = "nothing"
MOVED = {STILL: "kept", "gradients": "new", "lr": "kept"}


class NoLaunches(backend.TritonDriver):
    """Serves CPU tensors; computes nothing."""

    device_type = "cpu"
    pins = False
    launcher = staticmethod(lambda device, variant, values: lambda programs, stream: None)
    reduce_programs = staticmethod(lambda device: 32 * 132)
    event = staticmethod(lambda device: SimpleNamespace(query=lambda: True))
    stream = index = staticmethod(lambda device: 0)
    capturing = staticmethod(lambda device: False)
    record_stream = staticmethod(lambda tensor, device: None)


class HostOnly(Ours):
    """Our scaler's step and update."""

    def __init__(self, moved: str) -> None:
        params = make_params(SHAPES, torch.float32)
        grads = Gradients(SHAPES, torch.float32, MOVED[moved])
        options = {"max_grad_norm": MAX_GRAD_NORM, "backend": "triton", **ADAMW}
        make = partial(fusedopt.FusedAdamW, **options)
        super().__init__(params, grads, make, fusedopt.GradScaler)
        self._lr_moves = moved == "lr"

    def prepare(self) -> None:
        super().prepare()
        if self._lr_moves:
            self.optimizer.param_groups[0]["lr"] *= 0.999


def measure(report: rows.Report, rounds: int) -> None:
    """What has moved, each in turns with a step before which nothing has."""
    pipelines = {moved: HostOnly(moved) for moved in MOVED}
    trials = sandwich(pipelines.pop(STILL), pipelines, HostClock(), rounds, 2 * rounds)
    for moved, taken in trials.items():
        add_trials(
            report, {"host": "us"}, taken, (1e3, 1e3), case=CASE, dtype="float32",
            params=sum(torch.Size(shape).numel() for shape in SHAPES), tensors=len(SHAPES),
            grads=MOVED[moved], pipeline=f"{PIPELINE}:{moved}", reference=f"{PIPELINE}:{STILL}",
            note=f"moved: {moved}; launches do nothing",
        )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> Any:
    parser = rows.parser("host", __doc__)
    parser.add_argument("--rounds", type=rows.positive, help="samples of each (default: 41)")
    rows.add_options(parser, "few rounds")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (5 if args.quick else 41)
    args.out = rows.destination(args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)  # nothing here is parallel, and a waiting thread spins
    report = rows.Report(rows.provenance(), args.out)
    before, backend.driver.made = backend.driver.made, NoLaunches()
    try:
        measure(report, args.rounds)
    finally:
        backend.driver.made = before
    print(f"{rows.table(report.figures())}\n{rows.told(args.out)}")
