"""Every line of code in an error message is run here, and helps.

A scene sets up what a message is about, in a namespace with the names that messages use (`param`,
`model`, `optimizer` ...). `fails` raises the message. Each line of code in it is then run in a
fresh scene, and `helps` has to work.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from protocol_helpers import fallback_is_expected
from raised_messages import raised
from torch.nn import Parameter

import fusedopt
from fusedopt import FusedAdamW, FusedLion, FusedSGD

pytestmark = fallback_is_expected
Scene = SimpleNamespace

# Messages whose code is run by other tests.
ELSEWHERE = {
    "serves instead": "`python -m fusedopt`, by tests/installation/test_report.py",
    "weights and biases that FSDP made into one": "tests/param_groups/test_param_groups_shards.py",
    "cannot use this GPU": "backend='reference', by the scene of 'cannot serve'",
    "Triton cannot compile": "the same",
}


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


class DictOfItsOwn(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)


def state_replaced(by: object) -> Scene:
    scene = stepping(trained(torch.ones(3)))
    scene.optimizer.state[scene.param] = by
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
        scene = stepping(trained(torch.ones(3)))

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


def twice(named: bool = False) -> Scene:
    param = trained(torch.ones(3))
    scene = Scene(params=[("a", param), ("b", param)] if named else [param, param])
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


def without(name: str, **options: Any) -> Scene:
    scene = stepping(trained(torch.ones(3)), **options)
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


# Checkpoints, and state that was edited


def loading(edit: Callable[[dict[str, Any]], None], **options: Any) -> Scene:
    """A checkpoint of a trained optimizer that was edited; loaded, then stepped on."""
    source = FusedAdamW([trained(torch.ones(3))])
    source.step()
    scene = Scene(state_dict=copy.deepcopy(source.state_dict()))
    edit(scene.state_dict)
    optimizer = FusedAdamW([trained(torch.ones(3))], **options)

    def load() -> None:
        optimizer.load_state_dict(scene.state_dict)
        optimizer.step()

    scene.fails = scene.helps = load
    return scene


def state_edited(edit: Callable[[dict[str, Any]], None]) -> Scene:
    scene = stepping(trained(torch.ones(3)))
    scene.optimizer.step()
    edit(scene.optimizer.state[scene.param])
    return scene


def without_moment(state: dict[str, Any]) -> None:
    del state["exp_avg_sq"]


def list_as_moment(state: dict[str, Any]) -> None:
    state["exp_avg"] = [0.0, 0.0, 0.0]


def negative_step(state: dict[str, Any]) -> None:
    state["step"] = -1.0


def freed_moment(state: dict[str, Any]) -> None:
    state["exp_avg"].untyped_storage().resize_(0)


def other_shape(state: dict[str, Any]) -> None:
    state["exp_avg"] = torch.zeros(4)


def in_checkpoint(edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda state_dict: edit(state_dict["state"][0])


def of_sgd(state_dict: dict[str, Any]) -> None:
    state_dict["state"] = {}
    for name in ("betas", "eps"):
        del state_dict["param_groups"][0][name]


def two_tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(0.9), torch.tensor(0.99)


def of_radam(state_dict: dict[str, Any]) -> None:
    del state_dict["param_groups"][0]["amsgrad"]


def string_key(state_dict: dict[str, Any]) -> None:
    state_dict["state"] = {"0": state_dict["state"][0]}


def of_adamw() -> Scene:
    source = FusedAdamW([trained(torch.ones(3))])
    source.step()
    scene = Scene(state_dict=source.state_dict())
    optimizer = FusedLion([trained(torch.ones(3))])

    def load() -> None:
        optimizer.load_state_dict(scene.state_dict)
        optimizer.step()

    scene.fails = scene.helps = load
    return scene


def key_twice() -> Scene:
    params = [trained(torch.ones(3)), trained(torch.ones(3))]
    optimizer = FusedAdamW(params)
    optimizer.step()
    scene = Scene(state_dict=copy.deepcopy(optimizer.state_dict()))
    scene.state_dict["param_groups"][0]["params"] = [0, 0]
    scene.fails = scene.helps = lambda: optimizer.load_state_dict(scene.state_dict)
    return scene


def of_apex(state_dict: dict[str, Any]) -> None:
    del state_dict["state"][0]["step"]
    state_dict["param_groups"][0]["step"] = 1


def no_dict(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0] = 7


def coupled_checkpoint() -> Scene:
    """A warning, made an error here."""
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    params = [trained(torch.ones(3))]
    scene = Scene(params=params, FusedSGD=functools.partial(FusedSGD, **arguments))
    scene.state_dict = torch.optim.SGD(params, **arguments).state_dict()

    def load() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            FusedSGD(params, **arguments).load_state_dict(scene.state_dict)

    def helps() -> None:
        """The line has made the optimizer, or has edited the checkpoint."""
        if "decoupled_weight_decay" in scene.state_dict["param_groups"][0]:
            load()

    scene.fails, scene.helps = load, helps
    return scene


# Backends, scalers, param_groups


def double(backend: str) -> Scene:
    params = [trained(torch.ones(3, dtype=torch.float64))]
    scene = Scene(params=params, backend=backend)
    scene.fails = scene.helps = lambda: FusedAdamW(params, backend=scene.backend).step()
    return scene


def wrapped_scaler() -> Scene:
    scene = Scene(wrapper=SimpleNamespace(scaler=torch.amp.GradScaler("cpu")))
    scene.fails = lambda: fusedopt.fuse_scaler(scene.wrapper)
    scene.helps = lambda: None
    return scene


def grouping(model: Any, weight_decay: Any = 0.01) -> Scene:
    scene = Scene(model=torch.nn.Linear(2, 2), inputs=torch.ones(1, 3), weight_decay=weight_decay)
    if isinstance(model, torch.nn.Module):
        scene.model = model
    scene.fails = lambda: fusedopt.param_groups(model, scene.weight_decay)
    scene.helps = lambda: fusedopt.param_groups(scene.model, scene.weight_decay)
    return scene


def groups_replaced(by: Callable[[list[Any]], Any]) -> Scene:
    scene = edited(lambda opt: vars(opt).update(param_groups=by(opt.param_groups)))
    scene.params = [scene.param]
    return scene


def number_as_param(opt: Any) -> None:
    opt.param_groups[0]["params"].append(3)


def no_state(opt: Any) -> None:
    opt.state = None


SCENES: dict[str, Callable[[], Scene]] = {
    "is not supported, its memory": lambda: constructing(two_tensor()),
    "nested parameters": lambda: constructing(torch.nested.nested_tensor([torch.ones(2)])),
    "nested parameters are": lambda: constructing(
        torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    ),
    "sparse parameters": lambda: constructing(torch.eye(3).to_sparse()),
    "complex parameters": lambda: constructing(torch.ones(3, dtype=torch.complex64)),
    "parameter dtype": lambda: constructing(torch.ones(3).to(torch.float8_e4m3fn)),
    "gradients of type": wrapper_gradient,
    "not a dict with a dict's own access": lambda: state_replaced(DictOfItsOwn()),
    "state is a mappingproxy, not a dict": lambda: state_replaced(MappingProxyType({})),
    "state is a NoneType, not a dict": lambda: state_replaced(None),
    "state is a int, not a dict": lambda: state_replaced(3),
    "state is a list, not a dict": lambda: state_replaced([3]),
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
    "list each parameter once": lambda: twice(named=True),
    "it holds for all groups": lambda: in_a_group("max_grad_norm", 1.0),
    "max_grad_norm=inf in param group 0": lambda: in_a_group("max_grad_norm", float("inf")),
    "differentiable=True is not supported": lambda: in_a_group("differentiable", True),
    "has no option": lambda: without("eps"),
    "has no option 'lr'": lambda: without("lr", lr=torch.tensor(0.1)),
    "is a tuple, not a list": lambda: groups_replaced(tuple),
    "is a NoneType, not a list": lambda: groups_replaced(lambda groups: None),
    "is a dict, not a list": lambda: groups_replaced(lambda groups: dict(enumerate(groups))),
    "is no dict with a list of params": lambda: edited(lambda opt: opt.param_groups.append(3)),
    "not a tensor; take it out": lambda: edited(number_as_param),
    "starts all state anew": lambda: edited(no_state),
    "cannot be honoured for FSDP1 shards": fsdp1,
    "cannot be traced or faked": traced,
    "must be a number or a tensor of one element": lambda: scale_of_two("grad_scale"),
    "state_dict has no 'betas', 'eps'": lambda: loading(of_sgd),
    "state_dict has no 'betas', 'eps': it is": lambda: loading(of_sgd, betas=two_tensors()),
    "JSON, for one, makes strings": lambda: loading(string_key),
    "of a parameter before it": key_twice,
    "state_dict has no 'amsgrad'": lambda: loading(of_radam),
    "counts the steps of a group": lambda: loading(of_apex),
    "state of one parameter must be a dict": lambda: loading(no_dict),
    "state has .*, which another": of_adamw,
    "state has .* and lacks": lambda: state_edited(without_moment),
    "state has 'exp_avg', 'step' and lacks": lambda: loading(in_checkpoint(without_moment)),
    "not a plain tensor of floating-point numbers": lambda: state_edited(list_as_moment),
    "a list, not a plain tensor": lambda: loading(in_checkpoint(list_as_moment)),
    "has to be a number of steps": lambda: state_edited(negative_step),
    "-1.0, and has to be a number": lambda: loading(in_checkpoint(negative_step)),
    "state 'exp_avg' has no memory": lambda: state_edited(freed_moment),
    "give it that shape": lambda: state_edited(other_shape),
    r"state 'exp_avg' has shape \(4,\)": lambda: loading(in_checkpoint(other_shape)),
    "has no decoupled_weight_decay": coupled_checkpoint,
    "cannot serve": lambda: double("cpu"),
    "scaler must be a torch.amp.GradScaler": wrapped_scaler,
    "model must be a torch.nn.Module": lambda: grouping(torch.nn.Linear(2, 2).parameters()),
    "weight_decay must be a float": lambda: grouping(torch.nn.Linear(2, 2), None),
    "weight_decay must be at least 0": lambda: grouping(torch.nn.Linear(2, 2), float("nan")),
    "of a lazy module has no shape": lambda: grouping(torch.nn.LazyLinear(2)),
}


@pytest.mark.parametrize("words", SCENES)
def test_the_remedy_helps(words: str) -> None:
    lines = lines_of(SCENES[words](), words)
    assert lines
    for line in lines:
        scene = SCENES[words]()
        vars(scene).update(torch=torch, fusedopt=fusedopt)
        exec(line, vars(scene))
        scene.helps()


def lines_of(scene: Scene, words: str) -> list[str]:
    errors = (RuntimeError, TypeError, ValueError, KeyError, UserWarning)
    with pytest.raises(errors, match=words) as caught:
        scene.fails()
    return re.findall(r"`([^`]+)`", str(caught.value))


def test_every_message_with_code_has_a_scene() -> None:
    messages = {text for text in raised() if "`" in text}
    filled_in = [
        re.sub(r"param 0 \.\*|'betas', 'eps'|'exp_avg'|tuple|\.\*", "…", words) for words in SCENES
    ]
    known = [*filled_in, *ELSEWHERE]
    assert [m for m in messages if not any(re.search(words, m) for words in known)] == []
