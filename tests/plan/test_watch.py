"""The look at the optimizer before each step: what it finds, in C++ and in Python alike."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import transposed
from conftest import require_cpu_backend
from fake_ranks import fake_ranks
from harness import make_param, randn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

from fusedopt.backends import modules
from fusedopt.backends.records import AWAITS_STATE, CODECS, GRAD, READY, STAGED
from fusedopt.backends.watch import PythonWatch


class Scene:
    """Groups and state of an optimizer, with a row of every kind."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """All anew: what a situation before has changed is gone."""
        matrix, image = randn((5, 3), 1), randn((2, 3, 4, 5), 2, torch.float16)
        self.matrix = make_param(matrix)
        self.image = make_param(image.to(memory_format=torch.channels_last))
        self.scalar = make_param(randn((), 3))
        self.column = make_param(randn((4, 1), 4, torch.bfloat16))
        self.empty = make_param(randn((0, 3), 5))
        self.gaps = make_param(randn((4, 6), 6)[:, ::2])
        self.new = make_param(randn((7,), 7))
        self.params = [self.matrix, self.image, self.scalar, self.column]
        self.params += [self.empty, self.gaps, self.new]
        self.kinds = [READY] * 5 + [STAGED, AWAITS_STATE]
        self.groups: Any = [
            {"params": self.params[:3], "lr": 0.1},
            {"params": self.params[3:], "lr": 0.2},
        ]
        self.state: Any = {
            p: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p.detach()), "note": 1}
            for p in self.params[:-1]
        }
        self.own: Any = self.state[self.matrix]
        del self.state[self.image]["note"]
        self.state["of the whole optimizer"] = 3.0
        for seed, param in enumerate(self.params[:-1]):
            self.give(param, seed)
        self.gaps.grad = randn((4, 6), 8)[:, ::2]

    @staticmethod
    def give(param: Tensor, seed: int = 9, dtype: torch.dtype | None = None) -> None:
        param.grad = torch.empty_like(param, dtype=dtype).copy_(randn(param.shape, seed))


class Marked(Tensor):
    pass


def kept(s: Scene) -> Iterator[tuple[str, list[int], int]]:
    """What the plan goes on with. Each situation begins with a fresh scene, and has the rows
    whose gradient is odd (the staged one always is), and how many have none."""
    yield "nothing", [5], 1
    for seed, param in enumerate(s.params[:-1]):
        s.give(param, 50 + seed)
    yield "new gradients", [5], 1
    s.scalar.grad = None
    yield "no gradient of one", [5], 2
    for param in s.params:
        param.grad = None
    yield "no gradients", [], 7
    s.give(s.matrix, dtype=torch.float16)
    s.give(s.scalar, dtype=torch.bfloat16)
    s.give(s.column, dtype=torch.float32)
    yield "gradients of other dtypes", [5], 1
    s.give(s.matrix, dtype=torch.float64)
    yield "a gradient of a dtype without kernels", [0, 5], 1
    s.matrix.grad = transposed(s.matrix.grad)
    yield "a transposed gradient", [0, 5], 1
    s.image.grad = s.image.grad.contiguous()
    yield "a contiguous gradient of channels_last", [1, 5], 1
    s.matrix.grad = torch.ones(()).expand(5, 3)
    yield "an expanded gradient", [0, 5], 1
    s.column.grad = s.column.grad.as_strided((4, 1), (1, 77))
    yield "a gradient with any stride over one element", [5], 1
    s.matrix.grad.data = torch.ones(4, 3)
    yield "a gradient of another shape, as torch itself would refuse", [0, 5], 1
    s.matrix.grad = s.matrix.grad.to_sparse()
    yield "a sparse gradient", [0, 5], 1
    s.matrix.grad = s.matrix.grad.as_subclass(Marked)
    yield "a gradient of a subclass", [0, 5], 1
    s.matrix.grad = torch.nn.Parameter(s.matrix.grad)
    yield "a gradient that is a parameter", [5], 1
    s.scalar.grad = torch.imag(torch.conj(torch.tensor(1 + 2j)))
    assert s.scalar.grad.is_neg() and s.scalar.grad.dtype == torch.float32
    yield "a negated gradient", [2, 5], 1
    s.matrix.grad = torch._efficientzerotensor(5, 3)
    yield "zeros without memory", [0, 5], 1
    s.matrix.grad = s.matrix.grad.to_sparse()
    s.image.grad = s.image.grad.contiguous()
    s.scalar.grad = torch.imag(torch.conj(torch.tensor(1 + 2j)))
    s.column.grad = None
    yield "odd gradients of many kinds", [0, 1, 2, 5], 2
    s.column.data = s.column.data.as_strided((4, 1), (1, 55))
    yield "a param with any stride over one element", [5], 1
    exp_avg = s.state[s.column]["exp_avg"]
    exp_avg.data = exp_avg.data.as_strided((4, 1), (1, 55))
    yield "a state with any stride over one element", [5], 1
    before = s.matrix.data
    s.matrix.data = before.clone()
    s.matrix.data = before
    yield "other memory, there and back", [5], 1
    with torch.no_grad():
        s.matrix.mul_(2.0)
        s.own["step"].add_(1)
        s.own["exp_avg"].fill_(3.0)
    yield "writes in place", [5], 1
    s.groups[0]["lr"] = 0.7
    s.groups[1]["betas"] = (0.1, 0.2)
    yield "hyper-parameters", [5], 1
    s.groups = [{**group, "params": tuple(group["params"])} for group in s.groups]
    yield "equal lists of the same params", [5], 1


def rebuilt(s: Scene) -> Iterator[str]:
    """After which the plan describes the optimizer no more. Each begins with a fresh scene."""
    s.matrix.data = s.matrix.data.clone()
    yield "param elsewhere"
    s.matrix.data = s.matrix.data.as_strided((5, 3), (1, 5))
    s.matrix.grad = None
    yield "param with other strides"
    s.matrix.data = s.matrix.data.view(3, 5)
    s.matrix.grad = None
    yield "param of another shape"
    s.matrix.data = s.matrix.data[:4]
    s.matrix.grad = None
    yield "param of fewer rows"
    s.column.data = s.column.data.view(torch.float16)
    s.column.grad = None
    yield "param of another dtype"
    s.matrix.untyped_storage().resize_(0)
    yield "param without memory, as FSDP does between two uses"
    s.give(s.new)
    yield "first gradient"
    s.groups[0]["params"][0] = make_param(s.matrix.detach())
    yield "another param"
    s.groups[1]["params"].pop()
    yield "fewer params"
    s.groups[1]["params"].append(make_param(randn(3, 1)))
    yield "more params"
    s.groups[0]["params"].reverse()
    yield "other order"
    s.groups[1]["params"].insert(0, s.groups[0]["params"].pop())
    yield "param in another group"
    s.groups.append({"params": []})
    yield "more groups"
    s.groups.pop()
    yield "fewer groups"
    s.groups = tuple(s.groups)
    yield "groups of no list"
    del s.groups[1]["params"]
    yield "group without params"
    s.groups[1]["params"] = set(s.groups[1]["params"])
    yield "group with a set of params"
    s.state = dict(s.state)
    yield "another state"
    s.state.clear()
    yield "no state"
    s.state = list(s.state.items())
    yield "state of no dict"
    s.state[s.matrix] = dict(s.own)
    yield "another entry"
    del s.state[s.scalar]
    yield "entry gone"
    s.state[s.new] = {}
    yield "entry come"
    s.state[s.matrix] = s.state.pop(s.matrix)
    yield "entries in another order"
    s.state["of all"] = s.state.pop("of the whole optimizer")
    yield "entry under another key"
    s.state["of the whole optimizer"] = 4.0
    yield "another value that is no entry"
    s.own["exp_avg"] = s.own["exp_avg"].clone()
    yield "state replaced"
    del s.own["exp_avg"]
    yield "state gone"
    s.own["exp_avg_sq"] = torch.ones(5, 3)
    yield "state come"
    s.own["momentum_buffer"] = s.own.pop("exp_avg")
    s.own["note"] = s.own.pop("note")
    yield "state renamed"
    s.own["step"] = s.own.pop("step")
    yield "states in another order"
    image = s.state[s.image]
    before = dict(image)
    image.clear()
    image["note"] = s.own.pop("note")
    image.update(before)
    yield "state in another entry: what all of them hold is the same, in the same order"
    s.own["note"] = 2
    yield "number replaced"
    s.own["exp_avg"].data = torch.zeros(5, 3)
    yield "state elsewhere"
    s.own["exp_avg"].data = s.own["exp_avg"].data.as_strided((5, 3), (1, 5))
    yield "state with other strides"
    s.own["exp_avg"].data = s.own["exp_avg"].data.view(torch.int32)
    yield "state of another dtype"


class Look:
    """A watch over a scene, and the table that it fills."""

    def __init__(self, make: Callable[..., Any], scene: Any) -> None:
        self.scene = scene
        self.watch = make(scene.groups, scene.state, scene.kinds, getattr(scene, "dtensor", None))
        self.table = torch.full((max(len(scene.params), 1) * GRAD.size,), 0x5A, dtype=torch.uint8)
        self.address = self.table.data_ptr()

    def hold(self) -> Any:
        return self.watch.refresh(self.scene.groups, self.scene.state, self.address)

    def refresh(self) -> tuple[list[int], int] | None:
        """The odd rows, and how many have no gradient; the table holds those of all others."""
        answer = self.hold()
        if answer is None:
            return None
        odd, absent, held = answer
        expected = b""
        for row, param in enumerate(self.scene.params):
            assert held[row] is param.grad or isinstance(param, Elsewhere)
            assert (row in absent) is (param.grad is None)
            grad = None if row in odd else param.grad
            part = getattr(grad, "_local_tensor", grad)
            record = (0, 0, 0) if grad is None else (part.data_ptr(), CODECS[grad.dtype], 1)
            expected += GRAD.pack(*record)
        assert bytes(self.table.tolist())[: len(expected)] == expected
        return odd, len(absent)


@pytest.fixture(params=["native", "python"])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Either watch's class."""
    if request.param == "python":
        return PythonWatch
    require_cpu_backend()
    native, _ = modules.load("_cpu")
    return native.Watch  # type: ignore[no-any-return]


