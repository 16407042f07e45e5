"""Time whole optimizer steps on the CPU: torch's, other packages' and ours, in turns.

A step is everything between "backward() left scaled gradients in .grad" and "the scaler is
updated": unscale, inf check, clip, update. Two pipelines are compared only after they have computed
the same step from the same gradients.

  python -m benchmarks cpu                   every case; rows go to benchmarks/results/local
  python -m benchmarks cpu --quick           a few small cases in a few rounds, printed only
  python -m benchmarks cpu --cases adamw-resnet50 sgd-resnet50
  python -m benchmarks cpu --params gpt2-124M ragged --pipelines fusedopt_adamw adamw_foreach
  python -m benchmarks cpu --params resnet50 --dtype bfloat16

`python -m benchmarks list` shows the cases, parameter lists, pipelines and backends, and which of
them run here. With --params the first of the pipelines is compared with each of the others; without
--pipelines they are ours and torch's. The exit status is 1 if a step was not the same.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import goals, rows, stream
from benchmarks.cases import QUICK_CASES, Case, Comparison, all_cases, make_case
from benchmarks.clocks import HostClock
from benchmarks.measure import Bench, Result, run_case
from benchmarks.param_sets import LISTS
from benchmarks.registry import COMPILE_FIRST, KINDS, on_backend

ROUNDS, QUICK_ROUNDS = 10, 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PIPELINES = {  # by dtype, ours first
    "float32": ("fusedopt_adamw", "adamw_fused", "adamw_foreach"),
    "bfloat16": ("fusedopt_adamw_bf16", "adamw_bf16_torch_ops"),
    "float16": ("fusedopt_adamw_fp16", "megatron_fp16", "deepspeed_fp16"),
}
BACKENDS = ("auto", "cpu", "reference", "triton", "cuda")
COLUMNS_SAY = """\
median, in brackets its 95 % interval. ratio: how many times faster the first is than the second,
timed in turns. over predicted: its time over that of its bytes at the memory's speed in this run
(docs/performance.md)."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = rows.parser("cpu", __doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cases", nargs="+", choices=list(all_cases()), metavar="CASE")
    lists = f"any of {', '.join(LISTS)}"
    what.add_argument("--params", nargs="+", choices=list(LISTS), metavar="LIST", help=lists)
    add("--pipelines", nargs="+", metavar="PIPELINE", help="with --params: two or more")
    add("--dtype", choices=list(DTYPES), help="with --params: of parameters and gradients")
    add("--backend", choices=BACKENDS, default="auto", help="of fusedopt (default: auto)")
    new = "new tensors before every step, as after zero_grad(), the default; the same tensors, "
    new += "refilled; or views into one buffer, as DDP leaves them, refilled"
    add("--grads", choices=["new", "kept", "bucket"], default="new", help=new)
    rounds = f"samples of each comparison (default: {ROUNDS})"
    add("--rounds", type=rows.positive, metavar="N", help=rounds)
    add("--threads", type=rows.positive, default=2, metavar="N", help="default: 2")
    wanted = "show the ratios that the project works towards on its own machines"
    add("--goals", action="store_true", help=wanted)
    rows.add_options(parser, f"{QUICK_ROUNDS} rounds, small cases if none are named")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    args.selected = _selected(args, parser)
    args.out = rows.destination(args)
    return args


def _selected(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """The cases to run, all with the wanted gradients on the wanted backend."""
    slow: set[str] = set()
    if args.params:
        cases = _cases_of_lists(args, parser)
    elif args.pipelines or args.dtype:
        parser.error("--pipelines and --dtype go with --params; a case has its own")
    else:
        names = args.cases or (QUICK_CASES if args.quick else all_cases())
        cases, slow = [all_cases()[name] for name in names], {*(COMPILE_FIRST * args.quick)}

    def chosen(case: Case) -> Case:
        pairs = [pair for pair in case.comparisons if not slow & {*dataclasses.astuple(pair)}]
        ours = lambda name: on_backend(name, args.backend)  # noqa: E731
        comparisons = tuple(Comparison(ours(p.pipeline), ours(p.reference)) for p in pairs)
        return dataclasses.replace(case, grads=args.grads, comparisons=comparisons)

    return [chosen(case) for case in cases]


def _cases_of_lists(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    wanted = args.dtype or "float32"
    names, dtype = args.pipelines or PIPELINES[wanted], DTYPES[wanted]
    fit = [name for name, kind in KINDS.items() if dtype in kind.dtypes]
    for name in names:
        if name not in KINDS:
            parser.error(f"no pipeline {name!r}: see `python -m benchmarks list`")
        if name not in fit:
            parser.error(f"{name} is not for {wanted}; these are: {', '.join(fit)}")
    if len(set(names)) != len(names) or len(names) < 2:
        parser.error("--pipelines takes two or more different ones")
    pairs = [(names[0], name) for name in names[1:]]
    return [make_case(params, pairs, dtype) for params in dict.fromkeys(args.params)]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    report = rows.Report(rows.provenance(), args.out)
    total = args.rounds * sum(len(case.comparisons) for case in args.selected)
    bar: tqdm[Any] = tqdm(total=total, unit="sample", disable=None)  # None: no terminal
    attempts = args.rounds if args.quick else 2 * args.rounds
    bench = Bench(lambda _: HostClock(), KINDS, args.rounds, attempts, progress=bar.update,
                  announce=bar.set_description)  # fmt: skip
    ceiling = lambda: stream.ceiling_gb_s(*(stream.QUICK if args.quick else ()))  # noqa: E731
    results: list[Result] = []
    after = ceiling()
    for case in args.selected:
        before, measured = after, run_case(case, bench)
        after = ceiling()
        mean = "" if before is None or after is None else f"{(before + after) / 2:.5g}"
        for result in measured:
            result.add_to(report, bench, ceiling_gb_s=mean)
        results += measured
    bar.close()
    print(", ".join(f"{key} {value}" for key, value in report.common.items() if value != ""))
    print(f"{rows.table(report.figures())}\n")
    for result in results:
        if not result.trials:
            pair = result.comparison
            what = f"{result.case.name}, {pair.pipeline} against {pair.reference}"
            print(f"{what} not measured: {result.note}")
    print(COLUMNS_SAY)
    if args.goals:
        names = {case.name for case in args.selected}
        wanted = [goal for goal in goals.ON_CPU if goal.case in names]
        print("\n" + goals.table(wanted, report.figures()))
    print(f"\n{rows.told(args.out)}")
    return int(any(result.wrong for result in results))
