"""The measured tables of README and docs, each from rows that its key names, and from no others.

python -m benchmarks tables             exit status 1 if one is not that of the tracked rows
python -m benchmarks tables --record    writes them into the documents
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.pool import Figure, Row, runs_by_key, spread
from benchmarks.row_files import RESULTS, ROOT, read

XEON, EPYC = "intel-r-xeon-r-processor", "amd-epyc"
STEPS = {
    XEON: ("bfd98e4",),
    EPYC: ("8c2e0b3", "78eccae"),
}  # commits, the one that counts last
TRAINING = "9995606"

KEY = ("case", "pipeline", "reference", "grads")
Key = tuple[str, str, str, str]

FUSED, FOREACH = "torch `fused=True`", "torch `foreach=True`"
WHOLE_STEPS: tuple[tuple[str, str, Key], ...] = (
    ("AdamW, 100M in 148 tensors", FUSED,
     ("adamw-gpt-100M", "fusedopt_adamw", "adamw_fused", "new")),
    ("", FOREACH, ("adamw-gpt-100M", "fusedopt_adamw", "adamw_foreach", "new")),
    ("", "DeepSpeedCPUAdam with torch's unscale and clip",
     ("adamw-gpt-100M", "fusedopt_adamw", "adamw_deepspeed", "new")),
    ("", "a stream over the same bytes",
     ("adamw-gpt-100M", "fusedopt_adamw", "stream_huge", "new")),
    ("AdamW, GPT-2, 124M in 148 tensors", FUSED,
     ("adamw-gpt2-124M", "fusedopt_adamw", "adamw_fused", "new")),
    ("AdamW, ResNet-50, 25.6M in 161 tensors", FUSED,
     ("adamw-resnet50", "fusedopt_adamw", "adamw_fused", "new")),
    ("AdamW, 10M in 148 tensors", FUSED, ("adamw-gpt-10M", "fusedopt_adamw", "adamw_fused", "new")),
    ("", "optimi", ("adamw-gpt-10M", "fusedopt_adamw", "adamw_optimi", "new")),
    ("", "torchao", ("adamw-gpt-10M", "fusedopt_adamw", "adamw_torchao", "new")),
    ("AdamW, 1M in 148 tensors", FUSED, ("adamw-gpt-1M", "fusedopt_adamw", "adamw_fused", "new")),
    ("the same, gradients kept", FUSED, ("adamw-gpt-1M", "fusedopt_adamw", "adamw_fused", "kept")),
    ("AdamW, 1M in 1 tensor", FUSED, ("adamw-one-1M", "fusedopt_adamw", "adamw_fused", "new")),
    ("AdamW, 1,000 tensors of 8", FUSED, ("adamw-tiny", "fusedopt_adamw", "adamw_fused", "new")),
    ("the same, gradients kept", FUSED, ("adamw-tiny", "fusedopt_adamw", "adamw_fused", "kept")),
    ("SGD momentum, 100M in 148 tensors", FUSED,
     ("sgd-gpt-100M", "fusedopt_sgd", "sgd_fused", "new")),
    ("AdamW, bf16 with fp32 masters, 100M", "the same in torch operations",
     ("bf16-gpt-100M", "fusedopt_adamw_bf16", "adamw_bf16_torch_ops", "new")),
)  # fmt: skip
HEADLINE = (WHOLE_STEPS[0][2], WHOLE_STEPS[1][2])  # the two factors of README's first sentence

OVER_PREDICTED: tuple[tuple[str, str, Key], ...] = (
    ("AdamW, fp32", "fusedopt", ("adamw-gpt-100M", "fusedopt_adamw", "stream_huge", "new")),
    ("", "torch fused", ("adamw-gpt-100M", "adamw_fused", "stream_huge", "new")),
    ("", "torch foreach", ("adamw-gpt-100M", "adamw_foreach", "adamw_fused", "new")),
    ("", "DeepSpeedCPUAdam", ("adamw-gpt-100M", "adamw_deepspeed", "adamw_fused", "new")),
    ("SGD with momentum, fp32", "fusedopt", ("sgd-gpt-100M", "fusedopt_sgd", "sgd_fused", "new")),
    ("", "torch fused", ("sgd-gpt-100M", "sgd_fused", "stream_huge", "new")),
    ("AdamW, bf16 with fp32 masters", "fusedopt",
     ("bf16-gpt-100M", "fusedopt_adamw_bf16", "adamw_bf16_torch_ops", "new")),
    ("", "torch operations", ("bf16-gpt-100M", "adamw_bf16_torch_ops", "stream_huge", "new")),
)  # fmt: skip
SHARES_OF_THE_STREAM = {
    "100M in 148 tensors": "adamw-gpt-100M",
    "10M in 148 tensors": "adamw-gpt-10M",
    "10M in 1 tensor": "adamw-one-10M",
    "1M in 148 tensors": "adamw-gpt-1M",
    "1M in 1 tensor": "adamw-one-1M",
}
KERNELS = {
    "reduce, fp32": "fusedopt_cpu:reduce:float32",
    "reduce, bf16": "fusedopt_cpu:reduce:bfloat16",
    "update, AdamW, fp32": "fusedopt_cpu:update:adamw:float32",
    "update, AdamW, bf16 with masters": "fusedopt_cpu:update:adamw:bfloat16",
    "update, SGD with momentum": "fusedopt_cpu:update:sgd-momentum:float32",
}
KERNEL_SIZES = ("2^18", "2^22", "2^26")
PIPELINES = {
    "torch_foreach": FOREACH,
    "torch_fused": FUSED,
    "fusedopt": "fusedopt",
    "fusedopt_init_state": "fusedopt, `init_state()` first",
}


def _rows(name: str, commits: Sequence[str]) -> list[Row]:
    """Clean rows of the commits, in this order, each commit's in the order of the file."""
    clean = [row for row in read(RESULTS / f"{name}.csv") if row["dirty"] == "0"]
    return [row for c in commits for row in clean if row["commit"].startswith(c)]


