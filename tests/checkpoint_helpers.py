"""Optimizers of every kind of state, for the tests of checkpoints, state dicts and copies."""

import copy
import re

import pytest
import torch
from protocol_helpers import DTYPES, OPTIMIZERS, assert_unmoved, give_grads, snapshot
from torch.profiler import ProfilerActivity, profile

import fusedopt

SGD = OPTIMIZERS["sgd"]
KINDS = {
    "adamw": OPTIMIZERS["adamw"],
    "amsgrad": (fusedopt.FusedAdamW, {"lr": 0.1, "amsgrad": True}),
    "sgd": SGD,
    "plain-sgd": (fusedopt.FusedSGD, {"lr": 0.1}),
    "lion": (fusedopt.FusedLion, {"lr": 0.01}),
}

# a count of 20, as checkpoints and users have it
STEP_FORMS = {
    "fp32": lambda: torch.tensor(20.0),
    "fp64": lambda: torch.tensor(20.0, dtype=torch.float64),
    "int64": lambda: torch.tensor(20),
    # with room behind it, for whoever takes it for fp32
    "fp16": lambda: torch.tensor([20.0, 0, 0, 0], dtype=torch.float16)[0],
    "1-element": lambda: torch.tensor([20.0]),
    "int": lambda: 20,
    "float": lambda: 20.0,
}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_params(dtype=torch.float32):
    gen = torch.Generator().manual_seed(7)
    values = [torch.randn(s, generator=gen) for s in ((5, 3), (37,), ())]
    values.append(torch.randn(4, 6, generator=gen).t())
    return [torch.nn.Parameter(v.to(dtype)) for v in values]


def make(kind="adamw", dtype=torch.float32, params=None, **options):
    cls, kwargs = KINDS[kind]
    params = make_params(dtype) if params is None else params
    return params, cls(params, **{**kwargs, **options})


def clone_params(params, dtype=None):
    return [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def run(params, opt, steps, bad=None):
    for step in steps:
        give_grads(params, step)
        if step == bad:
            params[1].grad[3] = float("inf")
        opt.step()


def assert_same_bits(one, two):
    (params_one, opt_one), (params_two, opt_two) = one, two
    for i, (a, b) in enumerate(zip(params_one, params_two, strict=True)):
        assert torch.equal(a, b), f"param {i}"
        assert set(opt_one.state[a]) == set(opt_two.state[b]), f"state of param {i}"
        for key, value in opt_one.state[a].items():
            other = opt_two.state[b][key]
            assert value.dtype == other.dtype and torch.equal(value, other), (i, key)


def trained(kind="adamw", dtype=torch.float32, steps=2, **options):
    """An optimizer after some steps, and a checkpoint of it that shares nothing with it."""
    params, opt = make(kind, dtype, **options)
    run(params, opt, range(steps))
    return params, opt, copy.deepcopy(opt.state_dict())


def resumed(kind, params, saved, dtype=None, **options):
    """Another optimizer, of copies of ``params``, that has loaded ``saved``."""
    copies, opt = make(kind, params=clone_params(params, dtype), **options)
    opt.load_state_dict(saved)
    return copies, opt


def assert_same_run(steps, one, *others):
    """To the bit, after these steps of all of them."""
    for params, opt in (one, *others):
        run(params, opt, steps)
    for other in others:
        assert_same_bits(one, other)


def refused_load(opt, params, state_dict, error, match):
    """The message; the optimizer is as it was."""
    before, groups = snapshot(params, opt), copy.deepcopy(opt.state_dict()["param_groups"])
    tensors = {(p, k): v for p, own in opt.state.items() for k, v in own.items()}
    with pytest.raises(error, match=match) as raised:
        opt.load_state_dict(state_dict)
    assert_unmoved(before, params, opt)
    assert all(opt.state[p][k] is v for (p, k), v in tensors.items())
    assert opt.state_dict()["param_groups"] == groups
    return raised.value.args[0]


def remedy_in(message):
    return re.findall(r"`([^`]+)`", message)[-1]


def load_after_remedy(opt, params, state_dict, error, match):
    """Refused as it is; what the message advises makes it load."""
    exec(remedy_in(refused_load(opt, params, state_dict, error, match)), {"state_dict": state_dict})
    opt.load_state_dict(state_dict)


def run_all(opt):
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()


def traced(call):
    """Bytes that `call` held at most, and those it left behind; of what no trace saw, none."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now
