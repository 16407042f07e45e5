"""`python -m benchmarks cpu` and `list`: what they run and say. No test asserts a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_helpers import SHAPES, read

from benchmarks import (
    clocks,
    cpu_step,
    goals,
    listing,
    measure,
    param_sets,
    pipelines,
    rows,
    stream,
)
from benchmarks.cases import _CASES, QUICK_CASES, Case, Comparison, all_cases, make_case
from benchmarks.clocks import HostClock
from benchmarks.measure import Bench, Result, Trial
from benchmarks.registry import COMPILE_FIRST, KINDS

pytestmark = pytest.mark.usefixtures("restore_threads")
OURS = "fusedopt_adamw"


def test_cases_and_goals_are_of_known_pipelines() -> None:
    cases = all_cases()
    for goal in goals.ON_CPU:
        assert Comparison(goal.pipeline, goal.reference) in cases[goal.case].comparisons
    known = set(KINDS) | set(stream.STREAMS)
    assert {c.reference for case in cases.values() for c in case.comparisons} <= known
    assert {c.pipeline for case in cases.values() for c in case.comparisons} <= set(KINDS)
    assert len(cases) == len(_CASES)  # no name twice
    assert {name.split("-", 1)[1] for name in cases} <= {*param_sets.LISTS, "tiny"}


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rows and output of a run, which may use one thread and takes as few steps as it can."""
    monkeypatch.setattr(clocks, "MIN_SAMPLE_S", 0.0)
    monkeypatch.setattr(stream, "QUICK", (1 << 16, 1))

    def run(*arguments: str) -> tuple[list[rows.Row], str]:
        fixed = ("--quick", "--threads", "1", "--out", str(tmp_path / "results.csv"))
        assert cpu_step.main([*fixed, *arguments]) == 0
        said = capsys.readouterr()
        assert "different steps" not in said.out
        assert "sample" not in said.err, "a bar is noise where there is no terminal"
        assert f"rows in {tmp_path / 'results.csv'}" in said.out
        return read(tmp_path / "results.csv"), said.out

    return run


def compared(rows: list[rows.Row]) -> set[tuple[str, str, str]]:
    return {(row["case"], row["pipeline"], row["reference"]) for row in rows}


def test_quick_run_writes_rows(cpu_backend: str, run: Any) -> None:
    rows, told = run()
    assert "goal" not in told and "MISSED" not in told and cpu_step.COLUMNS_SAY in told
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


def test_kept_gradients_of_the_readme(cpu_backend: str, run: Any) -> None:
    cases = ("adamw-tiny", "adamw-gpt-1M")
    rows, _ = run("--grads", "kept", "--cases", *cases, "--rounds", "1")
    assert {row["grads"] for row in rows} == {"kept"}
    assert {(case, OURS, "adamw_fused") for case in cases} <= compared(rows)


def test_any_list_with_any_pipelines_on_any_backend(cpu_backend: str, run: Any) -> None:
    references = ("adamw_foreach", "adamw_fused")
    options = ("--params", "gpt-300k", "--backend", "reference", "--rounds", "1")
    rows, _ = run(*options, "--pipelines", OURS, *references)
    name = f"{OURS}_reference"
    assert compared(rows) == {("adamw-gpt-300k", name, reference) for reference in references}
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
        (["--rounds", "0"], "--rounds"),
        (["--threads", "-1"], "--threads"),
        (["--threads", "two"], "--threads"),
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
    lists = ["ragged", "gpt-1M"]
    for name, case in zip(
        lists, cpu_step.parse(["--params", *lists, "--dtype", dtype]).selected, strict=True
    ):
        assert name in case.name and case.comparisons[0].pipeline.startswith("fusedopt_adamw")
        for pipeline in case.pipelines:
            assert case.dtype in KINDS[pipeline].dtypes


# ---- the loop over a case ------------------------------------------------------------------------


class TwiceTheRate(pipelines.Pipeline):
    def __init__(self, params: list[torch.Tensor], grads: param_sets.Gradients) -> None:
        super().__init__(params, grads, lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1))


def fail(params: list[torch.Tensor], grads: param_sets.Gradients) -> pipelines.Pipeline:
    raise RuntimeError("no kernel for this machine\nand more")


def absent(params: list[torch.Tensor], grads: param_sets.Gradients) -> pipelines.Pipeline:
    raise pipelines.Unavailable("not installed")


def bench(rounds: int = 2) -> Bench:
    return Bench(lambda _: HostClock(), KINDS, rounds, rounds)