def test_plan_is_kept(make: Callable[..., Any]) -> None:
    scene = Scene()
    look = Look(make, scene)  # before the situation, as in the step before
    for situation, odd, absent in kept(scene):
        for _ in range(2):
            assert look.refresh() == (odd, absent), situation
        scene.start()
        look = Look(make, scene)


def test_plan_is_rebuilt(make: Callable[..., Any]) -> None:
    scene = Scene()
    look = Look(make, scene)
    for situation in rebuilt(scene):
        assert look.hold() is None, situation
        scene.start()
        look = Look(make, scene)
        assert look.refresh() == ([5], 1)


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


def test_gradients_of_subclasses_of_parameter(make: Callable[..., Any]) -> None:
    for n in (0, 3):
        assert Look(make, one_param(Elsewhere(torch.ones(n)))).refresh() == ([0], 0)
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
    assert look.refresh() == ([5], 1)
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
    held = look.hold()[2]
    grads = [weakref.ref(p.grad) for p in scene.params if p.grad is not None]
    entries = [own for own in scene.state.values() if isinstance(own, dict)]
    tensors = [t for own in entries for t in own.values() if isinstance(t, Tensor)]
    states = [weakref.ref(t) for t in tensors]
    del entries, tensors, scene.own
    for param in scene.params:
        param.grad = None
    scene.state.clear()
    gc.collect()
    assert None not in [ref() for ref in grads + states]
    del held
    assert {ref() for ref in grads} == {None}
    look.watch = None  # which is another owner of small tensors
    assert {ref() for ref in states} == {None}


