"""Time complete optimizer steps on the CPU: torch, DeepSpeed and fusedopt, interleaved.

python -m benchmarks.cpu_step            every case, appended to benchmarks/results/<cpu>.csv
python -m benchmarks.cpu_step --quick    the smallest cases in a few rounds, printed only
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import stream
from benchmarks.cases import QUICK_CASES, Case, Comparison, all_cases
from benchmarks.param_sets import Gradients, make_params
from benchmarks.pipelines import KINDS, DifferentStep, Pipeline, Unavailable, check_same_step
from benchmarks.report import (
    ROOT,
    Result,
    append,
    check_header,
    cpu_model,
    provenance,
    rows,
    table,
)
from benchmarks.timing import sandwich, summarize

ALL_AT_ONCE = 20_000_000  # with more params, one reference and one candidate are in memory
BYTES_PER_PARAM_AT_PEAK = 64  # two fp32 AdamW pipelines, the gradients' source, foreach's copies
QUICK_ROUNDS = 3


class Progress:
    """The bar, and how many samples of each comparison are wanted and at most taken."""

    def __init__(self, cases: Sequence[Case], rounds: int, attempts: int) -> None:
        self.rounds, self.attempts = rounds, attempts
        total = rounds * sum(len(case.comparisons) for case in cases)
        self._bar: tqdm[Any] = tqdm(total=total, unit="sample")

    def announce(self, case: Case, comparison: Comparison) -> None:
        self._bar.set_description(f"{case.name}: {comparison.pipeline} | {comparison.reference}")

    def advance(self, count: int = 1) -> None:
        self._bar.update(count)

    def close(self) -> None:
        self._bar.close()


def run_case(case: Case, kind_of_grads: str, progress: Progress) -> list[Result]:
    missing = BYTES_PER_PARAM_AT_PEAK * case.numel - _available_bytes()
    if missing > 0:
        progress.advance(progress.rounds * len(case.comparisons))
        note = f"needs {missing / 2**30:.1f} GiB more memory than is free"
        return [Result(case, comparison, note=note) for comparison in case.comparisons]
    grads = Gradients(case.shapes(), case.dtype, kind_of_grads)
    checked: set[str] = set()
    results = []
    for group in _groups(case):
        results += _run_group(case, group, grads, checked, progress)
    return results


def _groups(case: Case) -> Iterator[list[Comparison]]:
    """Comparisons that are measured together: of one reference, and small enough for it."""
    for reference in dict.fromkeys(comparison.reference for comparison in case.comparisons):
        group = [c for c in case.comparisons if c.reference == reference]
        if case.numel <= ALL_AT_ONCE:
            yield group
        else:
            yield from ([comparison] for comparison in group)


def _run_group(
    case: Case,
    group: Sequence[Comparison],
    grads: Gradients,
    checked: set[str],
    progress: Progress,
) -> list[Result]:
    reference: Pipeline | stream.Stream | None = None
    candidates: dict[str, Pipeline] = {}
    results = {}
    for comparison in group:
        progress.announce(case, comparison)
        try:
            reference, candidate = _build_pair(case, comparison, grads, checked)
            candidates[comparison.pipeline] = candidate
        except (Unavailable, DifferentStep) as error:
            wrong = isinstance(error, DifferentStep)
            results[comparison] = Result(case, comparison, note=str(error), wrong=wrong)
            progress.advance(progress.rounds)
    if reference is not None:
        trials = sandwich(
            reference, candidates, progress.rounds, progress.attempts, progress.advance
        )
        for comparison in (c for c in group if c.pipeline in candidates):
            summary = summarize(trials[comparison.pipeline])
            notes = (candidates[comparison.pipeline].describe(), reference.describe())
            results[comparison] = Result(case, comparison, summary, "; ".join(filter(None, notes)))
    return [results[comparison] for comparison in group]


def _build_pair(
    case: Case, comparison: Comparison, grads: Gradients, checked: set[str]
) -> tuple[Pipeline | stream.Stream, Pipeline]:
    """Reference and candidate, new, and held to compute the same step.

    A stream computes none: `checked` tells that the candidate agreed with another reference.
    """
    shapes = case.shapes()
    candidate = KINDS[comparison.pipeline].build(make_params(shapes, case.dtype), grads)
    if comparison.reference in stream.STREAMS:
        if comparison.pipeline not in checked:
            raise DifferentStep(f"{comparison.pipeline} agreed with no other pipeline")
        return stream.STREAMS[comparison.reference](case.numel), candidate
    reference = KINDS[comparison.reference].build(make_params(shapes, case.dtype), grads)
    check_same_step(reference, candidate, grads)
    checked.add(comparison.pipeline)
    return reference, candidate


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) << 10


def without(case: Case, pipeline: str) -> Case:
    kept = (c for c in case.comparisons if pipeline not in (c.pipeline, c.reference))
    return dataclasses.replace(case, comparisons=tuple(kept))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(all_cases())
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--rounds", type=int, help="samples of each comparison (default: 21)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--grads",
        choices=["new", "kept"],
        default="new",
        help="new tensors before every step, as after zero_grad(), or the same tensors refilled",
    )
    parser.add_argument("--quick", action="store_true", help="default to a few small cases")
    parser.add_argument("--out", type=Path, help="CSV to append to (with --quick: none)")
    args = parser.parse_args(arguments)
    args.cases = args.cases or (QUICK_CASES if args.quick else names)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else 21)
    if args.out is None and not args.quick:
        slug = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
        args.out = ROOT / "benchmarks" / "results" / f"{slug}.csv"
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.out is not None:
        check_header(args.out)
    torch.set_num_threads(args.threads)
    common = provenance() | {"grads": args.grads}
    cases = [all_cases()[name] for name in args.cases]
    if args.quick:  # DeepSpeed compiles itself at its first use
        cases = [without(case, "adamw_deepspeed") for case in cases]
    progress = Progress(cases, args.rounds, args.rounds if args.quick else 2 * args.rounds)
    results = []
    for case in cases:
        measured = run_case(case, args.grads, progress)
        results += measured
        if args.out is not None:
            append(args.out, rows(measured, common))
    progress.close()
    print(", ".join(f"{key} {value}" for key, value in common.items()))
    print(table(results))
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
