"""The look at DTensors before each step: the watch in C++ and in Python see their local parts."""

# ruff: noqa: F811  (a fixture of another module)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_watch import Asked, make  # noqa: F401
from torch import Tensor

from fusedopt.backends.records import CODECS, GRAD, READY

dist = pytest.importorskip("torch.distributed")
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

Make = Callable[..., Any]


@pytest.fixture
def specs() -> Iterator[tuple[Any, Any]]:
    """Of a sharded vector and of a replicated one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        kinds = (Shard(0), Replicate())
        yield tuple(
            DTensor.from_local(torch.ones(4), mesh, [k], run_check=False)._spec for k in kinds
        )
    finally:
        dist.destroy_process_group()


def sharded(spec: Any, n: int = 4) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor(torch.ones(n), spec, requires_grad=False)


class Scene:
    """A parameter of several local elements, one of a single element, and one of none."""

    def __init__(self, make: Make, spec: Any, plain: bool = False) -> None:
        from torch.distributed.tensor import DTensor

        self.params: list[Any] = [torch.nn.Parameter(sharded(spec, n)) for n in (4, 1, 0)]
        for param in self.params:
            param.grad = sharded(param._spec, param._local_tensor.numel())
        if plain:
            self.params.append(torch.nn.Parameter(torch.ones(3)))
        self.groups = [{"params": self.params}]
        self.state: Any = {self.params[0]: {"exp_avg": sharded(spec)}}
        kinds = [READY] * len(self.params)
        self.watch = make(self.groups, self.state, kinds, DTensor)
        self.table = torch.zeros(len(self.params) * GRAD.size, dtype=torch.uint8)

    def look(self) -> list[int] | None:
        """The odd rows; the table has the addresses of the local parts of all others."""
        answer = self.watch.refresh(self.groups, self.state, self.table.data_ptr())
        if answer is None:
            return None
        odd, _, held = answer
        expected = b""
        for row, param in enumerate(self.params):
            assert held[row] is param.grad
            known: Any = None if row in odd else param.grad
            part: Tensor | None = getattr(known, "_local_tensor", known)
            record = (part.data_ptr(), CODECS[part.dtype], 1) if part is not None else (0, 0, 0)
            expected += GRAD.pack(*record)
        assert bytes(self.table.tolist()) == expected
        return list(odd)


@pytest.mark.parametrize("plain", [False, True], ids=["only-dtensors", "a-plain-tensor-beside"])
def test_gradients_are_those_of_the_local_parts(make: Make, specs: Any, plain: bool) -> None:
    spec, replicated = specs
    scene = Scene(make, spec, plain)
    first = scene.params[0]
    assert scene.look() == [] == scene.look()
    first.grad = sharded(first._spec)
    assert scene.look() == []
    first.grad._local_tensor = torch.zeros(4)
    assert scene.look() == []
    first.grad._spec = replicated
    assert scene.look() == [0], "the gradient has other placements"
    first.grad._spec = first._spec
    first.grad._local_tensor = torch.zeros(4, dtype=torch.float64)
    assert scene.look() == [0], "no kernel reads this dtype"
    del first.grad._local_tensor
    assert scene.look() == [0], "the gradient has no local part"


def elsewhere(s: Scene) -> None:
    s.params[0]._local_tensor = torch.ones(4)  # as FSDP2's reset_sharded_param does


def without_a_part(s: Scene) -> None:
    del s.params[0]._local_tensor


def of_another_shape(s: Scene) -> None:
    s.params[1]._local_tensor = torch.ones(2)


def state_elsewhere(s: Scene) -> None:
    s.state[s.params[0]]["exp_avg"]._local_tensor = torch.ones(4)


@pytest.mark.parametrize("change", [elsewhere, without_a_part, of_another_shape, state_elsewhere])
def test_a_plan_is_rebuilt_where_a_local_part_lies_elsewhere(
    make: Make,
    specs: Any,
    change: Callable[[Scene], None],
) -> None:
    scene = Scene(make, specs[0])
    assert scene.look() == []
    change(scene)
    assert scene.look() is None


def test_a_plan_is_rebuilt_for_other_placements(make: Make, specs: Any) -> None:
    scene = Scene(make, specs[0])
    scene.params[2]._spec = specs[1]
    assert scene.look() is None


def test_a_look_leaves_modes_and_subclasses_as_they_were(make: Make, specs: Any) -> None:
    """The native watch turns ``__torch_function__`` of subclasses off while it looks."""
    scene = Scene(make, specs[0])
    with Asked() as mode:
        assert scene.look() == []
    assert mode.calls >= len(scene.params)
    assert torch._C._is_torch_function_enabled()
    scene.watch.refresh(None, scene.state, scene.table.data_ptr())
    assert torch._C._is_torch_function_enabled()
