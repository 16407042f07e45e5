"""Parameter lists, gradients, timing in turns. No test asserts a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_helpers import SHAPES

from benchmarks import clocks, goals, measure, param_sets, rows, stream
from benchmarks.cases import _CASES, Comparison, all_cases
from benchmarks.registry import KINDS


@pytest.mark.parametrize("numel", [1_000_000, 10_000_000, 100_000_000])
def test_gpt_has_148_tensors_and_the_exact_size(numel: int) -> None:
    shapes = param_sets.gpt(numel)
    assert len(shapes) == 148
    assert sum(torch.Size(shape).numel() for shape in shapes) == numel


def test_every_goal_belongs_to_a_comparison() -> None:
    cases = all_cases()
    for goal in goals.ON_CPU:
        assert Comparison(goal.pipeline, goal.reference) in cases[goal.case].comparisons
    known = set(KINDS) | set(stream.STREAMS)
    assert {c.reference for case in cases.values() for c in case.comparisons} <= known
    assert {c.pipeline for case in cases.values() for c in case.comparisons} <= set(KINDS)


def test_names_of_cases_are_unique_and_say_which_list() -> None:
    cases = all_cases()
    assert len(cases) == len(_CASES)
    assert {name.split("-", 1)[1] for name in cases} <= {*param_sets.LISTS, "tiny"}


def test_gradients_are_new_tensors_of_the_promised_norm() -> None:
    shapes = param_sets.gpt(1_000_000)
    grads = param_sets.Gradients(shapes, torch.float32)
    params = param_sets.make_params(shapes, torch.float32)
    grads.backward(params)
    first = [param.grad for param in params]
    assert torch.nn.utils.get_total_norm(first).item() == pytest.approx(
        param_sets.GRAD_NORM * param_sets.GRAD_SCALE, rel=0.02
    )
    grads.backward(params)
    assert all(param.grad is not grad for param, grad in zip(params, first, strict=True))
    assert len({param.grad.data_ptr() for param in params} | {g.data_ptr() for g in first}) == 296


def test_kept_gradients_stay_the_same_tensors() -> None:
    grads = param_sets.Gradients(SHAPES, torch.float32, "kept")
    params = param_sets.make_params(SHAPES, torch.float32)
    grads.backward(params)
    first, values = [p.grad for p in params], [p.grad.clone() for p in params]
    for grad in first:
        grad.zero_()
    grads.backward(params)
    assert all(p.grad is grad for p, grad in zip(params, first, strict=True))
    torch.testing.assert_close([p.grad for p in params], values, rtol=0, atol=0)


class Recorded:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        if self.log[-1:] != [self.name]:
            self.log.append(self.name)


def sandwich(rounds: int, attempts: int, names: str, **more: object) -> tuple[list[str], Any]:
    log: list[str] = []
    candidates = {name: Recorded(name, log) for name in names}
    clock = clocks.HostClock()
    return log, measure.sandwich(Recorded("R", log), candidates, clock, rounds, attempts, **more)


def test_every_candidate_sample_lies_between_samples_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clocks, "MAX_FOREIGN_SHARE", float("inf"))
    log, trials = sandwich(5, 10, "abc")
    assert {name: len(trials[name]) for name in "abc"} == dict.fromkeys("abc", 5)
    sampled = log[log.index("R", 1) :]  # the samplers' own first steps come before
    assert sampled[::2] == ["R"] * 16
    orders = {"".join(sampled[1::2][i : i + 3]) for i in range(0, 15, 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 1


def test_disturbed_samples_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "MAX_FOREIGN_SHARE", -1.0)
    assert len(sandwich(3, 5, "a")[1]["a"]) == 5


@pytest.mark.parametrize(
    ("disturbed", "kept", "said"),
    [("-x--", "1 3 4", ("1", "1")), ("-xxx", "1 2 3 4", ("3", "0")), ("-", "1", ("0", "1"))],
)
def test_disturbed_samples_are_left_out_while_enough_remain(
    disturbed: str, kept: str, said: tuple[str, str]
) -> None:
    trials = [measure.Trial((n,), (2 * n,), mark == "x") for n, mark in enumerate(disturbed, 1)]
    report = rows.Report({}, None)
    used = measure.add_trials(report, {"step": "ms"}, trials, (1.0, 0.5), case="x")
    (row,) = report.rows
    assert (row["values"], row["reference_values"]) == (kept, kept)
    assert (row["disturbed"], row["quiet"]) == said and len(used) == len(kept.split())


def test_the_ratio_is_to_the_mean_of_both_sides() -> None:
    before, middle, after = (clocks.Sample((ms,), ms == 5.0) for ms in (1.0, 4.0, 5.0))
    trial = measure.Trial.between(before, middle, after)
    assert trial == ((4.0,), (3.0,), True)
    assert trial.swapped() == ((3.0,), (4.0,), True)


def test_a_run_whose_time_is_up_has_its_least_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "MAX_FOREIGN_SHARE", float("inf"))
    _, trials = sandwich(9, 9, "a", time_is_up=lambda: True)
    assert len(trials["a"]) == measure.MIN_ROUNDS == 5


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("numel", [1, 8191, 20_000])
def test_the_stream_reads_and_writes_every_element(numel: int, huge: bool) -> None:
    one = stream.Stream(numel, huge=huge)
    one.prepare()
    one._grad.copy_(torch.rand(numel))
    expected = one._grad.clone()
    one.step()
    for array in (one._param, *one._states):
        assert torch.equal(array, expected)
    if one._function is not None:
        pointers = [array.data_ptr() for array in (one._grad, one._param, *one._states)]
        total = one._function(*pointers, numel, 2)
        assert total == pytest.approx(expected.square().sum().item(), rel=1e-4)
