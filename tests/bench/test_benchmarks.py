"""Parameter lists, gradients, timing in turns. No test asserts a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_helpers import SHAPES

from benchmarks import clocks, measure, param_sets, rows, stream


@pytest.mark.parametrize("numel", [1_000_000, 100_000_000])
def test_gpt_has_148_tensors_and_the_exact_size(numel: int) -> None:
    shapes = param_sets.gpt(numel)
    assert len(shapes) == 148
    assert sum(torch.Size(shape).numel() for shape in shapes) == numel


@pytest.mark.parametrize("kind", ["new", "kept", "bucket"])
def test_gradients_are_handed_out_as_backward_does(kind: str) -> None:
    """New tensors of the promised norm; the same ones, refilled; or views off alignment."""
    shapes = param_sets.gpt(1_000_000) if kind == "new" else SHAPES
    grads = param_sets.Gradients(shapes, torch.float32, kind)
    params = param_sets.make_params(shapes, torch.float32)
    grads.backward(params)
    first, values = [p.grad for p in params], [p.grad.clone() for p in params]
    for grad in first:
        grad.zero_()
    grads.backward(params)
    again = [param.grad for param in params]
    same = [one is other for one, other in zip(first, again, strict=True)]
    assert set(same) == {kind != "new"}
    torch.testing.assert_close(again, values, rtol=0, atol=0)
    wanted = param_sets.GRAD_NORM * param_sets.GRAD_SCALE
    if kind == "new":
        assert torch.nn.utils.get_total_norm(again).item() == pytest.approx(wanted, rel=0.02)
        assert len({grad.data_ptr() for grad in (*first, *again)}) == 296
    if kind == "bucket":
        assert again[0].data_ptr() % 16 == 4
        assert len({grad.untyped_storage().data_ptr() for grad in again}) == 1


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


def test_disturbed_samples_are_taken_again_and_none_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for allowed, rounds, attempts, taken in ((-1.0, 3, 4, 4), (float("inf"), 9, 9, 5)):
        monkeypatch.setattr(clocks, "MAX_FOREIGN_SHARE", allowed)
        _, trials = sandwich(rounds, attempts, "a", time_is_up=lambda: True)
        assert len(trials["a"]) == taken
    assert measure.MIN_ROUNDS == 5


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