def step_runs(machine: str, key: Key) -> list[Row]:
    """The quiet rows of one comparison at the last commit that has it, one for each run."""
    for commit in reversed(STEPS[machine]):
        by_setting = runs_by_key(row for row in _rows(machine, (commit,)) if _key(row) == key)
        quiet = [runs for runs in by_setting.values() if runs[0]["quiet"] == "1"]
        if len(quiet) > 1:
            raise SystemExit(f"{machine}.csv has {key} of {commit} in {len(quiet)} settings")
        if quiet:
            return quiet[0]
    return []


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def _required(key: Key) -> list[Row]:
    runs = step_runs(XEON, key)
    if not runs:
        raise SystemExit(f"{XEON}.csv has no quiet row {key} of {STEPS[XEON]}")
    return runs


def _figure(figure: Figure, unit: str, digits: int = 2) -> str:
    p20, p50, p80 = (f"{value:.{digits}f}" for value in figure)
    return f"{p50}{unit} [{p20}\u2013{p80}]"


def ratio(runs: Sequence[Row]) -> str:
    return _figure(spread(runs, "ratio"), "x") if runs else "\u2013"


def _table(header: str, lines: Sequence[Sequence[str]]) -> str:
    n = header.count("|") - 1
    return "\n".join([header, "|---" * n + "|", *(f"| {' | '.join(line)} |" for line in lines)])


def whole_steps() -> str:
    lines = [
        (params, against, ratio(_required(key)), ratio(step_runs(EPYC, key)))
        for params, against, key in WHOLE_STEPS
    ]
    return _table("| parameters | against | Intel Xeon | AMD EPYC |", lines)


