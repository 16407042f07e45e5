"""What the other commands take by name: cases, parameter lists, pipelines, backends.

python -m benchmarks list                 all four
python -m benchmarks list pipelines       one of them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from benchmarks import arguments as args_of
from benchmarks.cases import all_cases
from benchmarks.param_sets import LISTS
from benchmarks.pipelines import MOVE_TOLERANCE, Kind
from benchmarks.registry import base_kinds, unavailable
from fusedopt.backends import registry as backends


def cases() -> str:
    rows = [(name, case.label, ", ".join(case.pipelines)) for name, case in all_cases().items()]
    return _table("Cases of `cpu`: `--cases NAME`", ("name", "what", "pipelines"), rows)


def params() -> str:
    rows = [
        (name, f"{len(shapes()):,}", f"{sum(math.prod(shape) for shape in shapes()):,}")
        for name, shapes in LISTS.items()
    ]
    return _table("Parameter lists: `--params NAME`", ("name", "tensors", "elements"), rows)


def pipelines() -> str:
    every = base_kinds()
    absent = unavailable(every)
    rows = []
    for name, kind in every.items():
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in kind.dtypes)
        figures = (f"{kind.bytes_per_param:g}", f"{kind.allowed * MOVE_TOLERANCE:g}")
        rows.append((name, kind.label, dtypes, *figures, runs_here(kind, absent)))
    header = ("name", "what", "params", "bytes per param", "may differ by", "runs here")
    title = (
        "Pipelines: `--pipelines NAME`; those of fusedopt on the backend of `--backend`. Each is\n"
        "held to the same step: no element may differ by more than so many of the farthest moves"
    )
    return _table(title, header, rows)


def runs_here(kind: Kind, absent: dict[str, str]) -> str:
    if kind.module in absent:
        return f"no: {absent[kind.module]}"
    on_gpu = torch.cuda.is_available() and "cuda" in kind.devices
    if "cpu" not in kind.devices:
        return "gpu" if on_gpu else "no: needs an NVIDIA GPU"
    return "cpu, gpu" if on_gpu else "cpu"


def backends_of_ours() -> str:
    rows = [
        (name, "yes" if facts["available"] else f"no: {facts['reason']}")
        for name, facts in backends.report().items()
    ]
    title = "Backends of fusedopt: `--backend NAME`; `auto` is the first that serves the parameters"
    return _table(title, ("name", "available"), rows)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in cells)
    return "\n".join([title, "", *(f"  {'  '.join(row)}".rstrip() for row in padded)])


TABLES: dict[str, Callable[[], str]] = {
    "cases": cases,
    "params": params,
    "pipelines": pipelines,
    "backends": backends_of_ours,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = args_of.parser("list", __doc__)
    parser.add_argument("what", nargs="?", choices=list(TABLES))
    what = parser.parse_args(arguments).what
    print("\n\n".join(TABLES[name]() for name in ([what] if what else TABLES)))
