"""Checkpoints of other optimizers, told by their groups, and such whose keys no group names."""

import copy
import json

import numpy as np
import pytest
import torch
from checkpoint_helpers import (
    assert_same_bits,
    clone_params,
    make,
    make_params,
    refused_load,
    remedy_in,
    run,
)
from protocol_helpers import fallback_is_expected, on_every_backend

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# Groups


@pytest.mark.parametrize("kind", ["sgd", "plain-sgd", "adamw"])
@pytest.mark.parametrize(
    "theirs",
    [getattr(torch.optim, n) for n in ("SGD", "AdamW", "RMSprop", "Rprop", "NAdam", "RAdam")],
)
@pytest.mark.parametrize("stepped", [True, False])
def test_groups_of_another_rule_are_refused(kind, theirs, stepped):
    """Also where there is no state: lr and weight decay would be another rule's."""
    params, opt = make(kind)
    others = make_params()
    their_opt = theirs(others, lr=0.5)
    if stepped:
        run(others, their_opt, range(2))
    state_dict = copy.deepcopy(their_opt.state_dict())
    if theirs is (torch.optim.AdamW if kind == "adamw" else torch.optim.SGD):
        opt.load_state_dict(state_dict)
        assert opt.param_groups[0]["lr"] == 0.5
        return
    match = "param group 0 of the state_dict has no '(betas|momentum|dampening|amsgrad)'"
    message = refused_load(opt, params, state_dict, ValueError, match)
    state_dict["state"].clear()
    exec(remedy_in(message), {"state_dict": state_dict})
    state_dict["param_groups"][0]["decoupled_weight_decay"] = True
    opt.load_state_dict(state_dict)
    run(params, opt, [0])


OTHERS = [n for n in torch.optim.__all__ if n[0].isupper() and n not in ("Optimizer", "LBFGS")]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_optimizer_of_torch_is_known_by_its_groups(kind, name):
    params, opt = make(kind, params=[torch.nn.Parameter(torch.ones(3, 2))])
    state_dict = getattr(torch.optim, name)(params).state_dict()
    if name in {"adamw": ("Adam", "AdamW"), "sgd": ("SGD",)}[kind]:
        opt.load_state_dict(state_dict)
    else:
        words = "checkpoint of another optimizer|Invalid eps value"  # Adafactor has a pair of eps
        refused_load(opt, params, state_dict, ValueError, words)


OLD = ["lr", "betas", "eps", "weight_decay"]
ADAMS = {
    "torch 1.0": [*OLD, "amsgrad"],
    "torch 1.12": [*OLD, "amsgrad", "maximize", "foreach", "capturable"],
    "torch 2.0": [*OLD, "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"],
    "a schedule's": [*OLD, "amsgrad", "foreach", "initial_lr", "lr_scale"],
    "Apex": [*OLD, "bias_correction"],
    "transformers": [*OLD, "correct_bias"],
    "DeepSpeed": [*OLD, "bias_correction", "amsgrad"],
}


@pytest.mark.parametrize("whose", ADAMS)
def test_groups_of_every_adam_load(whose):
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    group = saved["param_groups"][0]
    saved["param_groups"] = [{n: group.get(n, 1.0) for n in ("params", *ADAMS[whose])}]
    other, other_opt = make("adamw", params=clone_params(params))
    other_opt.load_state_dict(saved)
    run(params, opt, [2])
    run(other, other_opt, [2])
    assert_same_bits((params, opt), (other, other_opt))


def test_a_group_count_is_given_to_each_parameter():
    """Apex's FusedAdam has no count in its states."""
    params, opt = make("adamw")
    run(params, opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        del state["step"]
    saved["param_groups"][0]["step"] = 3
    del saved["state"][2]  # never had a gradient
    other, other_opt = make("adamw", params=clone_params(params))
    message = refused_load(other_opt, other, saved, KeyError, "counts the steps of a group")
    exec(remedy_in(message), {"state_dict": saved})
    other_opt.load_state_dict(saved)
    del opt.state[params[2]]
    run(params, opt, [3])
    run(other, other_opt, [3])
    assert_same_bits((params, opt), (other, other_opt))


# Keys that are not those of the groups


def through_json(saved):
    """The keys alone: JSON knows no tensors."""
    keys = json.loads(json.dumps(dict.fromkeys(saved["state"])))
    saved["state"] = dict(zip(keys, saved["state"].values(), strict=True))


def strings_in_groups(saved):
    saved["param_groups"][0]["params"] = list(map(str, saved["param_groups"][0]["params"]))


def one_string(saved):
    saved["state"]["1"] = saved["state"].pop(1)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "plain-sgd"])
@pytest.mark.parametrize("edit", [through_json, strings_in_groups, one_string])
def test_keys_that_became_strings_are_refused(kind, edit):
    params, opt = make(kind, torch.bfloat16)
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    edit(saved)
    saved["state"]["global"], saved["state"][7] = {"seen": 3}, {"seen": 4}
    other, other_opt = make(kind, params=clone_params(params))
    match = r"state_dict\['state'\] has \[.*1.*\] where its param groups name \[.*1.*\]"
    message = refused_load(other_opt, other, saved, KeyError, match)
    exec(remedy_in(message), {"state_dict": saved})
    other_opt.load_state_dict(saved)
    run(params, opt, [2])
    run(other, other_opt, [2])
    assert_same_bits((params, opt), (other, other_opt))
    assert other_opt.state["global"] == {"seen": 3} and other_opt.state[7] == {"seen": 4}


@pytest.mark.parametrize(
    "convert",
    [str, float, np.int64, "layers.{}.weight".format],
    ids=["str", "float", "numpy", "name"],
)
@pytest.mark.parametrize("groups", [True, False])
def test_keys_that_are_the_groups_own_load(convert, groups):
    """Some savers name parameters; and a float, or numpy's integer, is equal to the integer."""
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {convert(key): value for key, value in saved["state"].items()}
    if groups or convert not in (float, np.int64):
        group = saved["param_groups"][0]
        group["params"] = list(map(convert, group["params"]))
    other, other_opt = make("adamw", params=clone_params(params))
    other_opt.load_state_dict(saved)
    assert_same_bits((params, opt), (other, other_opt))
