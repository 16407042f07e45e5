"""Steps of several ranks: ours and torch's on the same DTensors, in turns; messages counted.

python -m benchmarks distributed            rows go to benchmarks/results/local; some minutes
python -m benchmarks distributed --quick    tiny lists, few rounds, printed only
python -m benchmarks distributed --cases adamw-300x1k-fsdp-2
python -m benchmarks distributed --predict  the predictions of docs/performance.md

The ranks are processes of this machine with one thread each, which talk by gloo over loopback. All
start a step together; its time is that of the slowest rank. `collectives` and `sent` are those of
one rank in one step, without those of the first step. With --quick each case has two ranks or four.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline, rows
from benchmarks.param_sets import Shape, equal, gpt2

ROUNDS, QUICK_ROUNDS = 9, 2
TIMEOUT_S = 120.0  # that one rank waits for another

OURS, NO_SCALER, NO_NORM = "fusedopt_adamw", "fusedopt_adamw_no_scaler", "fusedopt_adamw_no_norm"
STEPS = ((OURS, "adamw_fused"), (NO_SCALER, "adamw_fused_no_scaler"))
# The ratio says how many times longer a step over DTensors takes than over plain tensors.
HOST = (
    (f"{NO_NORM}_plain", NO_NORM),
    (f"{NO_SCALER}_plain_group", NO_SCALER),
    (f"{NO_SCALER}_plain", NO_SCALER),
    ("adamw_fused_no_norm_plain", "adamw_fused_no_norm"),
    ("adamw_fused_no_scaler_plain", "adamw_fused_no_scaler"),
)
NOTES = {f"{NO_SCALER}_plain_group": "both with the message", f"{NO_SCALER}_plain": "one without"}


@dataclass(frozen=True)
class Case:
    name: str
    shapes: Callable[[], list[Shape]]
    layout: str  # a key of sharded.LAYOUTS
    pairs: tuple[tuple[str, str], ...]

    @property
    def ranks(self) -> int:
        return 2 if self.layout.endswith("-2") else 4

    def shrunk(self) -> list[Shape]:
        """For --quick."""
        return [shape if math.prod(shape) < 100 else (24, 4) for shape in self.shapes()[:12]]


def small_matrices() -> list[Shape]:
    return [(40, 24)] * 300


def _cases() -> list[Case]:
    found = [
        Case("adamw-300x16-dtensor-fsdp-2", lambda: equal(300, 16), "fsdp-2", HOST),
        Case("adamw-300x1k-fsdp-tp-2x2", small_matrices, "fsdp-tp-2x2", STEPS),
    ]
    for layout in ("fsdp-2", "fsdp-4", "hsdp-2x2"):
        found += [
            Case(f"adamw-300x1k-{layout}", lambda: equal(300, 1000), layout, STEPS),
            Case(f"adamw-gpt2-124M-{layout}", gpt2, layout, STEPS),
        ]
    return found


CASES = {case.name: case for case in _cases()}


# ---- in the processes ----------------------------------------------------------------------------


def serve(rank: int, plan: dict[str, Any]) -> None:
    """One rank: measures the cases; the first one writes the rows."""
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{plan['store']}", rank=rank, world_size=plan["ranks"],
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    out = plan["out"] if rank == 0 else None
    report = rows.Report(plan["common"], out)
    for name in plan["cases"]:
        _measure(CASES[name], plan["rounds"], plan["quick"], report)
    if rank == 0:
        Path(plan["answer"]).write_text(json.dumps(report.rows))
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that exits as usual


def _measure(case: Case, rounds: int, quick: bool, report: rows.Report) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from benchmarks import sharded
    from benchmarks.measure import add_trials, sandwich

    layout = sharded.LAYOUTS[case.layout]
    shapes = case.shrunk() if quick else case.shapes()
    model = sharded.Model(shapes, layout, init_device_mesh("cpu", layout.mesh))
    for names in case.pairs:
        pair = _checked(model, names)
        messages = [_messages(one) for one in pair]
        clock, (own, reference) = sharded.RanksClock(), pair
        attempts = rounds if quick else 2 * rounds
        trials = sandwich(reference, {"": own}, clock, rounds, attempts)[""]
        columns: dict[str, Any] = {
            "case": case.name, "params": sum(map(math.prod, shapes)), "tensors": len(shapes),
            "dtype": "float32", "grads": "views", "pipeline": names[0], "reference": names[1],
        }  # fmt: skip
        ranks = f"{layout.ranks} gloo processes on {os.cpu_count()} CPUs"
        note = "; ".join(filter(None, (ranks, NOTES.get(names[0], ""))))
        add_trials(report, clock.units, trials, note=note, **columns)
        if all(each.collectives for each in messages):
            for index, (figure, unit) in enumerate((("collectives", "count"), ("sent", "B"))):
                report.add(figure, unit, *([m[index]] for m in messages), note=ranks, **columns)
        del pair, own, reference
        gc.collect()  # optimizers lie in cycles, and there may be room for one pair


def _checked(model: Any, names: Sequence[str]) -> list[Any]:
    """Two pipelines that have taken the same steps.

    Raises:
        DifferentStep: they have not, on this rank or another.
    """
    from benchmarks import sharded
    from benchmarks.pipelines import DifferentStep, compare_steps, take_checked_steps

    pair = [sharded.PIPELINES[name](model) for name in names]
    for one in pair:
        take_checked_steps(one, model.grads)
    start = sharded.parts(model.plain())
    told = ""
    try:
        compare_steps(start, *map(sharded.Parts, pair))
    except DifferentStep as error:
        told = str(error)
    wrong = {rank: text for rank, text in enumerate(sharded.gathered(told)) if text}
    # A plain pipeline without the message clips by another norm: each rank has its own.
    if wrong and names[0] not in _OWN_NORM:
        raise DifferentStep(f"{' and '.join(names)}: {wrong}")
    return pair


_OWN_NORM = (f"{NO_SCALER}_plain", "adamw_fused_no_scaler_plain")


def _messages(pipeline: Any) -> Any:
    """Of the step, the most on any rank."""
    from benchmarks import collectives, sharded

    pipeline.prepare()
    return max(sharded.gathered(collectives.messages_of(pipeline.step)))


# ---- the command ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = rows.parser("distributed", __doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), metavar="CASE", help=", ".join(CASES))
    add("--rounds", type=rows.positive, help=f"samples of each comparison (default: {ROUNDS})")
    add("--predict", action="store_true", help="what the model says of many ranks; runs nothing")
    rows.add_options(parser, f"tiny lists, {QUICK_ROUNDS} rounds")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    args.out = rows.destination(args)
    return args


def run(args: argparse.Namespace) -> list[rows.Row]:
    """Start the processes, once for each number of ranks."""
    found: list[rows.Row] = []
    common = rows.provenance()
    cases = [CASES[name] for name in args.cases or CASES]
    for ranks in sorted({case.ranks for case in cases}):
        with tempfile.TemporaryDirectory() as folder:
            plan = {
                "ranks": ranks, "store": f"{folder}/store", "answer": f"{folder}/rows.json",
                "out": args.out, "common": common, "rounds": args.rounds, "quick": args.quick,
                "cases": [case.name for case in cases if case.ranks == ranks],
            }  # fmt: skip
            torch.multiprocessing.spawn(serve, (plan,), nprocs=ranks)
            found += json.loads(Path(plan["answer"]).read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.predict:
        print(roofline.many_ranks())
        return 0
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the ranks have one each; the rows say so
    try:
        known = rows.figures(run(args))
    finally:
        torch.set_num_threads(before)
    print(f"{rows.table(known.values())}\n\n{rows.told(args.out)}")
    return 0
