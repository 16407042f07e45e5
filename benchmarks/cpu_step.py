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

import torch

from benchmarks import stream
from benchmarks.arguments import positive
from benchmarks.cases import QUICK_CASES, Case, all_cases, make_case
from benchmarks.cpu_measure import Progress, run_case
from benchmarks.param_sets import LISTS
from benchmarks.registry import COMPILE_FIRST, KINDS, on_backend
from benchmarks.report import append, check_header, provenance, rows, table
from benchmarks.row_files import add_options, destination, told

ROUNDS, QUICK_ROUNDS = 10, 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PIPELINES = {  # by dtype, ours first
    "float32": ("fusedopt_adamw", "adamw_fused", "adamw_foreach"),
    "bfloat16": ("fusedopt_adamw_bf16", "adamw_bf16_torch_ops"),
    "float16": ("fusedopt_adamw_fp16", "megatron_fp16", "deepspeed_fp16"),
}
BACKENDS = ("auto", "cpu", "reference", "triton", "cuda")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cases", nargs="+", choices=list(all_cases()), metavar="CASE")
    lists = ", ".join(LISTS)
    what.add_argument(
        "--params", nargs="+", choices=list(LISTS), metavar="LIST", help=f"any of {lists}"
    )
    parser.add_argument(
        "--pipelines", nargs="+", metavar="PIPELINE", help="with --params: two or more"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="with --params: of parameters and gradients"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="of fusedopt (default: auto)"
    )
    parser.add_argument(
        "--grads",
        choices=["new", "kept", "bucket"],
        default="new",
        help="new tensors before every step, as after zero_grad(), the default; the same tensors, "
        "refilled; or views into one buffer, as DDP leaves them, refilled",
    )
    rounds = f"samples of each comparison (default: {ROUNDS})"
    parser.add_argument("--rounds", type=positive, metavar="N", help=rounds)
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="default: 2")
    goals = "show the ratios that the project works towards on its own machines"
    parser.add_argument("--goals", action="store_true", help=goals)
    add_options(parser, f"{QUICK_ROUNDS} rounds, small cases if none are named")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    args.selected = _selected(args, parser)
    args.out = destination(args)
    return args


def _selected(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """The cases to run, all on the wanted backend."""
    if args.params:
        cases = _cases_of_lists(args, parser)
    elif args.pipelines or args.dtype:
        parser.error("--pipelines and --dtype go with --params; a case has its own")
    else:
        names = args.cases or (QUICK_CASES if args.quick else all_cases())
        cases = [all_cases()[name] for name in names]
        if args.quick:
            cases = [_without(case, COMPILE_FIRST) for case in cases]
    return [_on_backend(case, args.backend) for case in cases]


def _cases_of_lists(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    wanted = args.dtype or "float32"
    names, dtype = args.pipelines or PIPELINES[wanted], DTYPES[wanted]
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        parser.error(f"no pipeline {unknown[0]!r}: see `python -m benchmarks list`")
    unfit = [name for name in names if dtype not in KINDS[name].dtypes]
    if unfit:
        fit = ", ".join(n for n, kind in KINDS.items() if dtype in kind.dtypes)
        parser.error(f"{unfit[0]} is not for {wanted}; these are: {fit}")
    if len(set(names)) != len(names) or len(names) < 2:
        parser.error("--pipelines takes two or more different ones")
    pairs = [(names[0], name) for name in names[1:]]
    return [make_case(params, pairs, dtype) for params in dict.fromkeys(args.params)]


def _without(case: Case, pipelines: Sequence[str]) -> Case:
    kept = (c for c in case.comparisons if not {c.pipeline, c.reference} & {*pipelines})
    return dataclasses.replace(case, comparisons=tuple(kept))


def _on_backend(case: Case, backend: str) -> Case:
    """A target is for the backend that is chosen by itself."""
    moved = tuple(
        dataclasses.replace(
            c,
            pipeline=on_backend(c.pipeline, backend),
            reference=on_backend(c.reference, backend),
            target=c.target if on_backend(c.pipeline, backend) == c.pipeline else None,
        )
        for c in case.comparisons
    )
    return dataclasses.replace(case, comparisons=moved)


def _ceiling(quick: bool) -> float | None:
    """What memory gives just now."""
    size = (stream.QUICK_CEILING_NUMEL, QUICK_ROUNDS) if quick else ()
    return stream.ceiling_gb_s(*size)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.out is not None:
        check_header(args.out)
    torch.set_num_threads(args.threads)
    common = provenance() | {"grads": args.grads}
    attempts = args.rounds if args.quick else 2 * args.rounds
    progress = Progress(args.selected, args.rounds, attempts)
    results = []
    after = _ceiling(args.quick)
    for case in args.selected:
        before = after
        measured = run_case(case, args.grads, progress)
        after = _ceiling(args.quick)
        if before is not None and after is not None:
            ceiling = (before + after) / 2
            measured = [dataclasses.replace(result, ceiling_gb_s=ceiling) for result in measured]
        results += measured
        if args.out is not None:
            append(args.out, rows(measured, common))
    progress.close()
    print(", ".join(f"{key} {value}" for key, value in common.items()))
    print(table(results, args.goals))
    print(f"\n{told(args.out)}")
    return int(any(result.wrong for result in results))
