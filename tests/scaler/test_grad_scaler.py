"""The GradScaler contract: torch's scaler, ours and a converted one, in every order of calls."""

import copy

import pytest
import torch
from protocol_helpers import (
    INF,
    NAN,
    SCALERS,
    assert_same,
    assert_unmoved,
    build,
    every_kind,
    every_scaler,
    give_grads,
    make_ours,
    make_scaled,
    make_scaler,
    make_theirs,
    on_every_backend,
    snapshot,
)
from scaler_helpers import BesideTorch, clip_to, iterate, step_only
from torch.nn.utils import clip_grad_norm_

_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def edit_grads(scaler, opt, params):
    scaler.unscale_(opt)
    for p in params:
        p.grad.mul_(0.5)
    return scaler.step(opt)


# what is called on ours, options of ours, the same done with torch alone
ORDERS = {
    "step": (step_only, {}, step_only),
    "unscale": (clip_to(), {}, step_only),
    "edit": (edit_grads, {}, edit_grads),
    "clip": (clip_to(0.7), {}, clip_to(0.7)),
    "own-clip": (step_only, {"max_grad_norm": 0.7}, clip_to(0.7)),
    "unscale-own-clip": (clip_to(), {"max_grad_norm": 0.7}, clip_to(0.7)),
    "both-clip": (clip_to(2.0), {"max_grad_norm": 0.7}, clip_to(2.0, 0.7)),
}
BAD_STEPS = {0: INF, 3: -INF, 4: NAN, 9: INF}


@every_scaler
@every_kind
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("amp_scaling", [None, True, False])
def test_every_order_trains_as_torch(scaler_name, kind, order, amp_scaling):
    our_call, options, their_call = ORDERS[order]
    params, opt = ours = make_ours(kind, amp_scaling=amp_scaling, **options)
    both = BesideTorch(scaler_name, ours, make_theirs(kind), our_call, their_call)
    asked = scaler_name != "torch" or amp_scaling is True  # to skip by itself
    for step in range(14):
        bad, before = BAD_STEPS.get(step), snapshot(params, opt)
        both.iterate(step, bad)
        assert bool(opt.found_inf) == (asked and bad is not None)
        if bad is not None:
            assert_unmoved(before, params, opt)
        assert not hasattr(opt, "grad_scale")
    assert int(opt.skipped_steps) == (len(BAD_STEPS) if asked else 0)
    assert all(float(opt.state[p]["step"]) == 14 - len(BAD_STEPS) for p in params)


@every_scaler
@pytest.mark.parametrize("seed", range(4))
def test_random_orders(scaler_name, seed):
    """Stages and overflows mixed: no flag or scale of one iteration is left for the next."""
    gen = torch.Generator().manual_seed(seed)
    calls = [step_only, clip_to(), edit_grads, clip_to(0.7)]
    both = BesideTorch(scaler_name, make_scaled("sgd"), make_theirs("sgd"))
    for step in range(25):
        both.our_call = both.their_call = calls[int(torch.randint(len(calls), (), generator=gen))]
        both.iterate(step, INF if float(torch.rand((), generator=gen)) < 0.3 else None)


