"""The optimizer's share in a training run: `python -m benchmarks profile` measures what it says.

No test asserts a time.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import figure_helpers
import pytest
import torch
from figure_helpers import medians, read
from torch.profiler import record_function

import fusedopt  # the installed one, before the checkout is on the path

pytest.importorskip("numpy")
pytest.importorskip("tqdm")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    figures,
    pipelines,
    profile_training,
    report,
    traces,
    training_cases,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
EXAMPLES = ("common", "train_digits", "train_char_transformer")
one_thread = figure_helpers.one_thread


@pytest.fixture
def fresh_examples(one_thread: None) -> Iterator[None]:
    """The examples' modules and folder are gone again afterwards."""
    path = list(sys.path)
    for name in EXAMPLES:
        sys.modules.pop(name, None)
    yield
    for name in EXAMPLES:
        sys.modules.pop(name, None)
    sys.path[:] = path


def test_quick_profile(
    cpu_backend: str, fresh_examples: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out, kept = tmp_path / "profile.csv", tmp_path / "traces"
    options = ["--quick", "--threads", "1", "--out", str(out), "--trace", str(kept)]
    assert profile_training.main(options) == 0
    rows = read(out)
    cases = {name for name in training_cases.all_cases(CPU) if "batch" not in name}
    every = {(case, pipeline) for case in cases for pipeline in training_cases.PIPELINES}
    shares, operators = medians(rows, "optimizer_share"), medians(rows, "optimizer_operators")
    steps, iterations = medians(rows, "optimizer_ms"), medians(rows, "iteration_ms")
    for figure in (shares, operators, steps, iterations, medians(rows, "optimizer_share_profiled")):
        assert set(figure) == every
    assert all(0 < share < 100 for share in shares.values())
    assert all(0 < steps[key] < iterations[key] for key in every)
    for case in cases:
        ours = operators[case, "fusedopt"]
        assert 0 < 10 * ours < operators[case, "torch_fused"] < operators[case, "torch_foreach"]
    assert set(medians(rows, "iteration_ratio")) == {key for key in every if "torch" in key[1]}
    notes = [row["note"] for row in rows if row["figure"] == "optimizer_operators"]
    assert any("aten::_fused_adamw_ 2x" in note for note in notes)  # two param groups
    assert len(list(kept.glob("*.json"))) == len(every)
    for case, batches in (("train_digits-bf16", 2), ("train_char_transformer-fp32", 1)):
        parts = {"iteration": 1, "forward": batches, "backward": batches, "optimizer": 1}
        trace = kept / f"{case}-fusedopt.json"
        ranges = {name: traces.read_ranges(trace, name) for name in parts}
        assert {name: len(found) / 3 for name, found in ranges.items()} == parts  # of 1 + 2 steps
        whole, *inside = (sum(part.ms for part in found) for found in ranges.values())
        assert sum(inside) < whole
    assert "| train_digits-bf16 | fusedopt |" in capsys.readouterr().out


@pytest.mark.parametrize("example", training_cases._PARTS)
def test_both_pipelines_are_what_they_are_called(example: str, fresh_examples: None) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    case = next(c for c in training_cases.all_cases(CPU).values() if c.example == example)
    runs = training_cases.start(case, 5, CPU, quick=True)
    assert list(runs) == list(training_cases.PIPELINES)
    groups = {name: run.optimizer.param_groups[0] for name, run in runs.items()}
    assert [(g.get("fused"), g.get("foreach")) for g in groups.values()][:2] == [
        (True, None),
        (None, True),
    ]
    assert type(runs["fusedopt"].optimizer) is fusedopt.FusedAdamW
    assert type(runs["fusedopt"].scaler) is fusedopt.GradScaler
    start = [[p.detach().clone() for p in run.model.parameters()] for run in runs.values()]
    for other in start[1:]:
        assert all(torch.equal(a, b) for a, b in zip(start[0], other, strict=True))


def test_different_training_is_refused() -> None:
    runs = {"a": SimpleNamespace(losses=[1.0, 0.5]), "b": SimpleNamespace(losses=[1.0, 0.51])}
    training_cases.check_same_training(runs, "bf16")
    with pytest.raises(pipelines.DifferentStep, match="a and b"):
        training_cases.check_same_training(runs, "fp32")
    runs["b"].losses[1] = float("nan")
    with pytest.raises(pipelines.DifferentStep):
        training_cases.check_same_training(runs, "bf16")


def test_different_training_fails_the_command(
    one_thread: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(*args: object) -> None:
        raise pipelines.DifferentStep("losses")

    monkeypatch.setattr(profile_training, "check_same_training", differs)
    assert profile_training.main(["--quick", "--cases", "train_digits-bf16"]) == 1
    assert "train_digits-bf16 not measured: losses" in capsys.readouterr().out


class Scaled:
    """Stands for a training whose scale comes down in its first steps, which are skipped."""

    def __init__(self, skipped: int) -> None:
        self.steps = 0
        self.scaler = SimpleNamespace(get_scale=lambda: 2.0 ** -min(self.steps, skipped))

    def step(self) -> None:
        self.steps += 1


@pytest.mark.parametrize(("skipped", "steps"), [(0, 3), (4, 7), (50, 20)])
def test_skipped_steps_are_over_before_the_clock_starts(skipped: int, steps: int) -> None:
    runs = {"a": Scaled(skipped), "b": Scaled(0)}
    training_cases.warm_up(runs)
    assert [run.steps for run in runs.values()] == [steps, steps]


def test_a_missing_package_is_reported(
    fresh_examples: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert profile_training.main(["--quick", "--cases", "train_digits-bf16"]) == 0
    printed = capsys.readouterr().out
    assert "train_digits-bf16 not measured: " in printed
    assert "fusedopt[examples]" in printed


def test_disturbed_rounds_are_left_out_while_enough_remain() -> None:
    times = {"fusedopt": [1.0, 9.0, 1.0, 1.0]}
    timed = profile_training.Rounds(times, times, [False, True, False, False])
    assert timed.kept() == [0, 2, 3]
    assert timed.note() == "; disturbed rounds: 1, left out"
    timed = profile_training.Rounds(times, times, [False, True, True, True])
    assert timed.kept() == [0, 1, 2, 3]
    assert timed.note() == "; disturbed rounds: 3, NOT left out"
    assert profile_training.Rounds(times, times, [False] * 4).note() == ""


def test_ratios_are_of_the_same_round() -> None:
    own = figures.Figures({}, None)
    step = {"torch_fused": [2.0, 30.0], "fusedopt": [1.0, 10.0]}
    whole = {"torch_fused": [20.0, 40.0], "fusedopt": [10.0, 20.0]}
    profile_training.add_times(own, "x", profile_training.Rounds(step, whole, [False] * 2), "")
    found = {(row["pipeline"], row["figure"]): row["p50"] for row in own.rows}
    assert found["torch_fused", "optimizer_ratio"] == "2.5000"
    assert found["torch_fused", "iteration_ratio"] == "2.0000"
    assert found["torch_fused", "optimizer_share"] == "42.5000"
    assert ("fusedopt", "optimizer_ratio") not in found


def event(category: str, name: str, start: float, length: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": thread}


def test_a_trace_with_a_gpu(tmp_path: Path) -> None:
    """As a GPU's trace is laid out: only what lies within the range counts, each time once."""
    path = tmp_path / "trace.json"
    events = [
        event("user_annotation", "optimizer", 1000, 500),
        event("gpu_user_annotation", "optimizer", 1100, 300, thread=7),
        event("cpu_op", "aten::add", 900, 50),
        event("cpu_op", "aten::mul", 1010, 100),
        event("cpu_op", "aten::empty", 1020, 30),
        event("cpu_op", "aten::empty", 1060, 20),
        event("cpu_op", "aten::mul", 1200, 10),
        event("cpu_op", "aten::mul", 1250, 10, thread=2),
        event("cuda_runtime", "cudaLaunchKernel", 1030, 5),
        event("kernel", "backward_kernel", 990, 5, thread=7),
        event("kernel", "update", 1120, 200, thread=7),
        event("gpu_memset", "Memset (Device)", 1115, 2, thread=7),
        event("kernel", "forward_kernel", 1500, 100, thread=7),
        {"ph": "i", "name": "mark", "ts": 1100},
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    (found,) = traces.read_ranges(path, "optimizer")
    assert found.ms == 0.5
    assert found.operators == {"aten::mul": 2, "aten::empty": 2}
    assert found.self_ms["aten::mul"] == pytest.approx(0.060)
    assert found.self_ms["aten::empty"] == pytest.approx(0.050)
    assert found.self_ms[traces.OUTSIDE] == pytest.approx(0.390)
    assert found.launches == {"update": 1, "Memset (Device)": 1}
    assert found.device_ms["update"] == pytest.approx(0.2)


def test_launches_become_a_figure() -> None:
    step = traces.Range(1.0, Counter(a=3), Counter(a=0.5), Counter(k=2), Counter(k=0.7))
    whole = traces.Range(4.0, Counter(), Counter(), Counter(), Counter())
    own = figures.Figures({}, None)
    profile_training.add_profile(own, "x", "fusedopt", [step, step], [whole, whole])
    found = {row["figure"]: (row["p50"], row["note"]) for row in own.rows}
    assert found["optimizer_operators"] == ("3.0000", "a 3x 0.500 ms")
    assert found["optimizer_launches"] == ("2.0000", "k 2x 0.700 ms")
    assert found["optimizer_share_profiled"][0] == "25.0000"


class OneOperator:
    """Stands for a training on a GPU: its step is one operator."""

    device = CUDA

    def step(self) -> None:
        with record_function("iteration"), record_function("optimizer"):
            torch.ones(8)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_profiling_for_a_gpu_leaves_out_the_first_iteration(tmp_path: Path) -> None:
    steps, iterations = profile_training.profile_steps(OneOperator(), 3, tmp_path / "trace.json")
    assert len(steps) == len(iterations) == 3
    assert all(step.operators["aten::ones"] == 1 for step in steps)
    assert all(whole.ms >= step.ms for step, whole in zip(steps, iterations, strict=True))


def test_a_gpu_trains_in_fp16_too() -> None:
    names = set(training_cases.all_cases(CUDA))
    assert {"train_digits-fp16", "train_char_transformer-fp16"} <= names
    assert len(names) == 5


# ---- rows, of both commands ----------------------------------------------------------------------


def test_rows_have_exactly_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    own = figures.Figures(figures.common_columns(CPU), path)
    own.add("case", "fusedopt", "state_mib", "MiB", [1.0, 2.0, 3.0], "a note")
    own.save()
    own.save()  # nothing new
    own.add("case", "fusedopt", "other_mib", "MiB", [4.0])
    own.save()
    assert [row["figure"] for row in read(path)] == ["state_mib", "other_mib"]
    assert list(read(path)[0]) == report.FIGURE_COLUMNS
    short = {name: value for name, value in own.rows[0].items() if name != "note"}
    for odd in (short, own.rows[0] | {"more": 1}):
        with pytest.raises(ValueError, match=r"more|note"):
            report.append_figures(path, [odd])
    path.write_text("other,columns\n")
    with pytest.raises(SystemExit, match="other columns"):
        report.append_figures(path, own.rows)
    with pytest.raises(SystemExit, match="other columns"):
        figures.Figures({}, path)


def test_tables_read_as_documents_write_figures() -> None:
    own = figures.Figures({}, None)
    own.add("a", "torch_fused", "optimizer_ms", "ms", [1.0, 2.0, 3.0])
    own.add("a", "torch_fused", "optimizer_ratio", "x", [1.5])
    own.add("a", "fusedopt", "optimizer_ms", "ms", [1.0])
    own.add("a", "fusedopt", "optimizer_operators", "count", [5.0, 5.0])
    columns = ["optimizer_ms", "optimizer_ratio", "optimizer_operators", "not_measured"]
    assert figures.table(own.rows, columns).splitlines() == [
        "| case | pipeline | optimizer | optimizer ratio | optimizer operators |",
        "| --- | --- | --- | --- | --- |",
        "| a | torch_fused | 2.00 ms [1.40\u20132.60] | 1.50x [1.50\u20131.50] | - |",
        "| a | fusedopt | 1.00 ms [1.00\u20131.00] | - | 5 |",
    ]
