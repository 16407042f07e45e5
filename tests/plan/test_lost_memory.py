"""Parameters, states and gradients that a step cannot find any more: refused, nothing has moved."""

import collections

import pytest
import torch
from protocol_helpers import (
    fallback_is_expected,
    give_grads,
    make_ours,
    on_every_backend,
    step_all,
)

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# Memory that is gone


def _free(tensor):
    tensor.untyped_storage().resize_(0)


def _zero(tensor):
    tensor.data = torch._efficientzerotensor(tensor.shape)


@pytest.mark.parametrize("gone", [_free, _zero])
@pytest.mark.parametrize("what", ["param", "exp_avg", "step", "grad"])
def test_memory_that_is_gone_is_refused(what, gone):
    """Where torch's own kernels end the process, or write into nothing. Nothing has moved."""
    params, opt = make_ours("adamw")
    step_all([(params, opt)], 0)
    give_grads(params, 1)
    first = params[0].detach().clone()
    target = {"param": params[1], "grad": params[1].grad}.get(what)
    if target is None:
        target = opt.state[params[1]][what]
    saved = target.detach().clone()
    gone(target)
    if (what, gone) == ("grad", _zero):  # zeros can be read
        opt.step()
        return
    with pytest.raises(RuntimeError, match=r"has no memory|storage was resized to nothing"):
        opt.step()
    assert torch.equal(params[0], first) and opt.state[params[0]]["step"] == 1
    target.data = saved
    opt.step()
    assert not torch.equal(params[0], first) and opt.state[params[0]]["step"] == 2


# State that is no plain dict


class Detaching(dict):
    def __getitem__(self, name):
        return super().__getitem__(name).detach()


@pytest.mark.parametrize("mapping", [collections.UserDict, Detaching])
def test_state_that_is_no_dict_is_refused(mapping):
    """The plan compares what is in a dict; it would go on writing to memory that is not there."""
    params, opt = make_ours("adamw")
    step_all([(params, opt)], 0)
    own = opt.state[params[0]]
    opt.state[params[0]] = mapping(own)
    before = [p.detach().clone() for p in params]
    give_grads(params, 1)
    with pytest.raises(RuntimeError, match="not a dict with a dict's own access"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    opt.state[params[0]] = collections.OrderedDict(own)
    opt.step()
    assert opt.state[params[0]]["step"] == 2
