"""Parameter lists, gradients, timing in turns, rows. No test asserts a time."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

pytest.importorskip("numpy")
pytest.importorskip("tqdm")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import param_sets, report, stream, timing  # noqa: E402
from benchmarks.cases import _CASES, _TARGETS, Comparison, all_cases  # noqa: E402
from benchmarks.registry import KINDS  # noqa: E402

SHAPES = [(40, 5), (7,), (1,), (300,)]


def test_readme_of_results_names_every_column() -> None:
    text = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    assert [column for column in report.COLUMNS if f"`{column}`" not in text] == []


@pytest.mark.parametrize("numel", [1_000_000, 10_000_000, 100_000_000])
def test_gpt_has_148_tensors_and_the_exact_size(numel: int) -> None:
    shapes = param_sets.gpt(numel)
    assert len(shapes) == 148
    assert sum(torch.Size(shape).numel() for shape in shapes) == numel


def test_every_target_belongs_to_a_comparison() -> None:
    cases = all_cases()
    for name, targets in _TARGETS.items():
        pairs = {(c.pipeline, c.reference) for c in cases[name].comparisons}
        assert set(targets) <= pairs
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


def test_every_candidate_sample_lies_between_samples_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "MAX_FOREIGN_SHARE", float("inf"))
    log: list[str] = []
    candidates = {name: Recorded(name, log) for name in "abc"}
    trials = timing.sandwich(Recorded("R", log), candidates, rounds=5, attempts=10)
    assert {name: len(trials[name]) for name in "abc"} == dict.fromkeys("abc", 5)
    sampled = log[log.index("R", 1) :]  # the samplers' own first steps come before
    assert sampled[::2] == ["R"] * 16
    orders = {"".join(sampled[1::2][i : i + 3]) for i in range(0, 15, 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 1


def test_disturbed_samples_are_taken_again_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_FOREIGN_SHARE", -1.0)
    log: list[str] = []
    trials = timing.sandwich(Recorded("R", log), {"a": Recorded("a", log)}, rounds=3, attempts=5)
    assert len(trials["a"]) == 5
    clean = [timing.Trial(0.002, 0.004, False)] * 5
    summary = timing.summarize([*clean, timing.Trial(0.002, 9.0, True)])
    assert (summary.ratio.p50, summary.samples, summary.disturbed, summary.quiet) == (2, 5, 1, True)
    summary = timing.summarize([timing.Trial(0.002, 0.004, True)] * 5)
    assert (summary.samples, summary.disturbed, summary.quiet) == (5, 5, False)


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


def result(ratio: float, target: float | None, *, wrong: bool = False) -> report.Result:
    case = all_cases()["adamw-one-1M"]
    comparison = Comparison("fusedopt_adamw", "adamw_fused", target)
    if wrong:
        return report.Result(case, comparison, note="different", wrong=True)
    return report.Result(
        case, comparison, timing.summarize([timing.Trial(0.001, 0.001 * ratio, False)] * 3)
    )


def test_table_tells_met_from_not_met() -> None:
    results = [result(4.0, 3.5), result(3.0, 3.5), result(9.0, None), result(1, 2, wrong=True)]
    lines = report.table(results, goals=True).splitlines()[2:6]
    assert [line.split("|")[-2].strip() for line in lines] == ["yes", "NO", "-", ""]
    assert "not measured: different" in lines[3]


def test_goals_are_for_those_who_ask_and_explained() -> None:
    results = [result(3.0, 3.5), result(1, 2, wrong=True)]
    told, asked = report.table(results), report.table(results, goals=True)
    assert not [word for word in ("NO", "met?", "goal", "3.5x") if word in told]
    assert report.GOALS_SAY in asked and report.RATIOS_SAY in told
    for text in (told, asked):
        header, _, *lines = text.partition("\n\n")[0].splitlines()
        assert {line.count("|") for line in lines} == {header.count("|")}


def test_append_keeps_one_header_and_refuses_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "machine.csv"
    rows = report.rows([result(4.0, 3.5), result(1, 2, wrong=True)], report.provenance())
    assert len(rows) == 1
    report.append(path, rows)
    report.append(path, rows)
    with path.open(newline="") as file:
        assert [row["ratio_p50"] for row in csv.DictReader(file)] == ["4.0000"] * 2
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(SystemExit, match="columns"):
        report.append(path, rows)
