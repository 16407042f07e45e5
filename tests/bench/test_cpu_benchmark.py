"""`python -m benchmarks cpu` and `list`: what they run and say. No test asserts a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_helpers import ROOT, read

from benchmarks import cpu_step, goals, listing, measure, param_sets, pipelines, rows, stream
from benchmarks.cases import QUICK_CASES, Case, all_cases, make_case
from benchmarks.clocks import HostClock
from benchmarks.measure import Bench, Result, Trial
from benchmarks.registry import COMPILE_FIRST, KINDS

OURS = "fusedopt_adamw"
PROGRAM = "import fusedopt, sys; sys.path.append(sys.argv.pop(1)); "


def run(folder: Path, *arguments: str) -> tuple[list[dict[str, str]], str]:
    """Rows and output of a run in a process of its own, which may use one thread."""
    out = folder / "results.csv"
    program = PROGRAM + "from benchmarks import cpu_step; sys.exit(cpu_step.main(sys.argv[1:]))"
    fixed = ("--quick", "--threads", "1", "--out", str(out))
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), *fixed, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    assert "different steps" not in done.stdout
    assert "sample" not in done.stderr, "a bar is noise where there is no terminal"
    return read(out), done.stdout


def compared(rows: list[dict[str, str]]) -> set[tuple[str, str, str]]:
    return {(row["case"], row["pipeline"], row["reference"]) for row in rows}


def test_quick_run_writes_rows(cpu_backend: str, tmp_path: Path) -> None:
    rows, told = run(tmp_path)
    assert "goal" not in told and "MISSED" not in told and cpu_step.COLUMNS_SAY in told
    assert f"rows in {tmp_path / 'results.csv'}" in told
    assert compared(rows) == {
        (case.name, c.pipeline, c.reference)
        for case in (all_cases()[name] for name in QUICK_CASES)
        for c in case.comparisons
        if not {c.pipeline, c.reference} & {*COMPILE_FIRST}
    }
    for row in rows:
        assert (row["figure"], row["unit"], row["threads"]) == ("step", "ms", "1")
        assert all(float(ms) > 0 for ms in (row["values"] + " " + row["reference_values"]).split())
        if row["pipeline"].startswith("fusedopt"):
            assert "backend cpu" in row["note"]
    assert {row["ceiling_gb_s"] == "" for row in rows} == {stream._compiled() is None}


def test_kept_gradients_of_the_readme(cpu_backend: str, tmp_path: Path) -> None:
    cases = ("adamw-tiny", "adamw-gpt-1M")
    rows, _ = run(tmp_path, "--grads", "kept", "--cases", *cases, "--rounds", "1")
    assert {row["grads"] for row in rows} == {"kept"}
    assert {(case, OURS, "adamw_fused") for case in cases} <= compared(rows)


def test_any_list_with_any_pipelines_on_any_backend(cpu_backend: str, tmp_path: Path) -> None:
    rows, _ = run(
        tmp_path, "--params", "tiny-1000x8", "equal-300x1k", "--backend", "reference",
        "--pipelines", OURS, "adamw_foreach", "adamw_fused", "--rounds", "1",
    )  # fmt: skip
    assert compared(rows) == {
        (case, f"{OURS}_reference", reference)
        for case in ("adamw-tiny", "adamw-equal-300x1k")
        for reference in ("adamw_foreach", "adamw_fused")
    }
    assert {row["note"] for row in rows} == {"backend reference"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pipelines", OURS, "adamw_fused"], "go with --params"),
        (["--cases", "adamw-tiny", "--dtype", "bfloat16"], "go with --params"),
        (["--cases", "adamw-tiny", "--params", "ragged"], "not allowed with"),
        (["--params", "ragged", "--pipelines", OURS], "two or more"),
        (["--params", "ragged", "--pipelines", OURS, OURS], "two or more"),
        (["--params", "ragged", "--pipelines", OURS, "adam_fused"], "no pipeline 'adam_fused'"),
        (["--params", "ragged", "--dtype", "bfloat16", "--pipelines", OURS, "adamw_fused"],
         "fusedopt_adamw_bf16"),
        (["--params", "raged"], "gpt2-124M"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cpu_step.parse(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("dtype", cpu_step.DTYPES)
def test_every_dtype_has_pipelines_of_its_own(dtype: str) -> None:
    (case,) = cpu_step.parse(["--params", "ragged", "--dtype", dtype]).selected
    assert case.comparisons[0].pipeline.startswith("fusedopt_adamw")
    for comparison in case.comparisons:
        for name in (comparison.pipeline, comparison.reference):
            assert case.dtype in KINDS[name].dtypes


@pytest.mark.parametrize(
    ("pipelines_at_a_time", "sizes"), [(2, [1] * 9), (4, [3, 2, 3, 1]), (99, [5, 4])]
)
def test_groups_have_a_pivot_and_fit_into_memory(
    pipelines_at_a_time: int, sizes: list[int]
) -> None:
    case = all_cases()["adamw-gpt-1M"]
    per_param = 18 * pipelines_at_a_time + 32
    groups = list(measure.groups(case, per_param * case.numel))
    assert {c for _, group in groups for c in group} == {*case.comparisons}
    assert all(pivot in (c.pipeline, c.reference) for pivot, group in groups for c in group)
    assert [len(group) for _, group in groups] == sizes


SHAPES = [(40, 5), (7,), (300,)]


class TwiceTheRate(pipelines.Pipeline):
    def __init__(self, params: list[torch.Tensor], grads: param_sets.Gradients) -> None:
        super().__init__(params, grads, lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1))


def fail(params: list[torch.Tensor], grads: param_sets.Gradients) -> pipelines.Pipeline:
    raise RuntimeError("no kernel for this machine\nand more")


def absent(params: list[torch.Tensor], grads: param_sets.Gradients) -> pipelines.Pipeline:
    raise pipelines.Unavailable("not installed")


def bench(rounds: int = 2) -> Bench:
    return Bench(lambda _: HostClock(), KINDS, rounds, rounds)


def always(pivot: object, others: Mapping[str, object], *_: object) -> dict[str, list[Trial]]:
    """In the place of timing: the pivot takes 1 s, every other 2 s."""
    return {name: [Trial((2000.0,), (1000.0,))] * 3 for name in others}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Result]:
    """Results by pipeline and reference; what cannot be measured stands between what can."""
    monkeypatch.setattr(measure, "sandwich", always)
    for name, build in {"absent": absent, "fails": fail, "other": TwiceTheRate}.items():
        monkeypatch.setitem(KINDS, name, pipelines.Kind(name, 1, build))
    references = ("absent", "fails", "other", "adamw_foreach", "stream_4k")
    pairs = [("adamw_fused", name) for name in references]
    case = small([*pairs, ("fusedopt_adamw_reference", "adamw_fused")])
    results = measure.run_case(case, bench())
    assert [result.comparison for result in results] == [*case.comparisons]
    return {(r.comparison.pipeline, r.comparison.reference): r for r in results}


def small(pairs: list[tuple[str, str]]) -> Case:
    return replace(make_case("ragged", pairs), shapes=lambda: SHAPES)


def test_a_pipeline_that_cannot_be_measured_takes_no_other_with_it(
    measured: dict[tuple[str, str], Result],
) -> None:
    told = {name: (r.note, r.wrong) for (_, name), r in measured.items() if not r.trials}
    assert told.keys() == {"absent", "fails", "other"}
    assert told["absent"] == ("not installed", False)
    assert told["fails"] == ("RuntimeError: no kernel for this machine", False)
    assert "different steps" in told["other"][0] and told["other"][1]


def test_trials_of_all_builds_are_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    seconds = iter([2.0, 2.0, 3.0, 4.0, 4.0])

    def build(params: list[torch.Tensor], grads: param_sets.Gradients) -> pipelines.Pipeline:
        built.append(params)
        return KINDS["adamw_foreach"].build(params, grads)

    def timed(
        pivot: object, others: Mapping[str, object], clock: object, rounds: int, *_: object
    ) -> dict[str, list[Trial]]:
        took = next(seconds)
        return {name: [Trial((took,), (1.0,))] * rounds for name in others}

    monkeypatch.setattr(measure, "sandwich", timed)
    monkeypatch.setitem(KINDS, "watched", pipelines.Kind("watched", 1, build))
    (result,) = measure.run_case(small([("watched", "adamw_fused")]), bench(11))
    assert len(built) == measure.BUILDS == 5
    theirs = [trial.reference[0] for trial in result.trials]
    assert len(theirs) == 11 and {*theirs} == {2.0, 3.0, 4.0}


@pytest.mark.parametrize(
    ("rounds", "numel", "shares"),
    [(1, 9, [1]), (3, 9, [3]), (5, 9, [3, 2]), (11, 9, [3, 2, 2, 2, 2]), (11, 10**8, [6, 5])],
)
def test_every_build_gets_its_share_of_the_rounds(
    rounds: int, numel: int, shares: list[int]
) -> None:
    assert measure._shares(rounds, numel) == shares


def test_the_ratio_is_that_of_the_reference_to_the_pipeline(
    measured: dict[tuple[str, str], Result],
) -> None:
    """Whichever of the two is the pivot."""
    report = rows.Report({"timestamp": "", "commit": "", "dirty": 0}, None)
    for result in measured.values():
        result.add_to(report, bench(), ceiling_gb_s="7")
    known = {figure["reference"]: figure for figure in report.figures()}
    assert known.keys() == {"adamw_foreach", "adamw_fused", "stream_4k"}
    for reference, ms, ratio, n_bytes in (
        ("adamw_foreach", 1000.0, 2.0, ("48", "100")), ("adamw_fused", 2000.0, 0.5, ("32", "48"))
    ):  # fmt: skip
        figure = known[reference]
        assert (figure.median(), figure.ratio().median) == (ms, ratio)
        assert (figure["bytes_per_param"], figure["reference_bytes"]) == n_bytes
        assert (figure["ceiling_gb_s"], figure["params"], figure["tensors"]) == ("7", "507", "3")


def test_ours_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, OURS, pipelines.Kind("ours", 32, fail))
    results = measure.run_case(small([(OURS, "adamw_fused"), (OURS, "adamw_foreach")]), bench())
    assert [(r.trials, r.wrong) for r in results] == [([], True)] * 2


def test_a_stream_alone_is_no_measure_of_a_step() -> None:
    (result,) = measure.run_case(small([("adamw_fused", "stream_4k")]), bench())
    assert not result.trials and "agreed with no other" in result.note


def measured_cases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trials: list[Trial], *options: str
) -> list[rows.Row]:
    """Rows of the command, with these trials of each case's first pair."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    first = lambda case, _: [Result(case, case.comparisons[0], trials)]  # noqa: E731
    monkeypatch.setattr(cpu_step, "run_case", first)
    assert cpu_step.main([*options, "--out", str(tmp_path / "rows.csv")]) == 0
    return read(tmp_path / "rows.csv")


