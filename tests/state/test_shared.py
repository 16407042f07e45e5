"""What wrappers and copies of an optimizer have in common with it."""

import copy

import pytest
import torch
from protocol_helpers import INF, on_every_backend

import fusedopt

_every_backend = pytest.fixture(autouse=True)(on_every_backend)
every_class = pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])


@every_class
@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_wrappers_share_the_options_and_the_answers(cls, wrapped):
    """Lightning's and Fabric's wrappers take over ``__dict__``, once."""
    p = torch.nn.Parameter(torch.ones(4))
    opt = cls([p], lr=0.1, max_grad_norm=10.0)
    p.grad = torch.ones(4)
    if wrapped == "after":
        opt.step()
    wrapper = object.__new__(type("Wrapper", (cls,), {}))
    wrapper.__dict__ = {k: v for k, v in opt.__dict__.items() if k != "step"}
    wrapper.max_grad_norm = 1.0
    assert opt.max_grad_norm == 1.0
    opt.step()
    for each in (opt, wrapper):
        assert float(each.clip_coef) == pytest.approx(0.5) and float(each.grad_norm) == 2.0
        assert each.backend == opt.backend and each.memory_footprint() == opt.memory_footprint()
    opt.skip_nonfinite = True
    assert wrapper.skip_nonfinite
    p.grad[0] = INF
    wrapper.grad_scale = 2.0
    opt.step()
    assert float(wrapper.found_inf) == 1.0 and int(wrapper.skipped_steps) == 1
    assert opt.grad_scale == 2.0
    alone = copy.deepcopy(opt)
    alone.max_grad_norm = None
    assert opt.max_grad_norm == wrapper.max_grad_norm == 1.0
