"""Modes that trace, fake or transform what torch does: the step is refused there, by name."""

import pytest
import torch
from protocol_helpers import (
    assert_same,
    every_kind,
    give_grads,
    make_ours,
    make_params,
    make_theirs,
    on_every_backend,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fusedopt

_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def trace_fx(call):
    make_fx(lambda x: (call(), x + 1)[1])(torch.zeros(3))


def trace_before_dispatch(call):
    make_fx(lambda x: (call(), x + 1)[1], pre_dispatch=True)(torch.zeros(3))


def trace_jit(call):
    torch.jit.trace(lambda x: (call(), x + 1)[1], torch.zeros(3))


def fake(call):
    with FakeTensorMode(allow_non_fake_inputs=True):
        call()


def vmap(call):
    torch.func.vmap(lambda x: (call(), x)[1])(torch.zeros(3))


def grad(call):
    torch.func.grad(lambda x: (call(), x.sum())[1])(torch.zeros(3))


def functionalize(call):
    torch.func.functionalize(lambda x: (call(), x + 1)[1])(torch.zeros(3))


MODES = {
    "make_fx": (trace_fx, "ProxyTorchDispatchMode"),
    "pre_dispatch": (trace_before_dispatch, "make_fx with pre_dispatch=True"),
    "jit.trace": (trace_jit, "torch.jit.trace"),
    "fake": (fake, "FakeTensorMode"),
    "vmap": (vmap, "torch.func"),
    "grad": (grad, "torch.func"),
    "functionalize": (functionalize, "torch.func"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_kind
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_refused_by_name(kind, planned, mode):
    run, name = MODES[mode]
    params, opt = make_ours(kind)
    give_grads(params, 0)
    if planned:
        opt.step()
    before = [p.detach().clone() for p in params]
    for call in (opt.step, opt.init_state):
        with pytest.raises(RuntimeError, match=f"traced or faked, and .*{name}.* is active"):
            run(call)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert planned or not opt.state
    opt.step()
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@every_kind
def test_modes_that_only_look(kind):
    ours, theirs = make_ours(kind, max_grad_norm=10.0), make_theirs(kind)
    for step in range(2):
        give_grads(ours[0], step)
        give_grads(theirs[0], step)
        with FlopCounterMode(display=False), torch.device("meta"):  # a default, not a fake
            ours[1].step()
        theirs[1].step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])
def test_made_where_all_is_fake_and_used_where_it_is_not(cls):
    """Estimating a training run makes the optimizer, too, in a FakeTensorMode."""
    params = make_params()
    with FakeTensorMode(allow_non_fake_inputs=True):
        opt = cls(params, lr=0.1, max_grad_norm=1.0)
    give_grads(params, 0)
    opt.step()
    assert 0 < float(opt.clip_coef) <= 1 and not torch.equal(params[0], make_params()[0])


@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])
def test_fake_parameters(cls):
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.ones(3))]
        params[0].grad = torch.ones(3)
        opt = cls(params)
    with pytest.raises(RuntimeError, match=r"param 0 of group 0 is a FakeTensor, .*no memory"):
        opt.step()


def test_fullgraph_is_refused_in_our_words():
    params, opt = make_ours()
    give_grads(params, 0)
    scaler = fusedopt.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    saved, group = opt.state_dict(), {"params": [torch.nn.Parameter(torch.ones(2))]}
    calls = [opt.step, lambda: scaler.step(opt), opt.init_state, opt.memory_footprint]
    calls += [lambda: opt.load_state_dict(saved), lambda: opt.add_param_group(group)]
    if torch.__version__ >= "2.12":  # before it Dynamo fails at any attribute of any optimizer
        calls += [lambda: setattr(opt, "max_grad_norm", 1.0)]
    for call in calls:
        torch._dynamo.reset()
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match="the fused step is not traced"
        ) as e:
            torch.compile(lambda call=call: call(), fullgraph=True, backend="eager")()
        assert "issue to PyTorch" not in str(e.value)
    assert torch.equal(params[0], make_params()[0])
    assert not opt.state and len(opt.param_groups) == 1 and opt.max_grad_norm is None


@pytest.mark.parametrize("name", ["step", "scaler", "init_state", "load", "add_param_group"])
def test_fullgraph_of_a_method_itself_is_refused_before_anything_moves(name):
    params, opt = make_ours()
    give_grads(params, 0)
    scaler = fusedopt.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    group = {"params": [torch.nn.Parameter(torch.ones(2))]}
    methods = {
        "step": (opt.step,),
        "scaler": (scaler.step, opt),
        "init_state": (opt.init_state,),
        "load": (opt.load_state_dict, opt.state_dict()),
        "add_param_group": (opt.add_param_group, group),
    }
    method, *arguments = methods[name]
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(method, fullgraph=True, backend="eager")(*arguments)
    assert torch.equal(params[0], make_params()[0])
    assert not opt.state and len(opt.param_groups) == 1


def test_what_is_not_traced_runs_between_two_graphs():
    """And what only reads may be in one."""
    params, opt = make_ours(max_grad_norm=1.0)
    give_grads(params, 0)
    later = torch.nn.Parameter(torch.ones(2))

    def calls(x):
        x = x + 1
        opt.add_param_group({"params": [later]})
        opt.init_state()
        opt.step()
        return x + opt.memory_footprint()["exp_avg"] + opt.grad_norm

    expected = 1 + 4 * sum(p.numel() for p in [*params, later])
    got = torch.compile(calls, backend="eager")(torch.zeros(()))
    assert float(got) == pytest.approx(expected + float(opt.grad_norm))
    torch.compile(lambda: (repr(opt), opt.grad_norm), fullgraph=True, backend="eager")()
