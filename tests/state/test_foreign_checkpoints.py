"""Checkpoints as others write them: groups of other optimizers, keys, decay and names."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from checkpoint_helpers import (
    assert_same_bits,
    assert_same_run,
    load_after_remedy,
    make,
    make_params,
    refused_load,
    remedy_in,
    resumed,
    run,
    run_all,
    trained,
)
from protocol_helpers import fallback_is_expected, on_every_backend

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# Groups

OTHERS = [n for n in torch.optim.__all__ if n[0].isupper() and n not in ("Optimizer", "LBFGS")]


@pytest.mark.parametrize("kind", ["sgd", "plain-sgd", "adamw"])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("stepped", [True, False])
def test_every_optimizer_of_torch_is_known_by_its_groups(kind, name, stepped):
    """Also where there is no state: lr and weight decay would be another rule's."""
    params, opt = make(kind, params=[torch.nn.Parameter(torch.ones(3, 2))])
    their_opt = getattr(torch.optim, name)(params, lr=0.5)
    if stepped and name != "SparseAdam":  # which takes no dense gradients
        run(params, their_opt, range(2))
    saved = copy.deepcopy(their_opt.state_dict())
    if name in (("Adam", "AdamW") if kind == "adamw" else ("SGD",)):
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.5
        return
    if name == "Adafactor" and kind == "adamw":  # which has a pair of eps
        refused_load(opt, params, saved, ValueError, "Invalid eps value")
        return
    words = "has no '(betas|momentum|dampening|amsgrad|weight_decay)'.* of another optimizer"
    message = refused_load(opt, params, saved, ValueError, words)
    saved["state"].clear()
    exec(remedy_in(message), {"state_dict": saved})
    saved["param_groups"][0]["decoupled_weight_decay"] = True
    opt.load_state_dict(saved)
    run(params, opt, [0])


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
    params, opt, saved = trained()
    group = saved["param_groups"][0]
    saved["param_groups"] = [{n: group.get(n, 1.0) for n in ("params", *ADAMS[whose])}]
    assert_same_run([2], (params, opt), resumed("adamw", params, saved))


def test_a_group_count_is_given_to_each_parameter():
    """Apex's FusedAdam has no count in its states."""
    params, opt, saved = trained(steps=3)
    other, other_opt = resumed("adamw", params, saved)
    for state in saved["state"].values():
        del state["step"]
    saved["param_groups"][0]["step"] = 3
    del saved["state"][2]  # never had a gradient
    load_after_remedy(other_opt, other, saved, KeyError, "counts the steps of a group")
    del opt.state[params[2]]
    assert_same_run([3], (params, opt), (other, other_opt))


# Keys that are not those of the groups


def through_json(saved):
    """The keys alone: JSON knows no tensors."""
    keys = json.loads(json.dumps(dict.fromkeys(saved["state"])))
    saved["state"] = dict(zip(keys, saved["state"].values(), strict=True))


def strings_in_groups(saved):
    saved["param_groups"][0]["params"] = list(map(str, saved["param_groups"][0]["params"]))


def one_string(saved):
    saved["state"]["1"] = saved["state"].pop(1)


@pytest.mark.parametrize("kind", ["adamw", "plain-sgd"])
@pytest.mark.parametrize("edit", [through_json, strings_in_groups, one_string])
def test_keys_that_became_strings_are_refused(kind, edit):
    params, opt, saved = trained(kind, torch.bfloat16)
    other, other_opt = resumed(kind, params, saved)
    edit(saved)
    saved["state"]["global"], saved["state"][7] = {"seen": 3}, {"seen": 4}
    match = r"state_dict\['state'\] has \[.*1.*\] where its param groups name \[.*1.*\]"
    load_after_remedy(other_opt, other, saved, KeyError, match)
    assert_same_run([2], (params, opt), (other, other_opt))
    assert other_opt.state["global"] == {"seen": 3} and other_opt.state[7] == {"seen": 4}


