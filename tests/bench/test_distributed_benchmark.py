"""`python -m benchmarks distributed`: what it starts, counts and says. No test asserts a time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from bench_helpers import medians, read

from benchmarks import collectives, distributed, sharded
from benchmarks.clocks import Sample
from benchmarks.pipelines import DifferentStep

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
STEPS, HOST = "adamw-300x1k-fsdp-2", "adamw-300x16-dtensor-fsdp-2"


def test_a_quick_run_writes_rows(
    cpu_backend: str, restore_threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    options = ["--quick", "--rounds", "1", "--out", str(out), "--cases", STEPS, HOST]
    assert distributed.main(options) == 0
    found = read(out)
    compared = {(row["case"], row["pipeline"], row["reference"]) for row in found}
    wanted = {(STEPS, *pair) for pair in distributed.STEPS}
    assert compared == wanted | {(HOST, *pair) for pair in distributed.HOST}
    assert {(row["threads"], row["grads"]) for row in found} == {("1", "views")}
    assert all("2 gloo processes" in row["note"] for row in found)
    counts, sent = medians(found, "collectives"), medians(found, "sent")
    assert counts[STEPS, distributed.OURS] == counts[STEPS, distributed.NO_SCALER] == 1
    assert sent[STEPS, distributed.OURS] == 192
    # The flag of the scaler; and of clip_grad_norm_ a norm for each of 12 tensors.
    assert (counts[STEPS, "adamw_fused"], sent[STEPS, "adamw_fused"]) == (2, 4 + 12 * 4)
    assert (HOST, distributed.NO_NORM) not in counts, "there is no message to count"
    assert "rows in" in capsys.readouterr().out


def test_cases_are_of_known_pipelines_and_layouts() -> None:
    for case in distributed.CASES.values():
        assert {name for pair in case.pairs for name in pair} <= {*sharded.PIPELINES}
        assert case.ranks == sharded.LAYOUTS[case.layout].ranks
        assert len(case.shrunk()) == 12


def test_predictions_need_no_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "run", None)
    assert distributed.main(["--predict"]) == 0
    assert "**PREDICTED, not measured" in capsys.readouterr().out


# ---- on ranks ------------------------------------------------------------------------------------


class Sleeper:
    """Whose step takes the longer, the higher the rank."""

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        time.sleep(0.03 * dist.get_rank())


def _counted() -> list[tuple[int, int]]:
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    mesh, words = init_device_mesh("cpu", (2,)), torch.zeros(24, dtype=torch.int64)
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    steps = (
        lambda: words.add_(1),
        lambda: dist.all_reduce(words),
        lambda: functional.all_reduce(words, "sum", mesh).add(1),
        lambda: partial.full_tensor(),
        lambda: [partial.full_tensor(), dist.all_reduce(words)],
    )
    return [tuple(collectives.messages_of(step)) for step in steps]


def _refusal(step: Any) -> str:
    try:
        collectives.messages_of(step)
    except (RuntimeError, DifferentStep) as error:
        return str(error)
    return ""


def on_ranks(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    layout = sharded.LAYOUTS["fsdp-2"]
    mesh = init_device_mesh("cpu", layout.mesh)
    shapes = [(5, 3), (1,), (7,), (4, 6)]
    model = sharded.Model(shapes, layout, mesh)
    whole = [distribute_tensor(torch.ones(s), mesh, layout.placements) for s in shapes]
    same = [tuple(one.to_local().shape) for one in whole] == model.local_shapes

    def twice_the_rate(model: sharded.Model) -> Any:
        made = sharded.PIPELINES["adamw_fused"](model)
        for group in made.optimizer.param_groups:
            group["lr"] *= 1.0 + rank  # on one rank only
        return made

    sharded.PIPELINES["other"] = twice_the_rate
    try:
        distributed._checked(model, ("fusedopt_adamw", "other"))
        told = ""
    except DifferentStep as error:
        told = str(error)
    pair = distributed._checked(model, ("fusedopt_adamw", "adamw_fused"))
    is_new = []
    for _ in range(2):
        pair[0].prepare()
        is_new.append(pair[0].params[0].grad)
    clock = sharded.RanksClock()
    sample = clock.sampler(Sleeper())()
    words = torch.zeros(2)
    return {
        "counted": _counted(),
        "unknown": _refusal(lambda: dist.broadcast(words, 0)),
        "same shapes": same,
        "different": told,
        "new objects": is_new[0] is not is_new[1],
        "sample": (sample.times, isinstance(sample, Sample)),
    }


def test_ranks_count_compare_and_wait_for_the_slowest(cpu_backend: str) -> None:
    first, second = ranks.run(2, on_ranks)
    words, three = (1, 192), (1, 12)
    assert first["counted"] == [(0, 0), words, words, three, (2, 192 + 12)]
    assert "bytes of c10d.broadcast_" in first["unknown"]
    assert first["same shapes"] and second["same shapes"]
    assert first["different"] == second["different"], "no rank goes on alone"
    assert "{1: " in first["different"], "the rank is named"
    assert first["new objects"]
    assert first["sample"] == second["sample"] and first["sample"][0][0] >= 30


def test_what_only_a_group_has_seen_is_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter([3, 4])
    monkeypatch.setattr(collectives, "_sequence_numbers", lambda: next(numbers))
    with pytest.raises(RuntimeError, match="1 collectives reached a group, 0 were seen"):
        collectives.messages_of(lambda: None)


@pytest.mark.parametrize(
    ("layout", "at", "wanted"),
    [
        ("fsdp-2", (1,), (2, 3)),
        ("hsdp-2x2", (1, 0), (3, 3)),
        ("hsdp-2x2", (0, 1), (2, 3)),
        ("fsdp-tp-2x2", (1, 1), (2, 1)),
        ("fsdp-4", (3,), (0, 3)),
    ],
)
def test_local_shapes(layout: str, at: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    rows = 5 if layout != "fsdp-4" else 6
    assert sharded.local_shape((rows, 3), sharded.LAYOUTS[layout], at) == wanted
