"""What the other commands take by name: cases, parameter lists, pipelines, backends.

python -m benchmarks list                 all four
python -m benchmarks list pipelines       one of them
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from benchmarks.cases import all_cases
from benchmarks.param_sets import LISTS
from benchmarks.pipelines import MOVE_TOLERANCE, Kind
from benchmarks.registry import base_kinds, unavailable
from benchmarks.rows import markdown, parser
from fusedopt.backends import registry as backends


def cases() -> str:
    lines = ((name, case.label, ", ".join(case.pipelines)) for name, case in all_cases().items())
    table = markdown(("name", "what", "pipelines"), lines)
    return f"Cases of `cpu`: `--cases NAME`\n\n{table}"


def params() -> str:
    lines = (
        (name, f"{len(shapes()):,}", f"{sum(map(math.prod, shapes())):,}")
        for name, shapes in LISTS.items()
    )
    table = markdown(("name", "tensors", "elements"), lines)
    return f"Parameter lists: `--params NAME`\n\n{table}"


def pipelines() -> str:
    absent = unavailable(base_kinds())
    lines = (
        (name, kind.label, ", ".join(str(dtype).removeprefix("torch.") for dtype in kind.dtypes),
         f"{kind.bytes_per_param:g}", f"{kind.allowed * MOVE_TOLERANCE:g}", runs_here(kind, absent))
        for name, kind in base_kinds().items()
    )  # fmt: skip
    header = ("name", "what", "params", "bytes per param", "may differ by", "runs here")
    return (
        "Pipelines: `--pipelines NAME`; those of fusedopt on the backend of `--backend`. Each is\n"
        "held to the same step: no element may differ by more than so many of the farthest moves"
        f"\n\n{markdown(header, lines)}"
    )


def runs_here(kind: Kind, absent: dict[str, str]) -> str:
    if kind.module in absent:
        return f"no: {absent[kind.module]}"
    on_gpu = torch.cuda.is_available() and "cuda" in kind.devices
    if "cpu" not in kind.devices:
        return "gpu" if on_gpu else "no: needs an NVIDIA GPU"
    return "cpu, gpu" if on_gpu else "cpu"


def backends_of_ours() -> str:
    lines = (
        (name, "yes" if facts["available"] else f"no: {facts['reason']}")
        for name, facts in backends.report().items()
    )
    title = "Backends of fusedopt: `--backend NAME`; `auto` is the first that serves the parameters"
    return f"{title}\n\n{markdown(('name', 'available'), lines)}"


TABLES = {
    "cases": cases,
    "params": params,
    "pipelines": pipelines,
    "backends": backends_of_ours,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("list", __doc__)
    options.add_argument("what", nargs="?", choices=list(TABLES))
    what = options.parse_args(arguments).what
    print("\n\n".join(TABLES[name]() for name in ([what] if what else TABLES)))
