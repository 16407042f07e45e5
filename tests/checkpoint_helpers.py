"""Optimizers of every kind of state, for the tests of checkpoints, state dicts and copies."""

import pytest
import torch
from protocol_helpers import DTYPES, OPTIMIZERS, give_grads

import fusedopt

SGD = OPTIMIZERS["sgd"]
KINDS = {
    "adamw": OPTIMIZERS["adamw"],
    "amsgrad": (fusedopt.FusedAdamW, {"lr": 0.1, "amsgrad": True}),
    "sgd": SGD,
    "plain-sgd": (fusedopt.FusedSGD, {"lr": 0.1}),
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


def clone_params(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


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