@pytest.mark.parametrize(
    "convert, groups",
    [
        (str, True),
        ("layers.{}.weight".format, True),
        (float, True),
        (float, False),
        (np.int64, False),
    ],
)
def test_keys_that_are_the_groups_own_load(convert, groups):
    """Some savers name parameters; and a float, or numpy's integer, is equal to the integer."""
    params, opt, saved = trained()
    saved["state"] = {convert(key): value for key, value in saved["state"].items()}
    if groups:
        group = saved["param_groups"][0]
        group["params"] = list(map(convert, group["params"]))
    assert_same_bits((params, opt), resumed("adamw", params, saved))


# Decay of torch's SGD

DECAYING = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def torch_sgd_checkpoint(**kwargs):
    params = make_params()
    opt = torch.optim.SGD(params, **{**DECAYING, **kwargs})
    run(params, opt, range(2))
    return copy.deepcopy(opt.state_dict())


def test_coupled_decay_that_would_become_decoupled_is_warned_of():
    """torch's groups do not say how decay is applied: the constructor does."""
    saved = torch_sgd_checkpoint()
    params, opt = make("sgd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused_load(opt, params, saved, UserWarning, "no decoupled_weight_decay")
    with pytest.warns(UserWarning, match="decoupled_weight_decay=False") as warned:
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["decoupled_weight_decay"] is True
    assert len(warned) == 1 and warned[0].filename == __file__
    assert "weight_decay=0.0005" in str(warned[0].message)
    exec(remedy_in(str(warned[0].message)), {"state_dict": saved})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved)


@pytest.mark.filterwarnings("error")
def test_no_warning_where_nothing_changes():
    coupled = make("sgd", decoupled_weight_decay=False)[1]
    coupled.load_state_dict(torch_sgd_checkpoint())
    assert coupled.param_groups[0]["decoupled_weight_decay"] is False
    for same in ({"weight_decay": 0}, {"momentum": 0}):
        make("sgd")[1].load_state_dict(torch_sgd_checkpoint(**same))
    opt = make("sgd")[1]
    make("sgd")[1].load_state_dict(opt.state_dict())
    saved = torch_sgd_checkpoint()
    saved["param_groups"][0]["decoupled_weight_decay"] = True
    opt.load_state_dict(saved)


# Names


@pytest.mark.parametrize("copier", [lambda opt: opt, copy.deepcopy])
@pytest.mark.parametrize("given", ["ab", ""])
@pytest.mark.parametrize("saved_names", ["ba", ""])
def test_errors_name_the_parameter_and_not_the_checkpoints(given, saved_names, copier):
    opt, theirs = (
        fusedopt.FusedAdamW(list(zip(names, params, strict=True)) if names else params)
        for names in (given, saved_names)
        for params in [[torch.nn.Parameter(torch.ones(3)) for _ in range(2)]]
    )
    run_all(theirs)
    for _ in range(2):
        opt.load_state_dict(theirs.state_dict())
    opt = copier(opt)
    shown = opt.param_groups[0].get("param_names", "")
    assert list(shown) == list(saved_names or given)  # as in torch
    opt.param_groups[0]["params"][1].grad = torch.ones(3).to_sparse()
    name = r" \('b'\)" if given else ""
    with pytest.raises(RuntimeError, match=rf"param 1 of group 0{name}: "):
        opt.step()


def test_8_bit_states_of_other_packages_are_refused_by_name():
    """bitsandbytes keeps codes of a map of its own under names of its own."""
    params, opt = make()
    run(params, opt, range(1))
    saved = copy.deepcopy(opt.state_dict())
    for own, p in zip(saved["state"].values(), params, strict=True):
        codes = torch.zeros(p.shape, dtype=torch.uint8)
        own.clear()
        own.update(
            step=1, state1=codes, state2=codes, qmap1=torch.zeros(256), absmax1=torch.ones(1)
        )
    with pytest.raises(KeyError, match=r"state1.*state2.*lacks"):
        opt.load_state_dict(saved)
