"""The generated blocks of README and docs: what was measured, from the tracked rows and from no
others; the pictures of these rows; and what follows from counting bytes.

python -m benchmarks tables             exit status 1 if one is not current
python -m benchmarks tables --record    writes them into the documents
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks import fidelity_tables, roofline
from benchmarks.plot import PICTURES
from benchmarks.rows import (
    RESULTS,
    ROOT,
    Figure,
    figures,
    find,
    markdown,
    need_intervals,
    parser,
    read,
    shown,
    wide,
)

NO_ROW = "*No row yet of the kernels that stand: `python -m benchmarks {} --record` writes them.*"
NO_PICTURE = "*No picture yet: there are no rows to draw.*"
FUSED, FOREACH = "torch `fused=True`", "torch `foreach=True`"

# The case, its pipeline, the reference, and what the first column and the second say of them.
Line = tuple[str, str, str, str, str]
OURS, BF16 = "fusedopt_adamw", "fusedopt_adamw_bf16"
STEPS: tuple[Line, ...] = (
    ("adamw-gpt-100M", OURS, "adamw_fused", "AdamW, 100M in 148 tensors", FUSED),
    ("adamw-gpt-100M", OURS, "adamw_foreach", "", FOREACH),
    ("adamw-gpt-100M", OURS, "adamw_deepspeed", "", "DeepSpeedCPUAdam, torch's unscale and clip"),
    ("adamw-gpt-100M", OURS, "stream_huge", "", "a stream over the same bytes"),
    ("adamw-gpt2-124M", OURS, "adamw_fused", "AdamW, GPT-2, 124M in 148 tensors", FUSED),
    ("adamw-resnet50", OURS, "adamw_fused", "AdamW, ResNet-50, 25.6M in 161 tensors", FUSED),
    ("adamw-gpt-10M", OURS, "adamw_fused", "AdamW, 10M in 148 tensors", FUSED),
    ("adamw-gpt-10M", OURS, "adamw_optimi", "", "optimi"),
    ("adamw-gpt-10M", OURS, "adamw_torchao", "", "torchao"),
    ("adamw-gpt-1M", OURS, "adamw_fused", "AdamW, 1M in 148 tensors", FUSED),
    ("adamw-gpt-1M kept", OURS, "adamw_fused", "the same, gradients kept", FUSED),
    ("adamw-one-1M", OURS, "adamw_fused", "AdamW, 1M in 1 tensor", FUSED),
    ("adamw-tiny", OURS, "adamw_fused", "AdamW, 1,000 tensors of 8", FUSED),
    ("adamw-tiny kept", OURS, "adamw_fused", "the same, gradients kept", FUSED),
    ("sgd-gpt-100M", "fusedopt_sgd", "sgd_fused", "SGD momentum, 100M in 148 tensors", FUSED),
    ("bf16-gpt-100M", BF16, "adamw_bf16_torch_ops", "AdamW, bf16 with fp32 masters, 100M",
     "the same in torch operations"),
)  # fmt: skip
OVER_PREDICTED: tuple[Line, ...] = (
    ("adamw-gpt-100M", OURS, "stream_huge", "AdamW, fp32: 32 bytes", "fusedopt"),
    ("adamw-gpt-100M", "adamw_fused", "stream_huge", "48", "torch fused"),
    ("adamw-gpt-100M", "adamw_foreach", "adamw_fused", "100", "torch foreach"),
    ("adamw-gpt-100M", "adamw_deepspeed", "adamw_fused", "48", "DeepSpeedCPUAdam"),
    ("sgd-gpt-100M", "fusedopt_sgd", "sgd_fused", "SGD with momentum, fp32: 24", "fusedopt"),
    ("sgd-gpt-100M", "sgd_fused", "stream_huge", "40", "torch fused"),
    ("bf16-gpt-100M", BF16, "adamw_bf16_torch_ops", "AdamW, bf16 with fp32 masters: 32",
     "fusedopt"),
    ("bf16-gpt-100M", "adamw_bf16_torch_ops", "stream_huge", "60", "torch operations"),
)  # fmt: skip
SHARES: tuple[Line, ...] = tuple(
    (case, pipeline, "stream_huge", params if pipeline == OURS else "", label)
    for case, params in (
        ("adamw-gpt-100M", "100M in 148 tensors"),
        ("adamw-gpt-10M", "10M in 148 tensors"),
        ("adamw-one-10M", "10M in 1 tensor"),
        ("adamw-gpt-1M", "1M in 148 tensors"),
        ("adamw-one-1M", "1M in 1 tensor"),
    )
    for pipeline, label in ((OURS, "fusedopt"), ("adamw_fused", FUSED))
)
SMALL_STATES: tuple[Line, ...] = (
    ("adamw-gpt-100M", f"{OURS}_8bit", OURS, "fp32, 8-bit states: 20", "fp32 states: 32"),
    (
        "bf16-gpt-100M",
        f"{BF16}_8bit",
        BF16,
        "bf16, remainder, 8-bit states: 16",
        "fp32 masters: 32",
    ),
)
EXACT: tuple[Line, ...] = tuple(
    (f"adamw-gpt-{params}", OURS, f"{OURS}_exact", f"AdamW, {params} in 148 tensors",
     "`norm_bits=\"exact\"`")
    for params in ("100M", "10M", "1M")
)  # fmt: skip
KERNELS: tuple[Line, ...] = tuple(
    (f"kernel-2^{size} kept", f"fusedopt_cpu:{kernel}", "stream_huge", "" if n else label,
     f"2^{size}")
    for kernel, label in (
        ("reduce:float32", "reduce, fp32: 4 bytes"),
        ("reduce:bfloat16", "reduce, bf16: 2"),
        ("update:adamw:float32", "update, AdamW, fp32: 28"),
        ("update:adamw:bfloat16", "update, AdamW, bf16 with masters: 30"),
        ("update:sgd-momentum:float32", "update, SGD with momentum: 20"),
    )
    for n, size in enumerate((18, 22, 26))
)  # fmt: skip
RANKS: tuple[Line, ...] = tuple(
    (f"adamw-{params}-{layout} views", f"{OURS}{end}", f"adamw_fused{end}", "" if end else label,
     scaler)
    for params, model in (("gpt2-124M", "GPT-2, 124M in 148 tensors"), ("300x1k", "300 tensors"))
    for layout, name in (("fsdp-2", "FSDP, 2 ranks"), ("fsdp-4", "FSDP, 4"),
                         ("hsdp-2x2", "HSDP, 2 x 2"), ("fsdp-tp-2x2", "FSDP and TP, 2 x 2"))
    if (params, layout) != ("gpt2-124M", "fsdp-tp-2x2")
    for label in (f"{model}: {name}",)
    for end, scaler in (("", "clip, scaler"), ("_no_scaler", "clip"))
)  # fmt: skip
RANKS_HEADER = ("AdamW, fp32", "with")
# The time over DTensors over that of the same step over plain tensors.
HOST: tuple[Line, ...] = tuple(
    ("adamw-300x16-dtensor-fsdp-2 views", f"{name}_{plain}", name, label, said)
    for name, plain, label, said in (
        (f"{OURS}_no_norm", "plain", "fusedopt", "update alone: no message"),
        (f"{OURS}_no_scaler", "plain_group", "", "clip; both with the message: `norm_group=`"),
        (f"{OURS}_no_scaler", "plain", "", "clip; the plain one without a message"),
        ("adamw_fused_no_norm", "plain", FUSED, "update alone: no message"),
        ("adamw_fused_no_scaler", "plain", "", "clip; the plain one without a message"),
    )
)
PROFILE = ("optimizer", "optimizer_share", "optimizer_ratio", "optimizer_operators")
MEMORY = ("state_mib", "first_beyond_state_mib", "first_added_mib", "second_beyond_state_mib")
PIPELINES = {
    "torch_foreach": FOREACH,
    "torch_fused": FUSED,
    "fusedopt_init_state": "fusedopt, `init_state()` first",
}


def by_machine() -> dict[str, list[Figure]]:
    """The newest clean and quiet figures of each machine, by what a column says of it."""
    rows = [row for path in sorted(RESULTS.glob("*.csv")) for row in read(path)]
    clean = [row for row in rows if (row["dirty"], row["quiet"]) == ("0", "1")]
    found: dict[str, list[Figure]] = {}
    for figure in figures(clean).values():
        threads = "thread" if figure["threads"] == "1" else "threads"
        where = f"{figure['machine']}, {figure['threads']} {threads}, torch {figure['torch']}"
        found.setdefault(where, []).append(figure)
    return found


def measured_at(known: Iterable[Figure]) -> str:
    commits = ", ".join(dict.fromkeys(figure["commit"][:7] for figure in known))
    return f"*Commit {commits}; medians, in brackets their 95 % intervals.*\n\n"


def lines(
    header: tuple[str, str], wanted: Sequence[Line], quantity: Callable[[Figure], str],
    command: str, **figure: str,
) -> str:  # fmt: skip
    """A line for each comparison, a column for each machine that has one of them.

    ``figure=`` where there are several of one comparison.
    """
    columns: dict[str, list[Figure | None]] = {}
    for machine, known in by_machine().items():
        found = []
        for case, pipeline, reference, *_ in wanted:
            name, _, grads = case.partition(" ")
            found.append(find(known, case=name, pipeline=pipeline, reference=reference,
                              grads=grads or "new", **figure))  # fmt: skip
        if any(found):
            columns[machine] = found
    if not columns:
        return NO_ROW.format(command)
    body = (
        (*labels, *(quantity(column[n]) if column[n] else "\u2013" for column in columns.values()))
        for n, (_, _, _, *labels) in enumerate(wanted)
    )
    cells = [figure for column in columns.values() for figure in column if figure]
    return measured_at(cells) + markdown((*header, *columns), body)


def wide_table(columns: Sequence[str], command: str) -> str:
    """A table for each machine."""
    found = []
    for machine, known in by_machine().items():
        own = [figure for figure in known if figure["figure"] in columns]
        if own:
            table = wide(own, columns, PIPELINES)
            found.append(f"**{machine}**\n\n{measured_at(own)}{table}")
    return "\n\n".join(found) or NO_ROW.format(command)


def of_machines(table: Callable[[Sequence[Figure]], str], command: str) -> str:
    """A table for each machine that has rows of it."""
    found = []
    for machine, known in by_machine().items():
        if text := table(known):
            found.append(f"**{machine}**\n\n{text}")
    return "\n\n".join(found) or NO_ROW.format(command)


def ratio(figure: Figure) -> str:
    return shown(figure.ratio(), "x")


def time_and_ratio(figure: Figure) -> str:
    return f"{shown(figure.value(), figure['unit'])}; {ratio(figure)}"


def both_sides(figure: Figure) -> str:
    own, other = (shown(way.value(), way["unit"]).removesuffix(" count") for way in figure.ways())
    return f"{own} against {other}"


def over_predicted(figure: Figure) -> str:
    return shown(figure.over_predicted(), "") if figure.predicted() else "\u2013"


def pictures(name: str, folder: str, alternative: str) -> str:
    paths = sorted(PICTURES.glob(f"*-{name}.png"))
    return "\n\n".join(f"![{alternative}]({folder}/{path.name})" for path in paths) or NO_PICTURE


ALTERNATIVE = "Time of a whole step against the number of parameters, and the roof of the memory"
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "picture": partial(pictures, "step-time", "docs/pictures", ALTERNATIVE),
        "steps": partial(lines, ("parameters", "against"), STEPS, ratio, "cpu"),
    },
    "docs/performance.md": {
        "over_predicted": partial(
            lines, ("100M in 148 tensors", "pipeline"), OVER_PREDICTED, over_predicted, "cpu"
        ),
        "shares": partial(lines, ("AdamW, fp32", "pipeline"), SHARES, ratio, "cpu"),
        "exact": partial(lines, ("parameters", "how many times longer"), EXACT, ratio, "cpu"),
        "kernels": partial(lines, ("kernel", "elements"), KERNELS, ratio, "kernels"),
        "picture": partial(pictures, "ratio-by-model", "pictures", "Times faster, by case"),
        "ranks": partial(lines, RANKS_HEADER, RANKS, time_and_ratio, "distributed", figure="step"),
        "messages": partial(
            lines, RANKS_HEADER, RANKS, both_sides, "distributed", figure="collectives"
        ),
        "sent": partial(lines, RANKS_HEADER, RANKS, both_sides, "distributed", figure="sent"),
        "dtensors": partial(
            lines, ("300 DTensors", "step"), HOST, ratio, "distributed", figure="step"
        ),
        **roofline.TABLES,
    },
    "docs/memory.md": {
        "small_states": partial(
            lines, ("100M in 148 tensors", "times faster than"), SMALL_STATES, ratio, "cpu"
        ),
        "traces": partial(of_machines, fidelity_tables.traces_table, "fidelity"),
        "trainings": partial(of_machines, fidelity_tables.trainings_table, "fidelity"),
        "picture": partial(pictures, "fidelity", "pictures", "Loss added, by bytes a parameter"),
    },
    "docs/training.md": {
        "profile": partial(wide_table, PROFILE, "profile"),
        "memory": partial(wide_table, MEMORY, "memory"),
    },
}


def block(text: str, name: str) -> re.Match[str]:
    """What stands between the two marks of a block."""
    marks = rf"(?<=<!-- begin: {name} -->\n).*?(?=\n<!-- end: {name} -->)"
    found = re.search(marks, text, re.DOTALL)
    if found is None:
        raise SystemExit(f"no <!-- begin: {name} --> with its end in the document")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser("tables", __doc__)
    options.add_argument("--record", action="store_true", help="write them into the documents")
    record = options.parse_args(arguments).record
    need_intervals()
    stale = 0
    for document, blocks in BLOCKS.items():
        path = ROOT / document
        for name, made in blocks.items():
            text = path.read_text()
            found, wanted = block(text, name), made()
            if found[0] != wanted:
                stale += 1
                print(f"{document}: {name} is not current")
                if record:
                    path.write_text(text[: found.start()] + wanted + text[found.end() :])
    return int(stale > 0 and not record)
