"""The message of a rank: which device of a group it goes through, and when there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from gpu_helpers import device, runners
from gpu_ranks import Met, Pairs
from torch import Tensor

from fusedopt import optimizer as optimizer_module
from fusedopt.backends import records
from fusedopt.plan.exchange import Ranks, ranks_of

runner = runners()


class Sent(NamedTuple):
    device: str
    op: Any


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """What goes through ``all_reduce``; another rank sends a one in every word."""
    messages: list[Sent] = []

    class Work:
        def wait(self) -> None:
            pass

    def all_reduce(words: Tensor, op: Any, group: Any, async_op: bool) -> Work:
        assert async_op
        messages.append(Sent(words.device.type, op))
        words.add_(1)
        return Work()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    return messages


def group_for(*device_types: str) -> Any:
    return SimpleNamespace(_device_types=[torch.device(name) for name in device_types])


@pytest.mark.parametrize("types", [("cpu",), ("cpu", "cuda"), ("cuda", "cpu")])
def test_words_go_through_a_device_that_the_group_serves(
    types: tuple[str, ...], sent: list[Sent]
) -> None:
    ranks = Ranks(group_for(*types), frozenset(), False, True)
    words = torch.arange(records.WORDS, device=device())
    ranks.add_up(words, 2.0)
    assert words.tolist() == list(range(1, records.WORDS + 1))
    where = device().type if device().type in types else "cpu"
    assert sent == [(where, torch.distributed.ReduceOp.SUM)]


def test_words_on_a_device_that_the_group_does_not_serve(sent: list[Sent]) -> None:
    """On the CPU a stand-in for such a tensor."""

    class Elsewhere:
        device = SimpleNamespace(type="elsewhere")
        value = torch.zeros(records.WORDS, dtype=torch.int64)
        to = staticmethod(lambda kind: Elsewhere.value.to(kind, copy=True))
        copy_ = value.copy_

    ranks = Ranks(group_for("cpu"), frozenset(), False, True)
    ranks.add_up(Elsewhere, float("inf"))  # type: ignore[arg-type]
    assert Elsewhere.value.tolist() == [1] * records.WORDS
    assert sent == [("cpu", torch.distributed.ReduceOp.MAX)]


@pytest.mark.parametrize(
    ("wanted", "types", "used"),
    [("cuda", ("cpu", "cuda"), "cuda"), ("cuda", ("cpu",), "cpu"), (None, ("cpu", "cuda"), "cpu")],
)
def test_words_of_a_rank_without_parameters(
    wanted: str | None, types: tuple[str, ...], used: str, sent: list[Sent]
) -> None:
    """They are on the CPU, and travel as those of the ranks that have parameters do."""
    asked: list[str] = []

    class Words(Tensor):
        def to(self, kind: str) -> Tensor:  # type: ignore[override]
            asked.append(kind)
            return self.as_subclass(Tensor).clone()

    ranks = Ranks(group_for(*types), frozenset(), False, True, wanted)
    words = torch.zeros(records.WORDS, dtype=torch.int64).as_subclass(Words)
    ranks.add_up(words, 2.0)
    assert asked == ([used] if used == "cuda" else [])
    assert words.tolist() == [1] * records.WORDS


@pytest.mark.parametrize("mesh", [False, True])
def test_a_rank_without_parameters_guesses_where_others_have_theirs(
    mesh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist = torch.distributed
    group = group_for("cpu", "cuda")
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if mesh:
        group.device_type = "cpu"
    for params, expected in (([], "cpu" if mesh else "cuda"), ([torch.ones(3)], None)):
        groups = [{"params": [torch.nn.Parameter(p) for p in params]}]
        found = ranks_of(groups, SimpleNamespace(norm_group=group), {})  # type: ignore[arg-type]
        assert isinstance(found, Ranks) and found.device_type == expected


def test_an_abort_goes_where_the_words_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step that fails at once: the optimizer's scalars are not yet on the device."""
    pairs = Pairs(monkeypatch)
    devices: list[torch.device] = []
    monkeypatch.setattr(Met, "abort", lambda self, device, norm_type: devices.append(device))
    opt = pairs.ours.opts[0]
    opt._shared.ranks = pairs.ours.ranks[0]

    def fails() -> None:
        raise RuntimeError("at once")

    monkeypatch.setattr(optimizer_module, "refuse_tracing", fails)
    monkeypatch.setattr(type(opt), "_flag_device", lambda self, otherwise: torch.device("meta"))
    with pytest.raises(RuntimeError, match="at once"):
        opt.step()
    assert devices == [torch.device("meta")]


@pytest.mark.parametrize("capturing", [False, True])
def test_no_abort_in_a_capture(
    capturing: bool, sent: list[Sent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be sent by no replay, and the graph is lost."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(Ranks, "add_up", lambda self, words, norm_type: sent.append(words))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    ranks = Ranks(group_for("cuda"), frozenset(), False, True)
    ranks.abort(torch.device("cuda"), 2.0)
    assert [words[records.VOTES] for words in sent] == ([] if capturing else [records.ABORT])