def small(*pairs: tuple[str, str]) -> Case:
    return replace(make_case("ragged", pairs), shapes=lambda: SHAPES)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Of what takes 1 s against what takes 2 s; what cannot be measured stands between."""
    trials = {"": [Trial((1000.0,), (2000.0,))] * 3}
    monkeypatch.setattr(measure, "sandwich", lambda *_: trials)
    for name, build in {"absent": absent, "fails": fail, "other": TwiceTheRate}.items():
        monkeypatch.setitem(KINDS, name, pipelines.Kind(name, 1, build))
    monkeypatch.setitem(KINDS, OURS, pipelines.Kind("ours", 32, fail))
    references = ("absent", "stream_huge", "fails", "other", "adamw_foreach", "stream_4k")
    case = small(*(("adamw_fused", name) for name in references), (OURS, "adamw_fused"))
    results = measure.run_case(case, bench())
    assert [result.comparison for result in results] == [*case.comparisons]
    return results


def test_a_pipeline_that_cannot_be_measured_takes_no_other_with_it(results: list[Result]) -> None:
    no_kernel = ("RuntimeError: no kernel for this machine", False)
    found = [(result.note, result.wrong) for result in results if not result.trials]
    other = found.pop(3)
    assert "different steps" in other[0] and other[1]
    assert found == [
        ("not installed", False),
        ("adamw_fused agreed with no other pipeline", False),  # a stream is no measure of a step
        no_kernel,
        (no_kernel[0], True),  # ours
    ]


def test_rows_carry_what_was_measured(results: list[Result]) -> None:
    report = rows.Report({"timestamp": "", "commit": "", "dirty": 0}, None)
    for result in results:
        result.add_to(report, bench(), ceiling_gb_s="7")
    known = {figure["reference"]: figure for figure in report.figures()}
    assert known.keys() == {"adamw_foreach", "stream_4k"}
    for figure, n_bytes in ((known["adamw_foreach"], "100"), (known["stream_4k"], "32")):
        assert (figure.median(), figure.ratio().median) == (1000.0, 2.0)
        assert (figure["bytes_per_param"], figure["reference_bytes"]) == ("48", n_bytes)
        assert (figure["ceiling_gb_s"], figure["params"], figure["tensors"]) == ("7", "508", "4")


def test_trials_of_all_builds_are_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    seconds = iter([2.0, 2.0, 3.0, 4.0, 4.0])

    def build(params: list[torch.Tensor], grads: param_sets.Gradients) -> pipelines.Pipeline:
        built.append(params)
        return KINDS["adamw_foreach"].build(params, grads)

    def timed(
        reference: object, own: Mapping[str, object], clock: object, rounds: int, *_: object
    ) -> dict[str, list[Trial]]:
        return {"": [Trial((1.0,), (next(seconds),))] * rounds}

    monkeypatch.setattr(measure, "sandwich", timed)
    monkeypatch.setitem(KINDS, "watched", pipelines.Kind("watched", 1, build))
    (result,) = measure.run_case(small(("watched", "adamw_fused")), bench(11))
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
    assert bench(rounds).shares(numel) == shares


def test_a_case_that_does_not_fit_is_left_out() -> None:
    case = all_cases()["adamw-one-1M"]
    results = measure.run_case(case, replace(bench(), free_bytes=lambda: 68 * 10**6 - 1))
    assert [r.trials for r in results] == [[]] * len(case.comparisons)
    assert all("memory" in r.note for r in results)


def measured_cases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trials: list[Trial], *options: str
) -> list[rows.Row]:
    """Rows of the command, with these trials of each case's first pair."""
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


def test_the_list_names_everything(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = pipelines.Kind("nobody's", 1, fail, module="no_such_module")
    gpu = replace(kind, module="", devices=("cuda",))
    every = {OURS: KINDS[OURS], "nobodys_adamw": kind, "on_gpu": gpu}
    monkeypatch.setattr(listing, "base_kinds", lambda: every)
    listing.main([])
    lines = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    named = {*all_cases(), *param_sets.LISTS, *every, "cpu", "cuda", "reference"}
    assert {f"| {name}" for name in named} <= set(lines)
    assert lines["| gpt2-124M"] == "| gpt2-124M | 148 | 124,439,808 |"
    assert lines[f"| {OURS}"].split(" | ")[-1].startswith(("cpu", "gpu"))
    assert "no: ModuleNotFoundError" in lines["| nobodys_adamw"]
    wanted = "gpu |" if torch.cuda.is_available() else "no: needs an NVIDIA GPU |"
    assert lines["| on_gpu"].endswith(wanted)
    listing.main(["params"])
    out = capsys.readouterr().out
    assert "llama-3.2-1B" in out and "nobodys_adamw" not in out
