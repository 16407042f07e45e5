# ruff: noqa: RUF001
"""A figure in README or docs that was measured stands in a results row, or it does not stand.

It is written ``median [p20–p80]``, with its unit, and found in ``benchmarks/results`` as rounded;
the document names the row's commit. Any other number with a unit of time, bandwidth, memory or a
factor is on the short list below, with the reason why nobody had to measure it.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from written_figures import (
    RESULTS,
    SAME_RUNS,
    UNITS,
    Figure,
    Row,
    Written,
    figures_in,
    loose,
    one_line,
    results,
    unfounded,
)

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/README.md")
DOCUMENTS = [
    *(ROOT / name for name in TOP if (ROOT / name).is_file()),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").is_dir() or not RESULTS.is_dir(), reason="documents or results are not here"
)

# Phrases with a number that nobody measured, and why.
ALLOWED: dict[str, dict[str, str]] = {
    "README.md": {
        "bytes alone say 1.5x and 3.1x": "48 and 100 over 32, from the table of bytes",
    },
    "benchmarks/results/README.md": {
        "over 5 % of the time": "the threshold of a disturbed sample",
        "in 2 MB or in 4 KB pages": "sizes of pages",
        "not by more than 12 % of the move": "the tolerance of the check that rivals agree",
        "a step without clipping has 14 %": "why that tolerance: an error of arithmetic, no time",
        "AdamW is off by 20 %": "likewise",
        "is off by 1.1 % on the CPU": "likewise",
    },
    "docs/cuda.md": {"one launch and 2 × its size in bytes": "a count of bytes"},
    "docs/gpu_benchmark.md": {
        "the copy of 4 GiB": "the size of what is copied",
        "torch's copy of 4 GiB": "the size of what is copied",
        "within 45 s": "a limit of the program",
        "bytes over 4.3 TB/s, assumed": "a prediction, and said to be one",
        "held to 2 % of a move": "the tolerance of the check that rivals compute the same step",
        "and to 12 % in root mean square": "likewise",
    },
    "docs/numerics.md": {
        "off by 19 %": "arithmetic: 1 - 1e-7 in fp32",
        "worse than 7 % of the traffic": "arithmetic: 2 bytes of 30",
    },
    "docs/performance.md": {
        "1 GB of arrays": "64M parameters of 16 bytes",
        "It fetches 2 KB ahead": "a constant of the stream",
        "whole chunks are fetched 8 KB ahead": "a constant of the kernels",
        "torch's copy of 4 GiB": "the size of what is copied",
        "fixed 5 us for both kernels": "assumed, in the model",
        "85 % of the peak": "assumed, in the model",
        "assumes 96 % of a copy at 4.3 of 4.8 TB/s, which is 86 %": "assumed, in the other model",
        "at most 80 % of the memory": "assumed, in the model",
        "10 us are assumed": "in the model",
        "at the 5 us that NCCL's own cost model has": "another project's constant",
    },
    "docs/training.md": {
        "under 0.1 % of the parameters": "a bound that a test asserts",
        "pages of 2 MiB": "a size of pages",
        "up to 2 MiB": "what such a page wastes",
    },
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_figures_stand_in_results(path: Path) -> None:
    assert unfounded(path.read_text(), results()) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_no_number_without_a_row(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert loose(path.read_text(), ALLOWED.get(name, {})) == []


def test_the_list_of_exceptions_is_current() -> None:
    texts = {name: one_line(path.read_text()) for name, path in zip(NAMES, DOCUMENTS, strict=True)}
    stale = [
        (name, phrase)
        for name, phrases in ALLOWED.items()
        for phrase in phrases
        if phrase not in texts.get(name, "")
    ]
    assert stale == []


def test_there_are_figures() -> None:
    assert len(list(figures_in((ROOT / "README.md").read_text()))) >= 10


# ---- the judge is judged -------------------------------------------------------------------------

STEP_ROW: Row = {
    "commit": "1234567890", "dirty": "0", "bytes_per_param": "32", "params": "1000000",
    "ms_p20": "1.90", "ms_p50": "2.0", "ms_p80": "2.504", "predicted_ms": "1.6",
    "ratio_p20": "1.466", "ratio_p50": "1.549", "ratio_p80": "1.68",
}  # fmt: skip
COUNT_ROW: Row = {
    "commit": "1234567890", "dirty": "0", "case": "kernel", "figure": "instructions",
    "unit": "instructions", "p20": "12300", "p50": "12345", "p80": "12400",
}  # fmt: skip
SHARE_ROW: Row = {**COUNT_ROW, "figure": "share", "unit": "%", "p20": "9", "p50": "10", "p80": "12"}
GPU_ROW: Row = {
    "commit": "1234567890", "dirty": "0", "gpu": "H200", "gpu_ms_p20": "", "gpu_ms_p50": "",
    "gpu_ms_p80": "", "host_us_p20": "80", "host_us_p50": "90", "host_us_p80": "95.5",
}  # fmt: skip
FOUND = [
    "1.55x [1.47–1.68]",
    "1.5 [1.5–1.7]",
    "2.0 ms [1.9–2.5]",
    "2,000 us [1,900–2,504]",
    "16.0 GB/s [12.8–16.8]",
    "1.25 [1.19–1.56]",
    "12,345 instructions [12,300–12,400]",
    "10 % [9–12]",
    "0.10 [0.09–0.12]",
    "90 us [80–96]",
]
NOT_FOUND = [
    "1.56x [1.47–1.68]",
    "1.55x [1.46–1.68]",
    "1.55x [1.47–1.67]",
    "1.55 ms [1.47–1.68]",
    "2.0 us [1.9–2.5]",
    "12,345 cycles [12,300–12,400]",
    "10 ms [9–12]",
    "0.00 ms [0.00–0.00]",
]
ROWS = [STEP_ROW, COUNT_ROW, SHARE_ROW, GPU_ROW]


@pytest.mark.parametrize("figure", FOUND)
def test_a_figure_is_found(figure: str) -> None:
    assert len(list(figures_in(figure))) == 1
    assert unfounded(f"| {figure} | at 1234567", ROWS) == []
    assert unfounded(f"| {figure} | at 7654321", ROWS) != []
    dirty = [{**row, "dirty": "1"} for row in ROWS]
    assert unfounded(f"| {figure} | at 1234567", dirty) != []


@pytest.mark.parametrize("figure", NOT_FOUND)
def test_a_figure_is_not_found(figure: str) -> None:
    assert unfounded(f"| {figure} | at 1234567", ROWS) != []


def test_runs_of_a_commit_are_one_figure() -> None:
    first = STEP_ROW | {"quiet": "1"}
    other = first | {"ratio_p20": "1.5", "ratio_p50": "1.751", "ratio_p80": "1.8"}
    both, one = "| 1.65x [1.47–1.80] | at 1234567", "| 1.55x [1.47–1.68] | at 1234567"
    assert unfounded(both, [first, other]) == []
    assert unfounded(one, [first, other]) != [], "a run that was picked"
    disturbed = [first, other | {"quiet": "0"}]
    assert unfounded(one, disturbed) == [] and unfounded("1.75x [1.50–1.80] 1234567", disturbed)
    changes = ({"commit": "7654321000"}, {"dirty": "1"}, {"grads": "kept"},
               {"dtype": "bfloat16"}, {"threads": "1"})  # fmt: skip
    for change in changes:
        assert unfounded(both, [first, other | change]) != []
        assert unfounded(one, [first, other | change]) == []


def test_of_other_figures_the_last_run_counts() -> None:
    later = SHARE_ROW | {"p50": "11"}
    assert unfounded("| 11 % [9–12] | at 1234567", [SHARE_ROW, later]) == []
    assert unfounded("| 10 % [9–12] | at 1234567", [SHARE_ROW, later]) != []


def test_the_judge_and_the_tables_call_the_same_rows_runs() -> None:
    pool = (ROOT / "benchmarks" / "pool.py").read_text()
    listed = re.search(r"^KEY = \(([^)]*)\)", pool, re.MULTILINE)
    assert listed is not None
    assert {*re.findall(r'"(\w+)"', listed[1]), "commit", "dirty"} == {*SAME_RUNS}


def test_counts_beside_a_figure_are_in_a_row() -> None:
    counted = {**COUNT_ROW, "figure": "operators", "unit": "count", "p50": "361"}
    for cell, found in (("32", True), ("361", True), ("1,000,000", True), ("33", False)):
        line = f"| adamw | {cell} | 1.55x [1.47–1.68] | at 1234567"
        assert (unfounded(line, [*ROWS, counted]) == []) is found
    assert unfounded("| unscale | 33 |", ROWS) == []


LOOSE = ["3x faster", "takes 2.5 ms", "5 % less", "1.2 GB/s", "17 µs", "| 3.7 |", "| **3.7** |",
         "120 MiB", "40 s", "9,000 instructions", "2× the speed"]  # fmt: skip
FINE = ["lr=0.01 as ever", "`2.5 ms`", "```\n3x\n```", "fp32", "8 bytes", "sm_80", "Python 3.10",
        "2 threads", "1.55x [1.47–1.68] is **1.55x**", "100M", "CUDA 11.8 or newer",
        "<!-- begin: a -->\n| 3.5 | 2 ms |\n<!-- end: a -->"]  # fmt: skip


@pytest.mark.parametrize("text", LOOSE)
def test_a_loose_number_is_seen(text: str) -> None:
    assert loose(text, {}) != []
    assert loose(text, {text: "why not"}) == []


@pytest.mark.parametrize("text", FINE)
def test_other_numbers_are_left_alone(text: str) -> None:
    assert loose(text, {}) == []


def test_code_is_left_alone_and_ends() -> None:
    assert len(loose("```\n3x\n```\nthen 4x, `5x` and\n```\n6x\n```", {})) == 1


def test_units_are_told_apart() -> None:
    for one, other in itertools.permutations(UNITS, 2):
        if UNITS[one] != UNITS[other]:
            written = Written("", one, ("1.000", "1.000", "1.000"))
            dimension, scale = UNITS[other]
            assert not written.is_rounded(Figure(dimension, scale, scale, scale))
