"""Every line of code in an error message is run here, and helps.

A scene sets up what a message is about, in a namespace with the names that messages use (`param`,
`model`, `optimizer` ...). `fails` raises the message. Each line of code in it is then run in a
fresh scene, and `helps` has to work.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from protocol_helpers import fallback_is_expected
from raised_messages import raised
from torch.nn import Parameter

import fusedopt
from fusedopt import FusedAdamW

pytestmark = fallback_is_expected
Scene = SimpleNamespace

# Messages whose code is run by the tests of the build and of the report.
ELSEWHERE = ("serves instead",)


def step_of(scene: Scene) -> Callable[[], Any]:
    return lambda: scene.optimizer.step()


def trained(data: torch.Tensor) -> Parameter:
    param = Parameter(data)
    param.grad = torch.ones_like(param)
    return param


def constructing(data: torch.Tensor) -> Scene:
    """The parameter is refused by the constructor; afterwards it is made and stepped."""
    scene = Scene(param=Parameter(data))
    scene.fails = lambda: FusedAdamW([scene.param])

    def helps() -> None:
        if "optimizer" not in vars(scene):
            scene.optimizer = FusedAdamW([scene.param])
        if scene.param.requires_grad:
            scene.param.grad = torch.ones_like(scene.param)
        scene.optimizer.step()

    scene.helps = helps
    return scene


def stepping(param: Parameter, **options: Any) -> Scene:
    scene = Scene(param=param, optimizer=FusedAdamW([param], **options))
    scene.fails = scene.helps = step_of(scene)
    return scene


def two_tensor() -> torch.Tensor:
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    result: torch.Tensor = two.TwoTensor(torch.ones(3), torch.ones(3))
    return result


def wrapper_gradient() -> Scene:
    param = Parameter(torch.ones(3))
    param.grad_dtype = None  # type: ignore[attr-defined]
    scene = stepping(param)
    with torch._C.DisableTorchFunctionSubclass():
        param.grad = two_tensor()
    return scene


def mapping_state() -> Scene:
    class Mapping(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            return super().__getitem__(key)

    scene = stepping(trained(torch.ones(3)))
    scene.optimizer.state[scene.param] = Mapping()
    return scene


def lazy() -> Scene:
    model, inputs = torch.nn.LazyLinear(2), torch.ones(1, 3)
    optimizer = FusedAdamW(model.parameters())
    scene = Scene(model=model, inputs=inputs, optimizer=optimizer)
    scene.fails = scene.helps = step_of(scene)
    return scene


def meta() -> Scene:
    scene = Scene(model=torch.nn.Linear(2, 2, device="meta"))
    scene.fails = lambda: FusedAdamW(scene.model.parameters()).init_state()
    scene.helps = scene.fails
    return scene


def inference_param() -> Scene:
    with torch.inference_mode():
        data = torch.ones(3)
    scene = stepping(trained(data))

    def helps() -> None:
        scene.param.grad = torch.ones(3)
        FusedAdamW([scene.param]).step()

    scene.helps = helps
    return scene


def inference_state() -> Scene:
    scene = stepping(trained(torch.ones(3)))
    scene.optimizer.init_state()
    with torch.inference_mode():
        scene.optimizer.state[scene.param]["exp_avg"] = torch.zeros(3)
    return scene


def without_memory() -> Scene:
    scene = stepping(trained(torch.ones(3)))
    scene.values = torch.ones(3)
    scene.param.data = torch._efficientzerotensor(3)
    return scene


def freed_gradient() -> Scene:
    scene = stepping(trained(torch.ones(3)))
    scene.param.grad.untyped_storage().resize_(0)
    return scene


def sparse_gradient() -> Scene:
    scene = stepping(Parameter(torch.eye(3)))
    scene.param.grad = torch.eye(3).to_sparse()
    return scene


def gradient_dtype() -> Scene:
    scene = stepping(Parameter(torch.ones(3)))
    scene.param.grad_dtype = None
    scene.param.grad = torch.ones(3, dtype=torch.float64)
    return scene


def gradient_shape() -> Scene:
    scene = stepping(trained(torch.ones(3)))
    scene.param.data = torch.ones(4)
    return scene


def tied() -> Scene:
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = Parameter(first.weight.detach())
    scene = Scene(first=first, second=second)

    def step() -> None:
        params = dict.fromkeys([*first.parameters(), *second.parameters()])
        for param in params:
            param.grad = torch.ones_like(param)
        FusedAdamW(params).step()

    scene.fails = scene.helps = step
    return scene


def twice() -> Scene:
    param = trained(torch.ones(3))
    scene = Scene(params=[param, param])
    scene.fails = scene.helps = lambda: FusedAdamW(scene.params).step()
    return scene


def in_a_group(name: str, value: object) -> Scene:
    """An option of the whole optimizer, or one that is not supported, put into a group."""
    params = [trained(torch.ones(3))]
    scene = Scene(params=params, FusedAdamW=FusedAdamW)
    group: dict[str, Any] = {"params": params, name: value}
    scene.fails = lambda: FusedAdamW([group])

    def helps() -> None:
        """The line is an assignment to the option, or makes the optimizer."""
        for key in vars(scene).keys() & {name}:
            group[key] = vars(scene)[key]
            FusedAdamW([group]).step()

    scene.helps = helps
    return scene


def without(name: str) -> Scene:
    scene = stepping(trained(torch.ones(3)))
    del scene.optimizer.param_groups[0][name]
    return scene


def edited(edit: Callable[[torch.optim.Optimizer], None]) -> Scene:
    scene = stepping(trained(torch.ones(3)))
    edit(scene.optimizer)
    return scene


def fsdp1() -> Scene:
    scene = stepping(trained(torch.ones(3)), max_grad_norm=1.0)
    scene.param._fsdp_flattened = True
    scene.max_norm = 1.0
    params = [scene.param]
    scene.model = Scene(clip_grad_norm_=lambda n: torch.nn.utils.clip_grad_norm_(params, n))

    def helps() -> None:
        if scene.optimizer.max_grad_norm is None:
            scene.optimizer.step()

    scene.helps = helps
    return scene


def traced() -> Scene:
    scene = stepping(trained(torch.ones(3)))

    def fails() -> None:
        torch.func.vmap(lambda x: (scene.optimizer.step(), x)[1])(torch.zeros(3))

    scene.fails, scene.helps = fails, lambda: None
    return scene


def scale_of_two(name: str) -> Scene:
    scene = stepping(trained(torch.ones(3)))
    setattr(scene.optimizer, name, torch.ones(2))
    return scene


def tuple_of_groups(opt: Any) -> None:
    opt.param_groups = tuple(opt.param_groups)


def number_as_param(opt: Any) -> None:
    opt.param_groups[0]["params"].append(3)


def no_state(opt: Any) -> None:
    opt.state = None


SCENES: dict[str, Callable[[], Scene]] = {
    "is not supported, its memory": lambda: constructing(two_tensor()),
    "sparse parameters": lambda: constructing(torch.eye(3).to_sparse()),
    "complex parameters": lambda: constructing(torch.ones(3, dtype=torch.complex64)),
    "parameter dtype": lambda: constructing(torch.ones(3).to(torch.float8_e4m3fn)),
    "gradients of type": wrapper_gradient,
    "not a dict with a dict's own access": mapping_state,
    "is not initialized": lazy,
    "is on the meta device": meta,
    "param 0 .* was made in inference mode": inference_param,
    "state 'exp_avg' was made in inference mode": inference_state,
    r"has no memory \(a zero tensor": without_memory,
    "elements share memory": lambda: stepping(
        Parameter(torch.ones(1).expand(3)),
    ),
    "and .* share memory": tied,
    "does not support sparse gradients": sparse_gradient,
    "storage was resized to nothing": freed_gradient,
    "does not go with parameter dtype": gradient_dtype,
    "clear it after replacing": gradient_shape,
    "list each parameter once: ": twice,
    "it holds for all groups": lambda: in_a_group("max_grad_norm", 1.0),
    "differentiable=True is not supported": lambda: in_a_group("differentiable", True),
    "has no option": lambda: without("eps"),
    "is a tuple, not a list": lambda: edited(tuple_of_groups),
    "is no dict with a list of params": lambda: edited(lambda opt: opt.param_groups.append(3)),
    "not a tensor; take it out": lambda: edited(number_as_param),
    "starts all state anew": lambda: edited(no_state),
    "cannot be honoured for FSDP1 shards": fsdp1,
    "cannot be traced or faked": traced,
    "must be a number or a tensor of one element": lambda: scale_of_two("grad_scale"),
}


@pytest.mark.parametrize("words", SCENES)
def test_the_remedy_helps(words: str) -> None:
    lines = lines_of(SCENES[words](), words)
    assert lines
    for line in lines:
        scene = SCENES[words]()
        exec(line, {"torch": torch, "fusedopt": fusedopt}, vars(scene))
        scene.helps()


def lines_of(scene: Scene, words: str) -> list[str]:
    with pytest.raises((RuntimeError, TypeError, ValueError, KeyError), match=words) as caught:
        scene.fails()
    return re.findall(r"`([^`]+)`", str(caught.value))


def test_every_message_with_code_has_a_scene() -> None:
    messages = {text for text in raised() if "`" in text}
    filled_in = {words: re.sub(r"param 0|'exp_avg'|a tuple", "…", words) for words in SCENES}
    known = [*filled_in.values(), *ELSEWHERE]
    assert [m for m in messages if not any(re.search(words, m) for words in known)] == []