def test_the_ceiling_is_taken_before_and_after_each_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ceilings = iter([10.0, 20.0, 40.0, None])
    monkeypatch.setattr(cpu_step.stream, "ceiling_gb_s", lambda *_: next(ceilings))
    names = ["adamw-tiny", "adamw-one-1M", "sgd-gpt-1M"]
    found = measured_cases(monkeypatch, tmp_path, [Trial((1.0,), (1.0,))] * 3, "--cases", *names)
    wanted = [*zip(names, ["15", "30", ""], strict=True)]
    assert [(row["case"], row["ceiling_gb_s"]) for row in found] == wanted


@pytest.mark.parametrize("disturbed", [False, True])
def test_goals_are_for_those_who_ask_and_disturbed_samples_no_ground_for_a_verdict(
    disturbed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(cpu_step.stream, "ceiling_gb_s", lambda *_: None)
    trials = [Trial((1.0,), (2.0,), disturbed)] * 3 + [Trial((1.0,), (2.0,), True)]
    (row,) = measured_cases(monkeypatch, tmp_path, trials, "--goals", "--cases", "adamw-tiny")
    told = capsys.readouterr().out
    assert goals.SAY in told and ("DISTURBED" in told) is disturbed
    assert (" | MISSED |" in told, " | open |" in told) == (not disturbed, disturbed)
    wanted = ("4", "0", "1 1 1 1") if disturbed else ("1", "1", "1 1 1")
    assert (row["disturbed"], row["quiet"], row["values"]) == wanted


def test_a_case_that_does_not_fit_is_left_out() -> None:
    case = all_cases()["adamw-one-1M"]
    results = measure.run_case(case, replace(bench(), free_bytes=lambda: 0))
    assert [r.trials for r in results] == [[]] * len(case.comparisons)
    assert all("memory" in r.note for r in results)


def test_the_list_names_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = pipelines.Kind("nobody's", 1, fail, module="no_such_module")
    monkeypatch.setattr(listing, "base_kinds", lambda: {OURS: KINDS[OURS], "nobodys_adamw": kind})
    listing.main([])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {*all_cases(), *param_sets.LISTS, OURS, "cpu", "cuda", "reference"} <= set(lines)
    assert lines["gpt2-124M"].split() == ["gpt2-124M", "148", "124,439,808"]
    assert lines[OURS].split()[-1].startswith(("cpu", "gpu"))
    assert "no: ModuleNotFoundError" in lines["nobodys_adamw"]


def test_the_list_is_narrowed(capsys: pytest.CaptureFixture[str]) -> None:
    listing.main(["params"])
    out = capsys.readouterr().out
    assert "llama-3.2-1B" in out and "adamw_fused" not in out


def test_what_needs_a_gpu_says_so() -> None:
    kind = pipelines.Kind("x", 1, fail, devices=("cuda",))
    there = torch.cuda.is_available()
    assert listing.runs_here(kind, {}) == ("gpu" if there else "no: needs an NVIDIA GPU")


@pytest.mark.parametrize("flag", ["--rounds", "--threads"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_a_number_that_makes_no_sense_is_refused_first(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cpu_step.parse([flag, value])
    assert flag in capsys.readouterr().err
