"""Steps whose norm and decision are shared by ranks: the message, and what a refused step does.

The ranks are optimizers in threads of this process (gpu_ranks.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_helpers import (
    backend,
    device,
    device_work,
    module_of,
    real,
    runners,
    synchronize,
    two_devices,
)
from gpu_ranks import Pair, Pairs, grads_of_ranks, lengths
from tolerances import assert_norm, assert_same_bits
from torch import Tensor

from fusedopt.backends.device import DevicePlan

runner = runners()
every_norm = pytest.mark.parametrize("norm_type", [2.0, math.inf])
INF, NAN = math.inf, math.nan
VERBS = ("reduce", "finalize", "update")
LATE = (
    "this step or one before it was refused and has changed nothing on any rank; the others count, "
    "so put the cause right and go on, without repeating a step. The cause: "
)


# ---- one norm, one decision ---------------------------------------------------------------------


def spoilt(step: int) -> list[list[Tensor]]:
    """Gradients with an inf or NaN in tensors that count and in others; or huge ones in them."""
    grads = grads_of_ranks(step)
    rank, tensor, value = {
        1: (0, 1, INF), 2: (1, 0, NAN), 3: (0, 0, -INF), 4: (0, 1, 1e4), 5: (0, 0, 3e30),
        6: (1, 1, NAN),
    }.get(step, (0, 0, 0.5))  # fmt: skip
    grads[rank][tensor][-1] = value
    return grads


@every_norm
def test_one_norm_and_one_decision(norm_type: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word of every message, with gradients that another rank counts."""
    uncounted = ((1, 2), (1,))
    pairs = Pairs(monkeypatch, uncounted=uncounted, norm_type=norm_type, max_grad_norm=1.0)
    for step in range(8):
        grads = spoilt(step)
        pairs.run(grads)
        finite = all(bool(g.isfinite().all()) for own in grads for g in own)
        assert pairs.ours.opts[0].found_inf.item() == (not finite)
        counted = [
            g.double()
            for own, out in zip(grads, uncounted, strict=True)
            for k, g in enumerate(own)
            if k not in out or norm_type == INF
        ]
        if finite:
            norm = torch.linalg.vector_norm(torch.cat(counted), norm_type)
            assert_norm(pairs.ours.opts[0].grad_norm.cpu(), norm)
    assert pairs.ours.opts[0].skipped_steps.item() == 4
    assert len(pairs.ours.meeting.messages) == 8


