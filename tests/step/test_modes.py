"""Modes that trace, fake or transform what torch does: the step is refused there, by name. And
torch.compile, which leaves the step out of its graphs."""

import pytest
import torch
from protocol_helpers import (
    SCALERS,
    assert_twins,
    build,
    every_class,
    every_kind,
    give_grads,
    make_ours,
    make_params,
    make_scaler,
    on_every_backend,
    twins,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import lr_scheduler
from torch.utils.flop_counter import FlopCounterMode

import fusedopt

_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def trace_fx(call, **options):
    make_fx(lambda x: (call(), x + 1)[1], **options)(torch.zeros(3))


def trace_before_dispatch(call):
    trace_fx(call, pre_dispatch=True)


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
    trace_fx: "ProxyTorchDispatchMode",
    trace_before_dispatch: "make_fx with pre_dispatch=True",
    trace_jit: "torch.jit.trace",
    fake: "FakeTensorMode",
    vmap: "torch.func",
    grad: "torch.func",
    functionalize: "torch.func",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_kind
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_refused_by_name(kind, planned, mode):
    params, opt = make_ours(kind)
    give_grads(params, 0)
    if planned:
        opt.step()
    before = [p.detach().clone() for p in params]
    for call in (opt.step, opt.init_state):
        with pytest.raises(RuntimeError, match=f"traced or faked, and .*{MODES[mode]}.* is"):
            mode(call)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert planned or not opt.state
    opt.step()
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@every_kind
def test_modes_that_only_look(kind):
    (ours, opt), (theirs, torchs_opt) = pairs = twins(kind)
    opt.max_grad_norm = 10.0
    for step in range(2):
        give_grads(ours, step)
        give_grads(theirs, step)
        with FlopCounterMode(display=False), torch.device("meta"):  # a default, not a fake
            opt.step()
        torchs_opt.step()
    assert_twins(pairs)


@every_class
def test_made_where_all_is_fake_and_used_where_it_is_not(cls):
    """Estimating a training run makes the optimizer, too, in a FakeTensorMode."""
    params = make_params()
    with FakeTensorMode(allow_non_fake_inputs=True):
        opt = cls(params, lr=0.1, max_grad_norm=1.0)
    give_grads(params, 0)
    opt.step()
    assert 0 < float(opt.clip_coef) <= 1 and not torch.equal(params[0], make_params()[0])
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.ones(3))]
        params[0].grad = torch.ones(3)
        opt = cls(params)
    with pytest.raises(RuntimeError, match=r"param 0 of group 0 is a FakeTensor, .*no memory"):
        opt.step()


# torch.compile


def test_fullgraph_is_refused_before_anything_moves():
    """In our words where a function makes the call; also where it is the method itself."""
    params, opt = make_ours()
    give_grads(params, 0)
    scaler = fusedopt.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    calls = [
        (opt.step,),
        (scaler.step, opt),
        (opt.init_state,),
        (opt.load_state_dict, opt.state_dict()),
        (opt.add_param_group, {"params": [torch.nn.Parameter(torch.ones(2))]}),
        (opt.memory_footprint,),
    ]
    if torch.__version__ >= "2.12":  # before it Dynamo fails at any attribute of any optimizer
        calls.append((setattr, opt, "max_grad_norm", 1.0))
    refused = torch._dynamo.exc.Unsupported
    compiled = torch.compile(lambda call, given: call(*given), fullgraph=True, backend="eager")
    for method, *arguments in calls:
        torch._dynamo.reset()
        with pytest.raises(refused, match="the fused step is not traced") as caught:
            compiled(method, arguments)
        assert "issue to PyTorch" not in str(caught.value)
        if method not in (opt.memory_footprint, setattr):
            torch._dynamo.reset()
            with pytest.raises(refused):
                torch.compile(method, fullgraph=True, backend="eager")(*arguments)
    assert torch.equal(params[0], make_params()[0])
    assert not opt.state and len(opt.param_groups) == 1 and opt.max_grad_norm is None


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


def compiled_and_not(make_function):
    """What two runs of the same function return: as it is, and compiled."""
    torch._dynamo.reset()
    return [make_function(lambda f: f), make_function(torch.compile(backend="eager"))]


def test_compiled_by_inductor():
    torch._dynamo.reset()
    (params, opt), (plain, plain_opt) = make_ours(), make_ours()

    @torch.compile(backend="inductor")
    def compiled():
        opt.step()
        opt.zero_grad(set_to_none=False)

    for step in range(4):
        give_grads(params, step)
        give_grads(plain, step)
        compiled()
        plain_opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
    assert not params[0].grad.any()
    assert float(opt.state[params[0]]["step"]) == 4


@every_kind
def test_compiled_training_step(kind):
    def run(decorate):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        opt = build(True, kind, list(model.parameters()), max_grad_norm=0.1)
        scheduler = lr_scheduler.LinearLR(opt, 0.1, 1.0, 5)

        @decorate
        def train(x):
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        gen = torch.Generator().manual_seed(1)
        for _ in range(6):
            train(torch.randn(16, 4, generator=gen))
            scheduler.step()
        return [*model.parameters()]

    for a, b in zip(*compiled_and_not(run), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("scaler_name", SCALERS)
def test_compiled_step_of_a_scaler(scaler_name, options):
    """An overflow in a compiled step is skipped and the scale backs off, as without compiling."""

    def run(decorate):
        params, opt = make_ours(amp_scaling=True, **options)
        scaler = make_scaler(scaler_name)

        @decorate
        def step():
            scaler.step(opt)
            scaler.update()

        scales = []
        for i, bad in enumerate((None, float("inf"), None, float("nan"), None)):
            give_grads(params, i, scaler.get_scale(), bad)
            step()
            scales.append(scaler.get_scale())
        assert len(set(scales)) == 3 and opt.skipped_steps == 2
        return [torch.tensor(scales), *params]

    assert all(torch.equal(a, b) for a, b in zip(*compiled_and_not(run), strict=True))


@pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="2.11's Dynamo raises where any attribute of an optimizer is set, torch's own, too",
)
def test_what_a_compiled_function_sets():
    """The optimizer itself, its options and the scaler's attributes: all written, not traced."""

    def run(decorate):
        params = make_params()
        give_grads(params, 0, scale=8.0)

        @decorate
        def train():
            opt = build(True, "adamw", params)
            opt.max_grad_norm = 0.25
            opt.grad_scale = torch.tensor(8.0)
            opt.step()
            del opt.grad_scale
            return opt

        opt = train()
        assert opt.max_grad_norm == 0.25 and opt.clip_coef < 1.0
        return [*params, opt.grad_norm]

    assert all(torch.equal(a, b) for a, b in zip(*compiled_and_not(run), strict=True))
