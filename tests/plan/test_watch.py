"""The look at the optimizer before each step: what it finds, in C++ and in Python alike."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import require_cpu_backend
from torch import Tensor
from torch.overrides import TorchFunctionMode
from watch_scenes import KEPT, REBUILT, Scene, nothing

from fusedopt.backends import modules
from fusedopt.backends.records import CODECS, GRAD, READY
from fusedopt.backends.watch import PythonWatch


class Look:
    """A watch over a scene, and the table that it fills."""

    def __init__(self, make: Callable[..., Any], scene: Any) -> None:
        self.scene = scene
        self.watch = make(scene.groups, scene.state, scene.kinds)
        self.table = torch.full((max(len(scene.params), 1) * GRAD.size,), 0x5A, dtype=torch.uint8)
        self.address = self.table.data_ptr()

    def hold(self) -> Any:
        return self.watch.refresh(self.scene.groups, self.scene.state, self.address)

    def refresh(self) -> tuple[list[int], int] | None:
        answer = self.hold()
        if answer is None:
            return None
        odd, absent, held = answer
        for row, param in enumerate(self.scene.params):
            assert held[row] is param.grad or isinstance(param, Elsewhere)
            assert (row in absent) is (param.grad is None)
        return odd, len(absent)

    def assert_table(self, odd: list[int]) -> None:
        expected = b""
        for row, param in enumerate(self.scene.params):
            grad = None if row in odd else param.grad
            record = (0, 0, 0) if grad is None else (grad.data_ptr(), CODECS[grad.dtype], 1)
            expected += GRAD.pack(*record)
        assert bytes(self.table.tolist()) == expected


@pytest.fixture(params=["native", "python"])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Either watch's class."""
    if request.param == "python":
        return PythonWatch
    require_cpu_backend()
    native, _ = modules.load("_cpu")
    return native.Watch  # type: ignore[no-any-return]


def named(value: Any) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize("change", KEPT, ids=named)
def test_plan_is_kept(make: Callable[..., Any], change: Callable[[Scene], None]) -> None:
    look = Look(make, Scene())
    change(look.scene)
    for _ in range(2):
        assert look.refresh() == KEPT[change]
        look.assert_table(KEPT[change][0])


@pytest.mark.parametrize("change", REBUILT, ids=named)
def test_plan_is_rebuilt(make: Callable[..., Any], change: Callable[[Scene], None]) -> None:
    look = Look(make, Scene())
    assert look.refresh() is not None
    change(look.scene)
    assert look.refresh() is None


def one_param(param: Tensor) -> Any:
    scene = {"params": [param], "groups": [{"params": [param]}], "state": {}, "kinds": [READY]}
    return SimpleNamespace(**scene)


class Elsewhere(torch.nn.Parameter):
    """Where torch would refuse such a gradient."""

    @property
    def grad(self) -> Any:
        return torch.ones(self.shape, device="meta")


class Without(torch.nn.Parameter):
    @property
    def grad(self) -> Any:
        raise RuntimeError("no gradient today")


@pytest.mark.parametrize("n", [0, 3])
def test_gradient_on_another_device(make: Callable[..., Any], n: int) -> None:
    look = Look(make, one_param(Elsewhere(torch.ones(n))))
    assert look.refresh() == ([0], 0)
    look.assert_table([0])


def test_param_that_refuses_its_gradient(make: Callable[..., Any]) -> None:
    assert Look(make, one_param(Without(torch.ones(3)))).refresh() is None


class Asked(TorchFunctionMode):
    """Such a mode as ``torch.set_default_device`` installs: every call goes through it."""

    calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_a_look_goes_past_torch_function_modes(make: Callable[..., Any]) -> None:
    """But for each param's ``.grad``, and whether what has a single element is negated."""
    look = Look(make, Scene())
    with Asked() as mode:
        assert look.hold() is not None
    assert mode.calls == len(look.scene.params) + 2


def test_state_that_has_no_place_counts_by_identity(make: Callable[..., Any]) -> None:
    scene = Scene()
    scene.own["sparse"] = torch.eye(3).to_sparse()
    look = Look(make, scene)
    assert look.refresh() == KEPT[nothing]
    scene.own["sparse"] = torch.eye(3).to_sparse()
    assert look.refresh() is None


@pytest.mark.parametrize("n_groups", [0, 1])
def test_no_params(make: Callable[..., Any], n_groups: int) -> None:
    groups = [{"params": []} for _ in range(n_groups)]
    look = Look(make, SimpleNamespace(params=[], groups=groups, state={}, kinds=[]))
    assert look.refresh() == ([], 0)
    assert set(look.table.tolist()) == {0x5A}, "written to a table without rows"
    if groups:
        groups[0]["params"] = None
        assert look.refresh() is None


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (one_param(torch.eye(3).to_sparse()), "not a strided tensor"),
        (SimpleNamespace(groups=[{}], state={}, kinds=[], params=[]), "group 0 has no list"),
        (SimpleNamespace(groups=[[]], state={}, kinds=[], params=[]), "group 0 has no list"),
        (SimpleNamespace(**{**vars(one_param(torch.ones(3))), "kinds": []}), "fewer row kinds"),
        (SimpleNamespace(groups=[], state={}, kinds=[READY], params=[]), "more row kinds"),
    ],
    ids=["sparse", "no-params", "no-dict", "few-kinds", "many-kinds"],
)
def test_what_cannot_be_watched(make: Callable[..., Any], scene: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        Look(make, scene)


def test_what_a_step_holds_lives_until_it_is_released(make: Callable[..., Any]) -> None:
    look = Look(make, Scene())
    scene = look.scene
    answer = look.hold()
    assert answer is not None
    held = answer[2]
    grads = [weakref.ref(p.grad) for p in scene.params if p.grad is not None]
    states = [weakref.ref(t) for own in scene.state.values() for t in tensors_in(own)]
    for param in scene.params:
        param.grad = None
    scene.state.clear()
    gc.collect()
    assert None not in [ref() for ref in grads + states]
    del answer, held
    assert {ref() for ref in grads} == {None}
    look.watch = None  # which is another owner of small tensors
    assert {ref() for ref in states} == {None}


def tensors_in(own: Any) -> list[Tensor]:
    return [t for t in own.values() if isinstance(t, Tensor)] if isinstance(own, dict) else []


def test_gradients_are_not_kept_alive(make: Callable[..., Any]) -> None:
    look = Look(make, Scene())
    look.refresh()
    scene = look.scene
    alive = weakref.ref(scene.matrix.grad)
    scene.matrix.grad = None
    assert alive() is None
    states = weakref.ref(scene.own["exp_avg"])
    del look, scene
    gc.collect()
    assert states() is None
