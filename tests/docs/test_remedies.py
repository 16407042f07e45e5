"""Every line of code in an error message is run here, and helps.

A scene sets up what a message is about, and has the names that messages use (`param`, `model`,
`optimizer` ...). `fails` raises the message. Each line of code in it is then run in a fresh scene,
and `helps` has to work.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from fake_ranks import fake_ranks
from protocol_helpers import fallback_is_expected
from raised_messages import raised
from torch.nn import Parameter

import fusedopt
from fusedopt import FusedAdamW, FusedLion, FusedSGD

pytestmark = fallback_is_expected


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with fake_ranks(1):
        yield


# Messages whose code is run by other tests.
ELSEWHERE = {
    "make it whole, on all ranks": "tests/distributed/test_checkpoint_plain.py",
    "serves instead": "`python -m fusedopt`, by tests/installation/test_report.py",
    "weights and biases that FSDP made into one": "tests/param_groups/test_param_groups_shards.py",
    "cannot use this GPU": "backend='reference', by the scene of 'cannot serve'",
    "Triton cannot compile": "the same",
    "share of a ZeroRedundancyOptimizer": "tests/distributed/test_engines_ddp.py",
    "would see scaled gradients": "tests/distributed/test_engines_scalers.py",
    "their scales may differ": "fuse_scaler, by the same",
    "its states in the checkpoint depend on": "tests/distributed/test_checkpoint_traps.py",
    # Of several ranks.
    "is a plain tensor beside DTensors": "tests/distributed/test_replicated.py",
    "was pickled or copied, and its norm_group": "the same",
    "lies on a smaller mesh": "tests/distributed/test_norm_groups.py",
    "norm_group has not all ranks of": "the same",
    "and norm_group has ranks outside of": "the same",
    "and other parameters on other ranks": "the same",
    "lies on a part of its mesh": "the same",
    "has several dimensions and not all ranks": "the same",
    "norm_group has no member on this rank": "the same",
    "another rank refused this step": "tests/distributed/test_ranks_agree.py",
    "the ranks' options differ": "the same",
    "a parameter that is a partial sum": "tests/distributed/test_refused_dtensors.py",
    "both have to be DTensors": "the same",
    "clear it after resharding": "the same",
}


def trained(data: torch.Tensor) -> Parameter:
    param = Parameter(data)
    param.grad = torch.ones_like(param)
    return param


def two_tensor() -> torch.Tensor:
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    result: torch.Tensor = two.TwoTensor(torch.ones(3), torch.ones(3))
    return result


class DictOfItsOwn(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)


class Training(SimpleNamespace):
    """An optimizer of one parameter, with a gradient for the next step."""

    def __init__(self) -> None:
        self.start()

    def start(self, **options: Any) -> None:
        vars(self).clear()
        self.torch, self.fusedopt = torch, fusedopt
        self.param = trained(torch.ones(3))
        self.params = [self.param]
        self.optimizer: Any = FusedAdamW(self.params, **options)
        self.fails = self.helps = lambda: self.optimizer.step()

    def load(self) -> None:
        self.optimizer.load_state_dict(self.state_dict)
        self.optimizer.step()

    def save(self, **options: Any) -> Any:
        """Begin with a checkpoint, and its parameter's state; `fails` and `helps` load it."""
        self.start(**options)
        source = FusedAdamW([trained(torch.ones(3))])
        source.step()
        self.state_dict = copy.deepcopy(source.state_dict())
        self.fails = self.helps = self.load
        return self.state_dict["state"][0]

    def step_once(self) -> Any:
        """The parameter's state after a step."""
        self.start()
        self.optimizer.step()
        return self.optimizer.state[self.param]