def over_predicted() -> str:
    lines = []
    for what, pipeline, key in OVER_PREDICTED:
        runs = _required(key)
        measured = spread(runs, "ms", over="predicted_ms")
        lines.append((what, pipeline, runs[0]["bytes_per_param"], _figure(measured, "")))
    return _table(
        "| 100M parameters in 148 tensors | pipeline | bytes | measured over predicted |", lines
    )


def shares() -> str:
    lines = []
    for params, case in SHARES_OF_THE_STREAM.items():
        keys = [(case, kind, "stream_huge", "new") for kind in ("adamw_fused", "fusedopt_adamw")]
        lines.append((params, *(ratio(_required(key)) for key in keys)))
    return _table(f"| AdamW, fp32 | {FUSED} | fusedopt |", lines)


def kernels() -> str:
    lines = []
    for what, pipeline in KERNELS.items():
        found = [
            _required((f"kernel-{size}", pipeline, "stream_huge", "kept")) for size in KERNEL_SIZES
        ]
        lines.append((what, found[0][0]["bytes_per_param"], *map(ratio, found)))
    return _table(f"| kernel | bytes | {' | '.join(KERNEL_SIZES)} elements |", lines)


def _figures(command: str) -> dict[tuple[str, str, str], Row]:
    """The last run's."""
    found = _rows(f"{XEON}-{command}", (TRAINING,))
    if not found:
        raise SystemExit(f"{XEON}-{command}.csv has no clean row of {TRAINING}")
    return {(row["case"], row["pipeline"], row["figure"]): row for row in found}


def _told(row: Row | None) -> str:
    if row is None:
        return ""
    figure = spread([row], "")
    digits = 1 if row["unit"] == "%" else 0 if figure.p50 >= 100 else 1 if figure.p50 >= 10 else 2
    return _figure(figure, "x" if row["unit"] == "x" else f" {row['unit']}", digits)


def _by_case(command: str, figures: Sequence[str], header: str) -> str:
    rows = _figures(command)
    lines = []
    for case in dict.fromkeys(case for case, _, _ in rows):
        for pipeline, label in PIPELINES.items():
            if (case, pipeline, figures[0]) in rows:
                told = [_told(rows.get((case, pipeline, figure))) for figure in figures]
                lines.append((case, label, *told))
    if not lines:
        raise SystemExit(f"{XEON}-{command}.csv has no row of {figures[0]} at {TRAINING}")
    return _table(header, lines)


def profile() -> str:
    return _by_case(
        "profile",
        ("optimizer_ms", "optimizer_share", "optimizer_ratio", "optimizer_operators"),
        "| training | optimizer | optimizer | share of the iteration | against ours | operators |",
    )


def memory() -> str:
    return _by_case(
        "memory",
        ("state_mib", "first_beyond_state_mib", "first_added_mib", "second_beyond_state_mib"),
        "| parameters | optimizer | state | beyond it, first step | added by the first step "
        "| beyond it, second step |",
    )


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"steps": whole_steps},
    "docs/performance.md": {
        "over predicted": over_predicted,
        "shares": shares,
        "kernels": kernels,
    },
    "docs/training.md": {"profile": profile, "memory": memory},
}


def block(text: str, name: str) -> re.Match[str]:
    """What stands between the two marks of a table."""
    marks = rf"(?<=<!-- rows: {name} -->\n).*?(?=\n<!-- end of rows: {name} -->)"
    found = re.search(marks, text, re.DOTALL)
    if found is None:
        raise SystemExit(f"no <!-- rows: {name} --> with its end in the document")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--record", action="store_true", help="write them into the documents")
    record = parser.parse_args(arguments).record
    stale = 0
    for document, tables in TABLES.items():
        path: Path = ROOT / document
        for name, made in tables.items():
            text = path.read_text()
            found, wanted = block(text, name), made()
            if found[0] == wanted:
                continue
            stale += 1
            print(f"{document}: {name} is not that of the rows")
            if record:
                path.write_text(text[: found.start()] + wanted + text[found.end() :])
    return int(stale > 0 and not record)
