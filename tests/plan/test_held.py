"""The step uses what it began with, whoever drops it meanwhile, and keeps none of it afterwards."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from protocol_helpers import every_kind
from step_scenes import Scene, difference, served_by
from torch import Tensor

_served_by = served_by
VERBS = ("begin", "reduce", "exchange", "finalize", "update")


@contextmanager
def meanwhile(scene: Scene, verb: str, act: Callable[[], None]) -> Iterator[None]:
    """What another thread does before one of the plan's verbs runs."""
    plan = scene.opt._shared.plan
    real = getattr(plan, verb)

    def first_act(*args: Any) -> None:
        act()
        real(*args)

    setattr(plan, verb, first_act)
    yield
    delattr(plan, verb)


def grads_of(scene: Scene) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(p.grad) for p in scene.params if p.grad is not None]


def drop_all(scene: Scene) -> None:
    for i, param in enumerate(scene.params):
        param.grad = None if i % 2 else torch.full_like(param, 100.0)
    scene.opt.state.clear()


@every_kind
@pytest.mark.parametrize("verb", VERBS)
def test_a_step_uses_what_it_began_with(kind: str, verb: str, served_by: str) -> None:
    scene, twin = [Scene(kind, served_by, max_grad_norm=1.0) for _ in range(2)]
    twin.opt.step()
    states = {p: dict(own) for p, own in scene.opt.state.items()}
    versions = [p._version for p in scene.params]
    began_with = [p.grad is not None for p in scene.params]
    with meanwhile(scene, verb, lambda: drop_all(scene)):
        scene.opt.step()
    scene.opt.state.update(states)
    assert difference(scene.values(), twin.values()) == []
    moved = [p._version > v for p, v in zip(scene.params, versions, strict=True)]
    assert moved == began_with


@every_kind
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_dropped_lives_until_the_step_is_over(kind: str, verb: str, served_by: str) -> None:
    scene = Scene(kind, served_by, max_grad_norm=1.0)
    grads = grads_of(scene)
    alive = []

    def act() -> None:
        drop_all(scene)
        gc.collect()
        alive.extend(ref() is not None for ref in grads)

    with meanwhile(scene, verb, act):
        scene.opt.step()
    assert alive and all(alive)
    assert [ref() for ref in grads] == [None] * len(grads)


@every_kind
@pytest.mark.parametrize("verb", VERBS)
def test_an_error_keeps_no_gradient(kind: str, verb: str, served_by: str) -> None:
    scene = Scene(kind, served_by, max_grad_norm=1.0)
    grads = grads_of(scene)

    def act() -> None:
        raise KeyError("in between")

    with meanwhile(scene, verb, act), pytest.raises(KeyError) as error:
        scene.opt.step()
    for param in scene.params:
        param.grad = None
    assert error.tb is not None  # the frames of the step are alive
    assert [ref() for ref in grads] == [None] * len(grads)


@every_kind
def test_a_refusal_keeps_no_gradient(kind: str, served_by: str) -> None:
    scene = Scene(kind, served_by)
    last = scene.params[-1]
    assert last.grad is not None
    last.grad = last.grad.to_sparse()
    grads = grads_of(scene)
    with pytest.raises(RuntimeError, match="sparse"):
        scene.opt.step()
    for param in scene.params:
        param.grad = None
    assert [ref() for ref in grads] == [None] * len(grads)


@every_kind
def test_no_gradient_is_kept_after_a_step(kind: str, served_by: str) -> None:
    scene = Scene(kind, served_by, max_grad_norm=1.0)
    scene.opt.step()
    grads = grads_of(scene)
    storages = [weakref.ref(p.grad.untyped_storage()) for p in scene.params if p.grad is not None]
    for param in scene.params:
        param.grad = None
    assert [ref() for ref in [*grads, *storages]] == [None] * 2 * len(grads)


def test_two_threads_take_turns(served_by: str) -> None:
    """The tables of a plan are for one step at a time."""
    scene = Scene("adamw", served_by)
    free: list[bool] = []

    def ask() -> None:
        free.append(scene.opt._shared.turn.acquire(blocking=False))

    def act() -> None:
        other = threading.Thread(target=ask)
        other.start()
        other.join()

    with meanwhile(scene, "update", act):
        scene.opt.step()
    assert free == [False]
    act()
    assert free == [False, True]