def broken_memory(s: Training) -> Iterator[str]:
    """Each situation begins anew; words of the message about it."""
    s.param.data, s.values = torch._efficientzerotensor(3), torch.ones(3)
    yield r"has no memory \(a zero tensor"
    s.param.grad.untyped_storage().resize_(0)
    yield "storage was resized to nothing"
    s.param.data = torch.ones(4)
    yield "clear it after replacing"
    s.param.grad_dtype, s.param.grad = None, None
    s.param.grad = torch.ones(3, dtype=torch.float64)
    yield "does not go with parameter dtype"
    s.param.data, s.param.grad = torch.eye(3), None
    s.param.grad = torch.eye(3).to_sparse()
    yield "does not support sparse gradients"
    s.param.grad_dtype, s.param.grad = None, None
    with torch._C.DisableTorchFunctionSubclass():
        s.param.grad = two_tensor()
    yield "gradients of type"
    s.param.data, s.param.grad = torch.ones(1).expand(3), None
    yield "elements share memory"
    with torch.inference_mode():
        s.start()

    def put_another_in_its_place() -> None:
        s.param.grad = torch.ones(3)
        FusedAdamW([s.param]).step()

    s.helps = put_another_in_its_place
    yield "param 0 .* was made in inference mode"
    s.optimizer.init_state()
    with torch.inference_mode():
        s.optimizer.state[s.param]["exp_avg"] = torch.zeros(3)
    yield "state 'exp_avg' was made in inference mode"


def broken_containers(s: Training) -> Iterator[str]:
    s.optimizer.state[s.param] = DictOfItsOwn()
    yield "not a dict with a dict's own access"
    for instead in (MappingProxyType({}), None, 3, [3]):
        s.optimizer.state[s.param] = instead
        yield f"state is a {type(instead).__name__}, not a dict"
    for convert in (tuple, lambda groups: None, lambda groups: dict(enumerate(groups))):
        vars(s.optimizer)["param_groups"] = groups = convert(s.optimizer.param_groups)
        yield f"is a {type(groups).__name__}, not a list"
    s.optimizer.param_groups.append(3)
    yield "is no dict with a list of params"
    s.optimizer.param_groups[0]["params"].append(3)
    yield "not a tensor; take it out"
    s.optimizer.state = None
    yield "starts all state anew"
    del s.optimizer.param_groups[0]["eps"]
    yield "has no option"
    s.start(lr=torch.tensor(0.1))
    del s.optimizer.param_groups[0]["lr"]
    yield "has no option 'lr'"
    s.optimizer.grad_scale = torch.ones(2)
    yield "must be a number or a tensor of one element"
    s.fails = lambda: torch.func.vmap(lambda x: (s.optimizer.step(), x)[1])(torch.zeros(3))
    yield "cannot be traced or faked"
    s.start(max_grad_norm=1.0)
    s.param._fsdp_flattened = True
    s.model = SimpleNamespace(process_group=torch.distributed.group.WORLD)
    yield "cannot be honoured for FSDP1 shards"


def broken_state(s: Training) -> Iterator[str]:
    """A parameter's own, or what a checkpoint has for it: the remedies name one or the other."""
    for begin, lacks, no_tensor, count, shape in (
        (
            s.step_once,
            "state has .* and lacks",
            "not a plain tensor of floating-point numbers",
            "has to be a number of steps",
            "give it that shape",
        ),
        (
            s.save,
            "state has 'exp_avg', 'step' and lacks",
            "a list, not a plain tensor",
            "-1.0, and has to be a number",
            r"state 'exp_avg' has shape \(4,\)",
        ),
    ):
        begin().pop("exp_avg_sq")
        yield lacks
        begin()["exp_avg"] = [0.0, 0.0, 0.0]
        yield no_tensor
        begin()["step"] = -1.0
        yield count
        begin()["exp_avg"] = torch.zeros(4)
        yield shape
    s.step_once()["exp_avg"].untyped_storage().resize_(0)
    yield "state 'exp_avg' has no memory"
    small = {"state_dtype": "8bit", "min_8bit_size": 1}
    s.start(**small)
    s.optimizer.step()
    s.optimizer.state[s.param]["exp_avg_log8_scale"] = torch.zeros(2, dtype=torch.uint8)
    yield "scales of torch.uint8"
    for dtype, words in (
        (torch.float16, "a form for bf16 alone"),
        (torch.float64, "keeps its state in float64"),
    ):
        s.start(**({"state_dtype": "bf16"} if dtype == torch.float64 else {}))
        s.optimizer._shared.options = s.optimizer._shared.options.changed(
            master_weights=None if dtype == torch.float64 else "remainder8"
        )
        s.param.grad = None
        s.param.data = s.param.data.to(dtype)
        s.fails = s.helps = lambda: s.optimizer.init_state()
        yield words
    s.start(**small)
    s.param._fsdp_flattened = True  # type: ignore[attr-defined]
    s.fails = s.helps = lambda: s.optimizer.init_state()
    yield "is not supported for parameters of FSDP1"


