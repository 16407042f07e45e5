"""Graphs that see a step, steps inside backward, and views that say "negate me" when read."""

import warnings

import pytest
import torch
from protocol_helpers import (
    DTYPES,
    KINDS,
    assert_twins,
    build,
    every_kind,
    fallback_is_expected,
    give_grads,
    make_ours,
    on_every_backend,
    step_all,
    twins,
)

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


@every_kind
def test_stale_gradient_of_a_frozen_param_is_used_as_in_torch(kind):
    pairs = twins(kind)
    step_all(pairs, 0)
    for params, opt in pairs:
        params[0].requires_grad_(False)
        opt.step()
    assert_twins(pairs)


@every_kind
def test_thawed_after_init_state(kind):
    """init_state leaves frozen params out; they get their state when they first have a gradient."""
    pairs = twins(kind)
    for params, opt in pairs:
        params[1].requires_grad_(False)
        if isinstance(opt, KINDS[kind][0]):
            opt.init_state()
            assert params[1] not in opt.state and params[0] in opt.state
        params[1].requires_grad_(True)
    step_all(pairs, 0)
    assert_twins(pairs)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_version_counters(kind, dtype):
    """A graph that saved a parameter must not be walked after the parameter has changed."""
    param = torch.nn.Parameter(torch.ones(20, dtype=dtype))
    idle = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    opt = build(True, kind, [param, idle])
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    versions = param._version, idle._version, param.grad._version
    opt.step()
    assert param._version > versions[0]
    assert (idle._version, param.grad._version) == versions[1:]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_kind
def test_gradient_with_a_graph(kind):
    """create_graph=True leaves gradients that require grad; parameters and states stay leaves."""
    pairs = twins(kind)
    for params, opt in pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sum((p**3).sum() for p in params).backward(create_graph=True)
        assert params[0].grad.requires_grad
        opt.step()
        assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
        for p in params:
            p.grad = None
    assert not any(v.requires_grad for s in pairs[0][1].state.values() for v in s.values())
    assert_twins(pairs)


@every_kind
def test_step_in_backward(kind):
    """One optimizer a parameter, stepped as soon as the gradient is there."""
    results = []
    for own in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        opts = {p: build(own, kind, [p]) for p in model.parameters()}

        def step(param, opts=opts):
            opts[param].step()
            opts[param].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        gen = torch.Generator().manual_seed(1)
        for _ in range(3):
            model(torch.randn(3, 4, generator=gen)).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        results.append(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def negated(values):
    """A view of the opposite, with the negative bit: its memory holds the opposite sign.

    torch makes them as the imaginary part of a conjugate, so with a stride of two: only one of a
    single element passes for dense.
    """
    view = torch.complex(values, -values).conj().imag
    assert view.is_neg() and torch.equal(view, values)
    return view


@every_kind
@pytest.mark.parametrize("n", [1, 5])
def test_gradient_with_the_negative_bit(kind, n):
    pairs = twins(kind)
    for step in range(2):
        for params, opt in pairs:
            give_grads(params, step)
            grad = params[1].grad.reshape(-1)[:n]
            params[1].data = params[1].data.reshape(-1)[:n].clone()
            params[1].grad = negated(grad)
            opt.state.pop(params[1], None)
            opt.step()
    assert_twins(pairs)


@every_kind
def test_a_parameter_with_the_negative_bit(kind):
    """From the first step on, and from one step to the next at the same address."""
    pairs = twins(kind)
    for params, opt in pairs:
        views = [
            lambda data: negated(torch.full((1,), -2.0)),
            torch.Tensor.resolve_neg,
            torch.Tensor._neg_view,
        ]
        for step, view in enumerate(views):
            params[1].data = view(params[1].data)
            give_grads(params, step)
            opt.step()
        assert params[1].is_neg()
    assert_twins(pairs)


def test_a_scale_with_the_negative_bit():
    results = []
    for scale in (8.0, negated(torch.tensor(8.0))):
        params, opt = make_ours("sgd")
        give_grads(params, 0, scale=8.0)
        opt.grad_scale = scale
        opt.step()
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