# ---- DTensors ------------------------------------------------------------------------------------


class ShardedScene(Scene):
    """Rank 0 of two, which has the first part of each tensor."""

    dtensor = DTensor

    def start(self) -> None:
        self.mesh = init_device_mesh("cpu", (2,))
        self.matrix, self.row, self.copy = (
            self.spread(randn(shape, seed), placement)
            for seed, (shape, placement) in enumerate(
                [((5, 3), Shard(0)), ((7,), Shard(0)), ((4, 2), Replicate())]
            )
        )
        self.plain = make_param(randn((3,), 4))
        self.params = [self.matrix, self.row, self.copy, self.plain]
        self.kinds = [READY] * 4
        self.groups = [{"params": self.params[:2]}, {"params": self.params[2:]}]
        self.state = {
            p: {"step": torch.tensor(1.0), "exp_avg": self.like(p, torch.float32)}
            for p in self.params
        }
        self.own = self.state[self.matrix]
        for param in self.params:
            self.hand(param, self.like(param, torch.float32))

    def spread(self, value: Tensor, placement: Any) -> Any:
        whole = distribute_tensor(value, self.mesh, [placement], src_data_rank=None)
        return make_param(whole)

    @staticmethod
    def like(param: Any, dtype: torch.dtype) -> Any:
        """Of the very same spec, as FSDP's gradients are."""
        if not isinstance(param, DTensor):
            return torch.ones_like(param, dtype=dtype)
        local = torch.ones_like(param._local_tensor, dtype=dtype)
        return DTensor(local, param._spec, requires_grad=False)

    @staticmethod
    def hand(param: Any, grad: Any) -> None:
        """Where torch would refuse such a gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            param.grad = grad


def kept_with_dtensors(s: ShardedScene) -> Iterator[tuple[str, list[int], int]]:
    yield "nothing", [], 0
    for param in s.params:
        s.hand(param, s.like(param, torch.bfloat16))
    yield "gradients of another dtype", [], 0
    s.matrix.grad = None
    yield "no gradient of one", [], 1
    before = s.matrix._local_tensor
    s.matrix._local_tensor = before.clone()
    s.matrix._local_tensor = before
    yield "another local tensor, there and back", [], 0
    s.matrix._local_tensor = s.matrix._local_tensor.detach()
    yield "another object on the same memory", [], 0
    s.hand(s.matrix, distribute_tensor(torch.ones(5, 3), s.mesh, [Shard(0)], src_data_rank=None))
    yield "a gradient of an equal spec", [0], 0
    s.hand(s.copy, DTensor.from_local(torch.ones(4, 2), s.mesh, [Partial()], run_check=False))
    yield "a partial sum", [2], 0
    s.hand(s.copy, torch.ones(4, 2))
    yield "a plain gradient that looks like the local tensor", [2], 0
    s.hand(s.plain, s.spread(torch.ones(3), Replicate()).detach())
    yield "a DTensor as gradient of a plain tensor", [3], 0
    s.matrix.grad._local_tensor = TwoTensor(torch.ones(3, 3), torch.ones(3, 3))
    yield "a gradient whose local tensor keeps its values elsewhere", [0], 0
    s.matrix.grad._local_tensor = transposed(torch.ones(3, 3))
    yield "a local gradient of other strides", [0], 0
    s.matrix.grad._local_tensor = torch.ones(2, 3)
    yield "a local gradient of another shape", [0], 0


def rebuilt_with_dtensors(s: ShardedScene) -> Iterator[str]:
    s.matrix._local_tensor = s.matrix._local_tensor.clone()
    yield "local tensor replaced"
    s.matrix._local_tensor = s.matrix._local_tensor[:2]
    yield "local tensor of fewer rows"
    s.matrix._local_tensor = s.matrix._local_tensor.to(torch.float16)
    yield "local tensor of another dtype"
    s.matrix._local_tensor = s.matrix._local_tensor.new_empty(0)
    yield "no local tensor, as FSDP between two uses"
    spec = s.matrix._spec
    s.matrix._spec = DTensorSpec(spec.mesh, spec.placements, tensor_meta=spec.tensor_meta)
    yield "another spec"
    s.own["exp_avg"]._local_tensor = torch.zeros(3, 3)
    yield "local tensor of a state replaced"
    s.own["exp_avg"] = s.own["exp_avg"]._local_tensor
    yield "a plain state on the same memory"
    s.groups[0]["params"][0] = torch.nn.Parameter(s.matrix.detach())
    yield "another parameter on the same local tensor"


def test_dtensors(make: Callable[..., Any]) -> None:
    """Their local tensors are looked at; the parameter and its state are those of the plan."""
    with fake_ranks(2):
        scene = ShardedScene()
        look = Look(make, scene)
        for situation, odd, absent in kept_with_dtensors(scene):
            for _ in range(2):
                assert look.refresh() == (odd, absent), situation
            scene.start()
            look = Look(make, scene)
        for situation in rebuilt_with_dtensors(scene):
            assert look.hold() is None, situation
            scene.start()
            look = Look(make, scene)


def test_a_step_holds_local_tensors_of_state(make: Callable[..., Any]) -> None:
    """And the plan does not: what is dropped between two steps is freed."""
    with fake_ranks(2):
        scene = ShardedScene()
        look = Look(make, scene)
        held = look.hold()[2]
        refs = [weakref.ref(scene.own["exp_avg"]._local_tensor), weakref.ref(scene.matrix.grad)]
        scene.own["exp_avg"]._local_tensor = torch.zeros(3, 3)
        scene.matrix.grad = None
        del held, scene.own
        look.watch = None
        gc.collect()
        assert [ref() for ref in refs] == [None, None]