def lost_by_dcp(s: Training) -> Iterator[str]:
    """What a flattened load of torch.distributed.checkpoint hands on: names for keys, and gaps."""
    s.save()
    s.state_dict["state"] = {"weight": {key: {} for key in ("step", "exp_avg", "exp_avg_sq")}}
    s.state_dict["param_groups"][0]["params"] = ["weight"]
    yield "the checkpoint has no .* of"
    for group, lost, words in (
        ({"amsgrad": True}, "max_exp_avg_sq", "in the checkpoint depend on amsgrad=True"),
        ({}, "exp_avg", "it had no state for torch.distributed"),
    ):
        own = s.save()
        own["max_exp_avg_sq"] = torch.ones(3)
        s.state_dict["param_groups"][0].update(params=["weight"], **group)

        def load(own: Any = own, lost: str = lost) -> None:
            """As torch does: it takes what the optimizer has."""
            had = s.optimizer.state.get(s.param, {})
            taken = own if lost in had else {n: own[n] for n in had}
            if lost == "max_exp_avg_sq" and not had:
                taken = {n: v for n, v in own.items() if n != lost}
            s.state_dict["state"] = {"weight": taken}
            s.load()

        s.fails = s.helps = load
        yield words


def broken_checkpoints(s: Training) -> Iterator[str]:
    betas = torch.tensor(0.9), torch.tensor(0.99)
    for options, words in ({}, ""), ({"betas": betas}, ": it is"):
        s.save(**options)
        s.state_dict["state"] = {}
        for name in ("betas", "eps"):
            del s.state_dict["param_groups"][0][name]
        yield "state_dict has no 'betas', 'eps'" + words
    s.state_dict["state"] = {"0": s.save()}
    yield "JSON, for one, makes strings"
    s.params.append(trained(torch.ones(3)))
    s.optimizer = FusedAdamW(s.params)
    s.optimizer.step()
    s.state_dict = copy.deepcopy(s.optimizer.state_dict())
    s.state_dict["param_groups"][0]["params"] = [0, 0]
    s.fails = s.helps = s.load
    yield "of a parameter before it"
    s.save()
    del s.state_dict["param_groups"][0]["amsgrad"]  # as in RAdam's
    yield "state_dict has no 'amsgrad'"
    del s.save()["step"]  # as in Apex's
    s.state_dict["param_groups"][0]["step"] = 1
    yield "counts the steps of a group"
    s.save()
    s.state_dict["state"][0] = 7
    yield "state of one parameter must be a dict"
    s.save()
    s.optimizer = FusedLion(s.params)
    yield "state has .*, which another"


def refused_parameters(s: Training) -> Iterator[str]:
    """By the constructor; afterwards there is an optimizer, and it steps."""
    jagged = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    for words, data in {
        "is not supported, its memory": two_tensor(),
        "nested parameters": torch.nested.nested_tensor([torch.ones(2)]),
        "nested parameters are": jagged,
        "sparse parameters": torch.eye(3).to_sparse(),
        "complex parameters": torch.ones(3, dtype=torch.complex64),
        "parameter dtype": torch.ones(3).to(torch.float8_e4m3fn),
    }.items():
        s.param, s.optimizer = Parameter(data), None

        def step() -> None:
            optimizer = s.optimizer or FusedAdamW([s.param])
            if s.param.requires_grad:
                s.param.grad = torch.ones_like(s.param)
            optimizer.step()

        s.fails, s.helps = lambda: FusedAdamW([s.param]), step
        yield words
    s.model, s.inputs = torch.nn.LazyLinear(2), torch.ones(1, 3)
    s.optimizer = FusedAdamW(s.model.parameters())
    yield "is not initialized"
    s.model = torch.nn.Linear(2, 2, device="meta")
    s.fails = s.helps = lambda: FusedAdamW(s.model.parameters()).init_state()
    yield "is on the meta device"
    s.first, s.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    s.second.weight = Parameter(s.first.weight.detach())

    def step_both() -> None:
        params = dict.fromkeys([*s.first.parameters(), *s.second.parameters()])
        for param in params:
            param.grad = torch.ones_like(param)
        FusedAdamW(params).step()

    s.fails = s.helps = step_both
    yield "and .* share memory"
    for words, names in ("list each parameter once: ", None), ("list each parameter once", "ab"):
        s.params *= 2
        s.params = list(zip(names, s.params, strict=True)) if names else s.params
        s.fails = s.helps = lambda: FusedAdamW(s.params).step()
        yield words


