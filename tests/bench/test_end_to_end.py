"""The optimizer's share in a training run: `python -m benchmarks profile` measures what it says.

No test asserts a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_helpers import medians, read
from torch.autograd import DeviceType

import fusedopt
from benchmarks import clocks, measure, pipelines, profile_training, rows as row_files

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
EXAMPLES = ("common", "characters", "train_digits", "train_char_transformer")


@pytest.fixture
def fresh_examples(restore_threads: None) -> Iterator[None]:
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
    profiled = medians(rows, "optimizer_share_profiled")
    for figure in (shares, operators, steps, iterations, profiled):
        assert set(figure) == every
    for share in (shares, profiled):
        assert all(0 < percent < 100 for percent in share.values())
    assert all(0 < steps[key] < iterations[key] for key in every)
    for case in cases:
        ours = operators[case, "fusedopt"]
        assert 0 < 10 * ours < operators[case, "torch_fused"] < operators[case, "torch_foreach"]
    pairs = {(r["case"], r["reference"]) for r in rows if r["figure"] == "iteration"}
    assert pairs == {key for key in every if "torch" in key[1]}
    assert len(list(kept.glob("*.json"))) == len(every)
    assert "| train_digits-bf16 | fusedopt |" in capsys.readouterr().out


@pytest.mark.parametrize("example", profile_training._PARTS)
def test_both_pipelines_are_what_they_are_called(example: str, fresh_examples: None) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    case = next(c for c in profile_training.all_cases(CPU).values() if c.example == example)
    runs = profile_training.start(case, 5, CPU, quick=True)
    assert list(runs) == list(profile_training.PIPELINES)
    fused, foreach = (runs[f"torch_{n}"].optimizer.param_groups[0] for n in ("fused", "foreach"))
    assert (fused["fused"], fused["foreach"]) == (True, None)
    assert (foreach["fused"], foreach["foreach"]) == (None, True)
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


@pytest.mark.parametrize(("missing", "status", "said"), [
    (False, 1, "not measured: losses"),
    (True, 0, "fusedopt[examples]"),
])  # fmt: skip
def test_what_is_not_measured_is_reported(
    missing: bool, status: int, said: str, fresh_examples: None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def differs(*args: object) -> None:
        raise pipelines.DifferentStep("losses")

    monkeypatch.setattr(profile_training, "check_same_training", differs)
    if missing:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    options = ["--quick", "--threads", "1", "--cases", "train_digits-bf16"]
    assert profile_training.main(options) == status
    printed = capsys.readouterr().out
    assert "train_digits-bf16 not measured: " in printed and said in printed


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
    report = row_files.Report({"timestamp": "", "commit": "", "dirty": 0}, None)
    profile_training.add_times(report, {"torch_fused": trials}, case="x")
    found = {(f["pipeline"], f["figure"]): f for f in report.figures()}
    assert found["fusedopt", "optimizer"]["reference"] == "torch_fused"
    assert found["fusedopt", "optimizer"].ratio() == (2.0, 2.0, 3.0)
    assert found["fusedopt", "iteration"].ratio().median == 2.0
    assert [*found["torch_fused", "optimizer_share"].samples()] == [10.0, 75.0, 10.0]
    assert [*found["fusedopt", "optimizer_share"].samples()] == [10.0, 50.0, 10.0]
    assert {row["disturbed"] for row in report.rows if row["reference"]} == {"1"}


def event(
    name: str, start: float, length: float, where: DeviceType = DeviceType.CPU,
    *children: SimpleNamespace, mark: bool = False,
) -> SimpleNamespace:  # fmt: skip
    span = SimpleNamespace(start=start, end=start + length)
    return SimpleNamespace(name=name, time_range=span, device_type=where, cpu_children=children,
                           is_user_annotation=mark, cpu_time_total=length)  # fmt: skip


def test_what_lies_within_a_range(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a GPU's events are laid out; of the second iteration, since the first is left out."""
    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    nested = event("aten::empty", 1020, 30)
    annotation = event("Optimizer.step", 1200, 20, cpu, event("aten::mul", 1205, 10), mark=True)
    step = event("optimizer", 1000, 500, cpu, event("aten::mul", 1010, 100, cpu, nested),
                 annotation, mark=True)  # fmt: skip
    events = [
        event("iteration", 0, 10, mark=True),
        event("optimizer", 5, 1, mark=True),
        event("iteration", 500, 2000, mark=True),
        step,
        event("optimizer", 1100, 300, gpu, mark=True),
        event("backward_kernel", 990, 5, gpu),
        event("update", 1120, 200, gpu),
        event("Memset (Device)", 1115, 2, gpu),
        event("forward_kernel", 1500, 100, gpu),
    ]

    class Profiler:
        """In the place of torch's, with these events."""

        def __init__(self, activities: list[object]) -> None:
            assert len(activities) == 2  # the GPU's, too

        def __enter__(self) -> Profiler:
            return self

        def __exit__(self, *_: object) -> None: ...
        def export_chrome_trace(self, path: str) -> None:
            Path(path).touch()

        def events(self) -> list[SimpleNamespace]:
            return events

    monkeypatch.setattr(profile_training, "profile", Profiler)
    report = row_files.Report({}, None)
    run, trace = SimpleNamespace(device=CUDA, step=lambda: None), tmp_path / "trace.json"
    profile_training.add_profile(report, run, 1, trace, case="x", pipeline="p")
    assert {row["figure"]: row["values"] for row in report.rows} == {
        "optimizer_operators": "3", "optimizer_launches": "2", "optimizer_share_profiled": "25",
    }  # fmt: skip
    assert trace.exists()


def test_a_gpu_trains_in_fp16_too() -> None:
    names = set(profile_training.all_cases(CUDA))
    assert {"train_digits-fp16", "train_char_transformer-fp16"} <= names
    assert len(names) == 5
