"""The optimizer's share in a training run: `python -m benchmarks profile` measures what it says.

No test asserts a time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import bench_helpers
import pytest
import torch
from bench_helpers import medians, read
from torch.autograd import DeviceType
from torch.profiler import record_function

import fusedopt
from benchmarks import clocks, measure, pipelines, profile_training, rows as row_files

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
EXAMPLES = ("common", "train_digits", "train_char_transformer")
one_thread = bench_helpers.one_thread


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
    cases = {name for name in profile_training.all_cases(CPU) if "batch" not in name}
    every = {(case, pipeline) for case in cases for pipeline in profile_training.PIPELINES}
    shares, operators = medians(rows, "optimizer_share"), medians(rows, "optimizer_operators")
    steps, iterations = medians(rows, "optimizer"), medians(rows, "iteration")
    for figure in (shares, operators, steps, iterations, medians(rows, "optimizer_share_profiled")):
        assert set(figure) == every
    assert all(0 < share < 100 for share in shares.values())
    assert all(0 < steps[key] < iterations[key] for key in every)
    for case in cases:
        ours = operators[case, "fusedopt"]
        assert 0 < 10 * ours < operators[case, "torch_fused"] < operators[case, "torch_foreach"]
    pairs = {(r["case"], r["reference"]) for r in rows if r["figure"] == "iteration"}
    assert pairs == {key for key in every if "torch" in key[1]}
    notes = [row["note"] for row in rows if row["figure"] == "optimizer_operators"]
    assert any("aten::_fused_adamw_ 2x" in note for note in notes)  # two param groups
    assert len(list(kept.glob("*.json"))) == len(every)
    assert "| train_digits-bf16 | fusedopt |" in capsys.readouterr().out


@pytest.mark.parametrize("example", profile_training._PARTS)
def test_both_pipelines_are_what_they_are_called(example: str, fresh_examples: None) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    case = next(c for c in profile_training.all_cases(CPU).values() if c.example == example)
    runs = profile_training.start(case, 5, CPU, quick=True)
    assert list(runs) == list(profile_training.PIPELINES)
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
    profile_training.check_same_training(runs, "bf16")
    with pytest.raises(pipelines.DifferentStep, match="a and b"):
        profile_training.check_same_training(runs, "fp32")
    runs["b"].losses[1] = float("nan")
    with pytest.raises(pipelines.DifferentStep):
        profile_training.check_same_training(runs, "bf16")


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
    profile_training.warm_up(runs)
    assert [run.steps for run in runs.values()] == [steps, steps]


def test_a_missing_package_is_reported(
    fresh_examples: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert profile_training.main(["--quick", "--cases", "train_digits-bf16"]) == 0
    printed = capsys.readouterr().out
    assert "train_digits-bf16 not measured: " in printed
    assert "fusedopt[examples]" in printed


def new_report() -> row_files.Report:
    return row_files.Report({"timestamp": "", "commit": "", "dirty": 0}, None)


class Timed:
    """Stands for a training: each step takes as long as the script says, on both of its clocks."""

    def __init__(self, *script: tuple[float, float]) -> None:
        self._script = iter(script)
        self.watch, self.whole_watch = SimpleNamespace(times=[]), SimpleNamespace(times=[])

    def step(self) -> None:
        for watch, ms in zip((self.watch, self.whole_watch), next(self._script), strict=True):
            watch.times.append(ms)


def test_a_sample_is_one_iteration_by_the_clocks_of_the_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clocks, "MAX_FOREIGN_SHARE", float("inf"))
    ours, theirs = Timed((1, 8), (3, 8), (1, 8)), Timed((4, 16), (8, 16))
    clock = profile_training.TrainingClock()
    trials = measure.sandwich(ours, {"torch_fused": theirs}, clock, rounds=2, attempts=2)
    assert trials["torch_fused"] == [((4, 16), (2, 8), False), ((8, 16), (2, 8), False)]


def test_ratios_are_of_the_same_round_and_disturbed_rounds_are_left_out() -> None:
    trials = [
        measure.Trial((2.0, 20.0), (1.0, 10.0)),
        measure.Trial((30.0, 40.0), (10.0, 20.0)),
        measure.Trial((1.0, 5.0), (99.0, 2.0), True),
        measure.Trial((2.0, 20.0), (1.0, 10.0)),
    ]
    report = new_report()
    profile_training.add_times(report, {"torch_fused": trials}, case="x")
    found = {(f["pipeline"], f["figure"]): f for f in report.figures()}
    assert found["fusedopt", "optimizer"]["reference"] == "torch_fused"
    assert found["fusedopt", "optimizer"].ratio() == (2.0, 2.0, 3.0)
    assert found["fusedopt", "iteration"].ratio().median == 2.0
    assert [*found["torch_fused", "optimizer_share"].samples()] == [10.0, 75.0, 10.0]
    assert [*found["fusedopt", "optimizer_share"].samples()] == [10.0, 50.0, 10.0]
    assert {row["disturbed"] for row in report.rows if row["reference"]} == {"1"}


def event(
    name: str, start: float, length: float, where: DeviceType = DeviceType.CPU, thread: int = 1,
    self_us: float = 0.0, mark: bool = False,
) -> SimpleNamespace:  # fmt: skip
    span = SimpleNamespace(start=start, end=start + length, elapsed_us=lambda: length)
    return SimpleNamespace(name=name, time_range=span, device_type=where, thread=thread,
                           self_cpu_time_total=self_us, is_user_annotation=mark)  # fmt: skip


def test_what_lies_within_a_range() -> None:
    """As a GPU's events are laid out: only what lies within the range counts, each time once."""
    gpu = DeviceType.CUDA
    events = [
        event("optimizer", 1000, 500, self_us=390.0, mark=True),
        event("optimizer", 1100, 300, gpu, thread=7, mark=True),
        event("aten::add", 900, 50, self_us=50.0),
        event("aten::mul", 1010, 100, self_us=50.0),
        event("aten::empty", 1020, 30, self_us=30.0),
        event("aten::empty", 1060, 20, self_us=20.0),
        event("aten::mul", 1200, 10, self_us=10.0),
        event("aten::mul", 1250, 10, thread=2, self_us=10.0),
        event("backward_kernel", 990, 5, gpu, thread=7),
        event("update", 1120, 200, gpu, thread=7),
        event("Memset (Device)", 1115, 2, gpu, thread=7),
        event("forward_kernel", 1500, 100, gpu, thread=7),
    ]
    (found,) = profile_training.read_ranges(events, "optimizer")
    assert found.ms == 0.5
    assert found.operators == {"aten::mul": 2, "aten::empty": 2}
    own = {"aten::mul": 0.060, "aten::empty": 0.050, profile_training.OUTSIDE: 0.390}
    assert found.self_ms == pytest.approx(own)
    assert found.launches == {"update": 1, "Memset (Device)": 1}
    assert found.device_ms["update"] == pytest.approx(0.2)


def test_launches_become_a_figure() -> None:
    step = profile_training.Range(1.0, Counter(a=3), Counter(a=0.5), Counter(k=2), Counter(k=0.7))
    whole = profile_training.Range(4.0, Counter(), Counter(), Counter(), Counter())
    report = new_report()
    profile_training.add_profile(report, "x", "fusedopt", [step, step], [whole, whole])
    found = {row["figure"]: (row["values"], row["note"]) for row in report.rows}
    assert found["optimizer_operators"] == ("3 3", "a 3x 0.500 ms")
    assert found["optimizer_launches"] == ("2 2", "k 2x 0.700 ms")
    assert found["optimizer_share_profiled"][0] == "25 25"


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
    names = set(profile_training.all_cases(CUDA))
    assert {"train_digits-fp16", "train_char_transformer-fp16"} <= names
    assert len(names) == 5