def refused_options(s: Training) -> Iterator[str]:
    for name, value, words in (
        ("max_grad_norm", 1.0, "it holds for all groups"),
        ("max_grad_norm", float("inf"), "max_grad_norm=inf in param group 0"),
        ("differentiable", True, "differentiable=True is not supported"),
    ):
        s.FusedAdamW, group = FusedAdamW, {"params": s.params, name: value}

        def helps(name: str = name, group: dict[str, Any] = group) -> None:
            """The line is an assignment to the option, or makes the optimizer."""
            if name in vars(s):
                FusedAdamW([{**group, name: vars(s)[name]}]).step()

        s.fails, s.helps = lambda group=group: FusedAdamW([group]), helps
        yield words
    s.param.data, s.param.grad, s.backend = s.param.data.double(), None, "cpu"
    s.param.grad = torch.ones_like(s.param)
    s.fails = s.helps = lambda: FusedAdamW(s.params, backend=s.backend).step()
    yield "cannot serve"
    s.wrapper = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    s.fails, s.helps = lambda: fusedopt.fuse_scaler(s.wrapper), lambda: None
    yield "scaler must be a torch.amp.GradScaler"
    linear = torch.nn.Linear(2, 2)
    for model, weight_decay, words in (
        (linear.parameters(), 0.01, "model must be a torch.nn.Module"),
        (linear, None, "weight_decay must be a float"),
        (linear, float("nan"), "weight_decay must be at least 0"),
        (torch.nn.LazyLinear(2), 0.01, "of a lazy module has no shape"),
    ):
        s.inputs, s.weight_decay = torch.ones(1, 3), weight_decay
        s.model = model if isinstance(model, torch.nn.Module) else linear
        s.fails = lambda model=model: fusedopt.param_groups(model, s.weight_decay)
        s.helps = lambda: fusedopt.param_groups(s.model, s.weight_decay)
        yield words


def coupled_checkpoint(s: Training) -> Iterator[str]:
    """A warning, made an error here."""
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    s.FusedSGD = functools.partial(FusedSGD, **arguments)
    s.state_dict = torch.optim.SGD(s.params, **arguments).state_dict()

    def load() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            FusedSGD(s.params, **arguments).load_state_dict(s.state_dict)

    def helps() -> None:
        """The line has made the optimizer, or has edited the checkpoint."""
        if "decoupled_weight_decay" in s.state_dict["param_groups"][0]:
            load()

    s.fails, s.helps = load, helps
    yield "has no decoupled_weight_decay"


SITUATIONS = [broken_memory, broken_containers, broken_state, broken_checkpoints, lost_by_dcp]
SITUATIONS += [refused_parameters, refused_options, coupled_checkpoint]


def all_of(situations: Callable[[Training], Iterator[str]]) -> Iterator[tuple[Training, str]]:
    scene = Training()
    for words in situations(scene):
        yield scene, words
        scene.start()


@pytest.mark.parametrize("situations", SITUATIONS)
def test_the_remedy_helps(situations: Callable[[Training], Iterator[str]]) -> None:
    errors = (RuntimeError, TypeError, ValueError, KeyError, UserWarning)
    for number, (scene, words) in enumerate(all_of(situations)):
        with pytest.raises(errors, match=words) as caught:
            scene.fails()
        lines = re.findall(r"`([^`]+)`", str(caught.value))
        assert lines, words
        for line in lines:
            again, _ = next(itertools.islice(all_of(situations), number, None))
            exec(line, vars(again))
            again.helps()


def test_every_message_with_code_has_a_situation() -> None:
    messages = {text for text in raised() if "`" in text}
    found = [words for situations in SITUATIONS for _, words in all_of(situations)]
    filled_in = [
        re.sub(r"param 0 \.\*|'betas', 'eps'|'exp_avg'|tuple|\.\*", "…", words) for words in found
    ]
    known = [*filled_in, *ELSEWHERE]
    assert [m for m in messages if not any(re.search(words, m) for words in known)] == []
