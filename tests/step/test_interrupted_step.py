"""A step that is interrupted anywhere, by a signal or an error, has been taken or has not.

A signal's handler runs where a function of Python begins, and after a call of one of C. So the
exception is raised at every such place in turn; at one that is reached for each parameter, the
first time and the last.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType
from typing import Any

import cuda_shim
import pytest
import torch
from protocol_helpers import every_kind
from step_scenes import Scene, difference, same, served_by

from fusedopt.backends.device import DevicePlan

shim = pytest.fixture(cuda_shim.fixture)
_served_by = served_by


class Stop(Exception):
    """As a handler of SIGALRM may raise; KeyboardInterrupt is no Exception."""


ERRORS = {"adamw": KeyboardInterrupt, "sgd": Stop}


class Interrupt:
    """Raises at the given event of the code below; notes where each event was."""

    def __init__(self, at: int | None, error: type[BaseException]) -> None:
        self.at, self.error = at, error
        self.places: list[Any] = []
        self.before = sys.getprofile()

    def __enter__(self) -> Interrupt:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)
        torch.set_grad_enabled(True)  # an interrupted `no_grad` leaves it off, here as in all torch

    def _profile(self, frame: Any, event: str, _: object) -> None:
        if event not in ("call", "c_return") or frame.f_code.co_filename == __file__:
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # it may be at its end, where an error is only printed
        is_here = len(self.places) == self.at
        self.places.append((event, *calls_to(frame)) if self.at is None else None)
        if is_here:
            sys.setprofile(None)
            raise self.error

    def first_and_last(self) -> list[int]:
        """Of the events in each place."""
        last = {place: at for at, place in enumerate(self.places)}
        first = {place: at for at, place in reversed([*enumerate(self.places)])}
        return sorted({*first.values(), *last.values()})


def calls_to(frame: Any) -> Iterator[tuple[CodeType, int]]:
    """Which instructions of which functions have led there from the test."""
    while frame.f_code.co_filename != __file__:
        yield frame.f_code, frame.f_lasti
        frame = frame.f_back


OPTIONS: dict[str, dict[str, Any]] = {
    "measured": {"max_grad_norm": 1.0},
    "plain": {},
    "skipped": {"skip_nonfinite": True},
    "rebuilt": {"max_grad_norm": 1.0},
}


def make(kind: str, backend: str, options: str) -> Scene:
    scene = Scene(kind, backend, **OPTIONS[options])
    if options == "skipped":
        scene.params[0].grad[1, 1] = torch.inf
    if options == "rebuilt":
        scene.opt._shared.drop_plans()
    return scene


@every_kind
@pytest.mark.parametrize("options", OPTIONS)
def test_all_or_nothing(kind: str, options: str, served_by: str) -> None:
    check(kind, options, served_by)


@every_kind
def test_all_devices_or_none(
    kind: str, shim: cuda_shim.CudaShim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The devices are two names of the CPU, as in tests/cuda/test_cuda_parts.py."""
    devices = (torch.device("cpu"), torch.device("cpu", 0))
    monkeypatch.setattr(
        DevicePlan, "device_of", lambda plan, row: devices[plan.rows.index(row) % 2]
    )
    check(kind, "measured", "cuda")


def check(kind: str, options: str, served_by: str) -> None:
    error = ERRORS[kind]
    whole = make(kind, served_by, options)
    before = whole.values()
    with Interrupt(None, error) as noted:
        whole.opt.step()
    after = whole.values()
    assert not same(before, after)
    taken = []
    places = noted.first_and_last()
    if options == "rebuilt":  # many, and alike for both kinds: each takes others of them
        places = places[2 * list(ERRORS).index(kind) :: 5]
    for at in places:
        scene = make(kind, served_by, options)
        assert same(scene.values(), before)
        versions = [p._version for p in scene.params]
        with suppress(error), Interrupt(at, error) as interrupt:
            scene.opt.step()
        assert len(interrupt.places) > at
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), at
        values = scene.values()
        is_taken = same(values, after)
        assert is_taken or same(values, before), (at, difference(values, after))
        if is_taken:
            active = [i for i in range(len(versions)) if scene.params[i].grad is not None]
            assert all(scene.params[i]._version > versions[i] for i in active), at
        taken.append(is_taken)
        # and the next step is right
        if not is_taken:
            scene.opt.step()
            assert same(scene.values(), after), at
    assert len(taken) > 50 and set(taken) == {True, False}
