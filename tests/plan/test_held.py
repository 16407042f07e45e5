"""The step uses what it began with, whoever drops it meanwhile, and keeps none of it afterwards."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from step_scenes import Scene, difference, served_by

_served_by = served_by
every_verb = pytest.mark.parametrize("verb", ["begin", "reduce", "exchange", "finalize", "update"])


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


def grads_of(scene: Scene) -> list[weakref.ref[Any]]:
    grads = [p.grad for p in scene.params if p.grad is not None]
    return [weakref.ref(each) for grad in grads for each in (grad, grad.untyped_storage())]


def drop_grads(scene: Scene) -> None:
    for param in scene.params:
        param.grad = None


@every_verb
@pytest.mark.parametrize("states_live", [True, False])
def test_a_step_uses_what_it_began_with(verb: str, states_live: bool, served_by: str) -> None:
    """And holds it until it is over."""
    scene, twin = [Scene("adamw", served_by, max_grad_norm=1.0) for _ in range(2)]
    twin.opt.step()
    states = {p: dict(own) for p, own in scene.opt.state.items() if states_live}
    versions = [p._version for p in scene.params]
    began_with = [p.grad is not None for p in scene.params]
    grads, alive = grads_of(scene), []

    def drop_all() -> None:
        for i, param in enumerate(scene.params):
            param.grad = None if i % 2 else torch.full_like(param, 100.0)
        scene.opt.state.clear()
        alive.extend(ref() is not None for ref in grads)

    with meanwhile(scene, verb, drop_all):
        scene.opt.step()
    assert alive and all(alive)
    assert {ref() for ref in grads} == {None}
    scene.opt.state.update(states)
    differ = difference(scene.values(), twin.values())
    assert [name for name in differ if states_live or name.startswith("param")] == []
    moved = [p._version > v for p, v in zip(scene.params, versions, strict=True)]
    assert moved == began_with


@every_verb
def test_an_error_keeps_no_gradient(verb: str, served_by: str) -> None:
    scene = Scene("sgd", served_by, max_grad_norm=1.0)
    grads = grads_of(scene)

    def act() -> None:
        raise KeyError("in between")

    with meanwhile(scene, verb, act), pytest.raises(KeyError) as error:
        scene.opt.step()
    drop_grads(scene)
    assert error.tb is not None  # the frames of the step are alive
    assert {ref() for ref in grads} == {None}


def test_a_refusal_keeps_no_gradient(served_by: str) -> None:
    scene = Scene("sgd", served_by)
    grads = grads_of(scene)
    last = scene.params[-1]
    assert last.grad is not None
    last.grad = last.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse") as error:
        scene.opt.step()
    drop_grads(scene)
    assert error.tb is not None
    assert {ref() for ref in grads} == {None}


def test_no_gradient_is_kept_after_a_step(served_by: str) -> None:
    scene = Scene("sgd", served_by, max_grad_norm=1.0)
    scene.opt.step()
    grads = grads_of(scene)
    drop_grads(scene)
    assert {ref() for ref in grads} == {None}


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