@every_norm
def test_votes_of_scalers(norm_type: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag, or a scale without a reciprocal, on one rank; the gradients themselves are finite."""
    pairs = Pairs(monkeypatch, norm_type=norm_type)
    given = [
        ((4.0, 4.0), (0.0, 0.0), False), ((4.0, 4.0), (0.0, 1.0), True),
        ((4.0, 4.0), (2.0, 0.0), True), ((4.0, 0.0), (0.0, 0.0), True),
        ((NAN, 4.0), (0.0, 0.0), True), ((4.0, 0.0), (1.0, 0.0), True),
        ((4.0, 4.0), (None, None), False),
    ]  # fmt: skip
    for step, (scales, flags, skips) in enumerate(given):
        pairs.set("grad_scale", scales)
        pairs.set("found_inf", flags)
        before = pairs.ours.opts[0].skipped_steps.item()
        pairs.run(grads_of_ranks(step))
        assert pairs.ours.opts[0].skipped_steps.item() == before + skips
        assert pairs.ours.opts[0].found_inf.item() == skips


@every_norm
def test_several_devices_are_one_rank(norm_type: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their words are one message, which has the bits of one device."""
    devices = two_devices(monkeypatch)
    places = [devices[k % 2] for k in range(len(lengths()[0]))]
    pairs = Pairs(monkeypatch, places, ((1,), (1,)), norm_type=norm_type, max_grad_norm=1.0)
    for step in range(6):
        pairs.run(spoilt(step))
    assert len(pairs.ours.opts[0]._shared.plan.parts) == 2
    assert len(pairs.ours.meeting.messages) == 6
    pairs.alone(grads_of_ranks(6))  # leaves the words of each device on the other
    pairs.run(grads_of_ranks(7))
    assert len(pairs.ours.meeting.messages) == 7
    check_refusal(pairs, monkeypatch, lambda pair: fail(pair, 1), 1)


# ---- steps that are refused ---------------------------------------------------------------------


def fail(pair: Pair, rank: int) -> None:
    """A step in which ``rank`` fails before it joins."""
    param = pair.params[rank][0]
    grad = param.grad
    param.grad = torch.zeros_like(param).to_sparse()
    pair.step()
    param.grad = grad
    assert "sparse" in str(pair.errors[rank])


def differ(pair: Pair) -> None:
    """A step in which the ranks have different options."""
    group = pair.opts[1].param_groups[0]
    lr, group["lr"] = group["lr"], 0.7
    pair.step()
    group["lr"] = lr
    assert "the ranks' options differ" in str(pair.errors[1])


def answers_late(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The host is ``steps`` ahead of the device from now on, and then level with it."""
    refusal, left = DevicePlan.refusal, [steps]

    def slow(plan: DevicePlan) -> int:
        synchronize()
        left[0] -= 1
        return 0 if left[0] >= 0 else refusal(plan)

    monkeypatch.setattr(DevicePlan, "refusal", slow)


def check_refusal(
    pairs: Pairs,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[Pair], None],
    late: int,
    cause: str = "another rank refused this step",
) -> None:
    """No bit has moved; the device's rank raises once, ``late`` steps after; all goes on."""
    before = pairs.ours.bits()
    answers_late(monkeypatch, late)
    found = []
    refuse(pairs.twin)
    refuse(pairs.ours)
    found.append(pairs.ours.errors[0])
    for old, now in zip(before, pairs.ours.bits(), strict=True):
        assert_same_bits(now, old, "a refused step has changed it")
    for _ in range(late + 3):
        pairs.step()
        assert pairs.twin.errors == [None, None] and pairs.ours.errors[1] is None
        found.append(pairs.ours.errors[0])
        pairs.check()
    assert [k for k, error in enumerate(found) if error is not None] == [late]
    assert str(found[late]) == f"{LATE}{cause}"


@pytest.mark.parametrize("late", [0, 1, 2])
@every_norm
def test_another_rank_fails(norm_type: float, late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs(monkeypatch, norm_type=norm_type, max_grad_norm=1.0)
    pairs.run(grads_of_ranks(1))
    check_refusal(pairs, monkeypatch, lambda pair: fail(pair, 1), late)


@pytest.mark.parametrize("late", [0, 1])
@every_norm
def test_options_differ(norm_type: float, late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs(monkeypatch, norm_type=norm_type)
    pairs.run(grads_of_ranks(1))
    words = "clipping, skipping, or an option of a param group such as lr"
    cause = f"the ranks' options differ ({words})"
    check_refusal(pairs, monkeypatch, differ, late, cause)


@every_norm
def test_the_rank_on_the_device_fails(norm_type: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own error, and not that of a rank that was refused."""
    pairs = Pairs(monkeypatch, norm_type=norm_type)
    pairs.run(grads_of_ranks(1))
    before = pairs.ours.bits()
    for pair in pairs.both:
        fail(pair, 0)
        assert "another rank refused this step" in str(pair.errors[1])
    for old, now in zip(before, pairs.ours.bits(), strict=True):
        assert_same_bits(now, old, "a refused step has changed it")
    pairs.run(grads_of_ranks(2))


def test_refusals_that_nobody_has_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one error, and in between steps are done, skipped and counted as ever."""
    pairs = Pairs(monkeypatch)
    pairs.run(grads_of_ranks(1))
    answers_late(monkeypatch, 4)
    for pair in pairs.both:
        differ(pair)
        differ(pair)
    pairs.run(spoilt(2))
    assert pairs.ours.opts[0].skipped_steps.item() == 1
    pairs.run(grads_of_ranks(3))
    pairs.step(grads_of_ranks(4))
    assert pairs.twin.errors == [None, None]
    assert "the ranks' options differ" in str(pairs.ours.errors[0])
    pairs.check()
    pairs.run(grads_of_ranks(5))


def test_a_new_plan_has_heard_what_the_former_one_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = Pairs(monkeypatch)
    pairs.run(grads_of_ranks(1))
    answers_late(monkeypatch, 1)
    for pair in pairs.both:
        fail(pair, 1)
    assert pairs.ours.errors[0] is None
    pairs.ours.opts[0]._shared.drop_plans()
    pairs.step()
    assert "another rank refused" in str(pairs.ours.errors[0])
    pairs.check()


def test_a_scaler_reads_nothing_from_a_refused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flag has the answer of the step before until a step writes it."""
    pairs = Pairs(monkeypatch)
    pairs.run(grads_of_ranks(1))
    answers_late(monkeypatch, 1)
    flag = torch.ones((), device=device())
    pairs.ours.opts[0]._shared.amp.due = flag
    differ(pairs.ours)
    assert pairs.ours.errors[0] is None and flag.item() == 0.0


def test_what_kernels_write_to_is_never_freed() -> None:
    """A kernel of a plan that is gone may still be on its way."""
    words = module_of(backend()).driver().host_words
    first = words.taken_over(None)
    first.fill_(3)
    where, other = first.data_ptr(), words.taken_over(torch.ones(1, dtype=torch.int32))
    assert words.taken_over(first) is first and other.item() == 1
    assert first.is_pinned() == other.is_pinned() == real()
    del first, other
    assert where not in {words.taken_over(None).data_ptr() for _ in range(2000)}
    assert any(0 <= where - page.data_ptr() < page.nbytes for page in words._pages)


# ---- launches -----------------------------------------------------------------------------------


def kernels(call: Callable[[], Any], tmp_path: Path) -> list[str]:
    """Names by verb; copies are those of the meeting and of the table of inputs."""
    names = [name for name in device_work(call, tmp_path) if not name.startswith("Memcpy")]
    return [next(verb for verb in (*VERBS, "write") if verb in name) for name in names]


def test_three_launches_and_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs(monkeypatch, max_grad_norm=1.0)
    for step in range(2):
        pairs.run(grads_of_ranks(step))
    pairs.ours.step()
    before = len(pairs.ours.meeting.messages)
    assert kernels(pairs.ours.step, tmp_path) == ["reduce", "finalize", "update"]
    assert len(pairs.ours.meeting.messages) == before + 1
    assert pairs.ours.errors == [None, None]
    if not real():  # what a capture would hold: the table, too (test_gpu_processes.py has graphs)
        monkeypatch.setattr(module_of(backend()).driver(), "capturing", lambda device: True)
        write = ["write"] if backend() == "cuda" else []
        assert kernels(pairs.ours.step, tmp_path) == [*write, "reduce", "finalize", "update"]
        assert len(pairs.ours.meeting.messages) == before + 2
        assert pairs.ours.opts[0]._shared.plan.captured


def test_nobody_asks_so_there_is_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = Pairs(monkeypatch, skip_nonfinite=False)
    for step in range(2):
        pairs.run(grads_of_ranks(step))
    pairs.ours.step()
    assert kernels(pairs.ours.step, tmp_path) == ["finalize", "update"]
    assert not pairs.ours.meeting.messages