@every_scaler
def test_scale_that_is_no_power_of_two(scaler_name):
    params, opt = ours = make_scaled("sgd", max_grad_norm=0.7)
    theirs = make_theirs("sgd")
    both = BesideTorch(scaler_name, ours, theirs, their_call=clip_to(0.7), init_scale=1234.567)
    for step in range(5):
        scale = both.scaler.get_scale()
        both.iterate(step)
        expected = sum(p.grad.double().square().sum() for p in params).sqrt() / scale
        torch.testing.assert_close(opt.grad_norm.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("error")  # no `grad_scaler` in the signature: torch would warn of it
@every_scaler
@every_kind
def test_what_a_step_leaves_tells_and_returns(scaler_name, kind):
    """Gradients as backward left them, post-hooks that see the skip, the closure's value."""
    params, opt = make_scaled(kind, max_grad_norm=0.1, max_grad_value=0.01)
    scaler, seen = make_scaler(scaler_name), []
    opt.register_step_post_hook(lambda o, *_: seen.append(bool(o.found_inf)))
    for step, bad in enumerate((None, INF, None)):
        give_grads(params, step, 8.0, bad)
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        assert scaler.step(opt, lambda: 3.5) == 3.5
        for p, (tensor, value, version) in zip(params, before, strict=True):
            assert p.grad is tensor
            assert torch.equal(value.view(torch.int32), tensor.view(torch.int32))
            # the stock scaler's own check writes the gradients back, with the same bits
            assert scaler_name == "torch" or tensor._version == version
        scaler.update()
    assert seen == [False, True, False]


@every_scaler
@pytest.mark.parametrize("first", ["ours", "torch"])
@pytest.mark.parametrize("bad_one", [None, 0, 1, 2])
def test_several_optimizers_one_scaler(scaler_name, first, bad_one):
    """Two of ours and one of torch's; each skips for itself, the scale falls for all.

    And one that has no gradients, of which torch's scaler would complain if it were torch's.
    """
    mixed = [make_scaled("sgd"), make_scaled("adamw"), make_theirs("sgd")]
    stock_all = [make_theirs("sgd"), make_theirs("adamw"), make_theirs("sgd")]
    idle = make_scaled("adamw", max_grad_norm=1.0)
    before = snapshot(*idle)
    scaler, stock = make_scaler(scaler_name), make_scaler("torch")
    for step in range(4):
        scaler.step(idle[1])
        for s, opts in ((scaler, mixed), (stock, stock_all)):
            for i, (params, _) in enumerate(opts):
                give_grads(params, 10 * i + step, s.get_scale(), INF if i == bad_one else None)
            for _, opt in opts if first == "ours" else reversed(opts):
                s.step(opt)
            s.update()
        assert scaler.get_scale() == stock.get_scale()
        for ours, theirs in zip(mixed, stock_all, strict=True):
            assert_same(ours, theirs)
        # update() adds the flags of all optimizers up in one of them: not in the user's copy
        assert [float(mixed[i][1].found_inf) for i in (0, 1)] == [bad_one == 0, bad_one == 1]
    assert_unmoved(before, *idle)


@every_scaler
@every_kind
def test_accumulation_through_autograd(scaler_name, kind):
    gen = torch.Generator().manual_seed(3)
    data = [torch.randn(4, 6, generator=gen) for _ in range(12)]
    runs = []
    for own in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        params = list(model.parameters())
        opt = build(own, kind, params, **({"max_grad_norm": 0.05} if own else {}))
        scaler = make_scaler(scaler_name if own else "torch", init_scale=2.0**10)
        for i, x in enumerate(data):
            scaler.scale(model(x).square().mean() / 3).backward()
            if i % 3 == 2:
                if not own:
                    scaler.unscale_(opt)
                    clip_grad_norm_(params, 0.05)
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
        runs.append((params, opt))
    assert_same(*runs)


@pytest.mark.parametrize("scaler_name", SCALERS)
def test_disabled_scaler(scaler_name):
    params, opt = ours = make_scaled("sgd", max_grad_norm=0.7)
    both = BesideTorch(
        scaler_name, ours, make_theirs("sgd"), clip_to(), clip_to(0.7), enabled=False
    )
    scaler = both.scaler
    assert not scaler.is_enabled() and scaler.get_scale() == 1.0 and scaler.state_dict() == {}
    for step in range(3):
        both.iterate(step)
    iterate(scaler, ours, 9, NAN)  # nobody is in charge: the NaN goes through, as in torch
    assert not params[1].isfinite().all()
    assert int(opt.skipped_steps) == 0


# Precision


@every_scaler
@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients(scaler_name, kind, dtype):
    """Unscaled in fp32: a gradient of 1e-6 survives, which in fp16 it would not."""
    params, opt = make_scaled(kind, dtype)
    theirs = [torch.nn.Parameter(p.detach().float()) for p in params]
    their_opt = build(False, kind, theirs)
    scaler = make_scaler(scaler_name, init_scale=2.0**14)
    for step, bad in enumerate((None, INF, None, NAN, None)):
        scale = scaler.get_scale()
        give_grads(params, step, scale * 1e-6, bad)
        before = snapshot(params, opt)
        scaler.step(opt)
        scaler.update()
        if bad is not None:
            assert_unmoved(before, params, opt)
            assert scaler.get_scale() == scale / 2
            continue
        for p, q in zip(params, theirs, strict=True):
            q.grad = p.grad.float() / scale
        their_opt.step()
    for p, q in zip(params, theirs, strict=True):
        state = opt.state[p]
        torch.testing.assert_close(state["master_param"], q.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(p.detach(), state["master_param"].to(dtype))
        for name, value in their_opt.state[q].items():
            atol = 1e-6 * float(value.abs().max())
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=atol)


@every_scaler
@every_kind
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
def test_large_finite_gradient_is_no_overflow(scaler_name, kind, options):
    params, opt = make_scaled(kind, **options)
    scaler = make_scaler(scaler_name, init_scale=2.0)
    give_grads(params, 0, 2.0)
    params[1].grad.fill_(1e30)
    scaler.step(opt)
    assert float(opt.found_inf) == 0 and int(opt.skipped_steps) == 0
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert float(opt.state[params[1]]["step"]) == 1
    if options:
        assert opt.grad_norm.item() == pytest.approx(37**0.5 * 0.5e30, rel=1e-6)


# grad_scale and found_inf, set by hand

FLAGS = {
    "int0": (0, False),
    "zero": (torch.tensor(0.0), False),
    "zero-shape1": (torch.zeros(1), False),
    "one": (torch.tensor(1.0), True),
    "one-shape1": (torch.ones(1), True),
    "sum-of-two": (torch.tensor(2.0), True),
    "nan": (torch.tensor(NAN), True),
}


@every_kind
@pytest.mark.parametrize("scale", [None, torch.tensor(4.0), torch.tensor([4.0])], ids=str)
@pytest.mark.parametrize("flag", FLAGS)
def test_attribute_protocol(kind, scale, flag):
    (params, opt), theirs = make_scaled(kind), make_theirs(kind)
    value, skips = copy.deepcopy(FLAGS[flag])
    give_grads(params, 0, 1.0 if scale is None else 4.0)
    give_grads(theirs[0], 0, 1.0)
    before = snapshot(params, opt)
    opt.grad_scale, opt.found_inf = scale, value
    opt.step()
    del opt.grad_scale, opt.found_inf
    assert float(opt.found_inf) == skips and int(opt.skipped_steps) == skips
    assert not hasattr(opt, "grad_scale")
    if skips:
        assert_unmoved(before, params, opt)
        give_grads(params, 0, 1.0)
        opt.step()
    theirs[1].step()
    assert_same((params, opt), theirs)
    torch.testing.assert_close(value, FLAGS[flag][0], rtol=0, atol=0, equal_nan=True)  # only read


# An error in the middle


def break_body(params, opt):
    dense = params[-2].grad
    params[-2].grad = dense.to_sparse()
    return lambda: setattr(params[-2], "grad", dense)


def hook(*_):
    raise RuntimeError("sparse, says the hook")


BREAKS = {
    "body": break_body,
    "pre-hook": lambda params, opt: opt.register_step_pre_hook(hook).remove,
    "post-hook": lambda params, opt: opt.register_step_post_hook(hook).remove,
}


@every_scaler
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("where", BREAKS)
@pytest.mark.parametrize("preset", [None, 2.0, torch.tensor(2.0)], ids=["", "float", "tensor"])
def test_error_in_step_leaves_no_scale_behind(scaler_name, unscale, where, preset):
    """But the user's own, by which the next step divides as well: by the product of both, or after
    unscale_() by the user's alone."""
    (params, opt), theirs = make_scaled("sgd"), make_theirs("sgd")
    scaler = make_scaler(scaler_name)
    give_grads(params, 0, 8.0 * (preset or 1.0))
    if unscale:
        scaler.unscale_(opt)
    if preset is not None:
        opt.grad_scale = preset
    mend = BREAKS[where](params, opt)
    before = snapshot(params, opt)
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.step(opt)
    mend()
    if where != "post-hook":
        assert_unmoved(before, params, opt)
    assert getattr(opt, "grad_scale", None) == preset
    scaler.step(opt)
    scaler.update()
    assert not hasattr(opt, "grad_scale")
    give_grads(theirs[0], 0, 1.0)
    for _ in range(2 if where == "post-hook" else 1):
        theirs[1].step()
    assert_same((params, opt), theirs)
    assert scaler.get_scale() == 8.0


@every_scaler
def test_misuse_raises_as_in_torch(scaler_name):
    params, opt = make_scaled()
    scaler = make_scaler(scaler_name)
    give_grads(params, 0, 8.0)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(opt, closure=lambda: 0.0)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="already been called on this optimizer"):
        scaler.unscale_(opt)
    scaler.step(opt)
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(opt)
    with pytest.raises(RuntimeError, match="after step"):
        scaler.unscale_(opt)
    unused = SCALERS[scaler_name]()
    with pytest.raises(AssertionError, match="_scale is None"):
        unused.step(opt)
