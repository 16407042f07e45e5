"""The GradScaler contract: torch's scaler, ours and a converted one, in every order of calls."""

import pytest
import torch
from protocol_helpers import (
    INF,
    KINDS,
    NAN,
    SCALERS,
    assert_same,
    assert_unmoved,
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
from torch.nn.utils import clip_grad_norm_

_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def step_only(scaler, opt, params):
    return scaler.step(opt)


def edit_grads(scaler, opt, params):
    scaler.unscale_(opt)
    for p in params:
        p.grad.mul_(0.5)
    return scaler.step(opt)


def clip_once(scaler, opt, params):
    scaler.unscale_(opt)
    clip_grad_norm_(params, 0.7)
    return scaler.step(opt)


def clip_twice(scaler, opt, params):
    scaler.unscale_(opt)
    clip_grad_norm_(params, 2.0)
    clip_grad_norm_(params, 0.7)
    return scaler.step(opt)


def clip_loosely(scaler, opt, params):
    scaler.unscale_(opt)
    clip_grad_norm_(params, 2.0)
    return scaler.step(opt)


def unscale_first(scaler, opt, params):
    scaler.unscale_(opt)
    return scaler.step(opt)


# what is called on ours, options of ours, the same done with torch alone
ORDERS = {
    "step": (step_only, {}, step_only),
    "unscale": (unscale_first, {}, step_only),
    "edit": (edit_grads, {}, edit_grads),
    "clip": (clip_once, {}, clip_once),
    "own-clip": (step_only, {"max_grad_norm": 0.7}, clip_once),
    "unscale-own-clip": (unscale_first, {"max_grad_norm": 0.7}, clip_once),
    "both-clip": (clip_loosely, {"max_grad_norm": 0.7}, clip_twice),
}
BAD_STEPS = {0: INF, 3: -INF, 4: NAN, 9: INF}


@every_scaler
@every_kind
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("amp_scaling", [None, True, False])
def test_every_order_trains_as_torch(scaler_name, kind, order, amp_scaling):
    our_call, options, their_call = ORDERS[order]
    ours = make_ours(kind, amp_scaling=amp_scaling, **options)
    theirs = make_theirs(kind)
    asked = scaler_name != "torch" or amp_scaling is True  # to skip by itself
    scaler, stock = make_scaler(scaler_name), make_scaler("torch")
    for step in range(16):
        bad = BAD_STEPS.get(step)
        give_grads(ours[0], step, scaler.get_scale(), bad)
        give_grads(theirs[0], step, stock.get_scale(), bad)
        before = snapshot(*ours)
        our_call(scaler, ours[1], ours[0])
        their_call(stock, theirs[1], theirs[0])
        assert bool(ours[1].found_inf) == (asked and bad is not None)
        scaler.update()
        stock.update()
        assert scaler.get_scale() == stock.get_scale()
        assert scaler._get_growth_tracker() == stock._get_growth_tracker()
        if bad is not None:
            assert_unmoved(before, *ours)
        assert_same(ours, theirs)
        assert not hasattr(ours[1], "grad_scale")
    assert int(ours[1].skipped_steps) == (len(BAD_STEPS) if asked else 0)
    assert all(float(ours[1].state[p]["step"]) == 16 - len(BAD_STEPS) for p in ours[0])


@every_scaler
@pytest.mark.parametrize("seed", range(4))
def test_random_orders(scaler_name, seed):
    """Stages and overflows mixed: no flag or scale of one iteration is left for the next."""
    gen = torch.Generator().manual_seed(seed)
    calls = [step_only, unscale_first, edit_grads, clip_once]
    ours, theirs = make_scaled("sgd"), make_theirs("sgd")
    scaler, stock = make_scaler(scaler_name), make_scaler("torch")
    for step in range(25):
        call = calls[int(torch.randint(len(calls), (), generator=gen))]
        bad = INF if float(torch.rand((), generator=gen)) < 0.3 else None
        give_grads(ours[0], step, scaler.get_scale(), bad)
        give_grads(theirs[0], step, stock.get_scale(), bad)
        call(scaler, ours[1], ours[0])
        call(stock, theirs[1], theirs[0])
        scaler.update()
        stock.update()
        assert scaler.get_scale() == stock.get_scale()
        assert_same(ours, theirs)


@every_scaler
def test_scale_that_is_no_power_of_two(scaler_name):
    ours, theirs = make_scaled("sgd", max_grad_norm=0.7), make_theirs("sgd")
    scaler, stock = (make_scaler(n, init_scale=1234.567) for n in (scaler_name, "torch"))
    for step in range(5):
        scale = scaler.get_scale()
        give_grads(ours[0], step, scale)
        give_grads(theirs[0], step, scale)
        scaler.step(ours[1])
        clip_once(stock, theirs[1], theirs[0])
        scaler.update()
        stock.update()
        expected = sum(p.grad.double().square().sum() for p in ours[0]).sqrt() / scale
        torch.testing.assert_close(ours[1].grad_norm.double(), expected, rtol=1e-6, atol=0)
    assert_same(ours, theirs)


@every_scaler
@every_kind
def test_gradients_are_left_as_backward_left_them(scaler_name, kind):
    params, opt = make_scaled(kind, max_grad_norm=0.1, max_grad_value=0.01)
    scaler = make_scaler(scaler_name)
    for step, bad in enumerate((None, INF, None)):
        give_grads(params, step, 8.0, bad)
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        scaler.step(opt)
        for p, (tensor, value, version) in zip(params, before, strict=True):
            assert p.grad is tensor
            assert torch.equal(value.view(torch.int32), tensor.view(torch.int32))
            # the stock scaler's own check writes the gradients back, with the same bits
            assert scaler_name == "torch" or tensor._version == version
        scaler.update()


@every_scaler
def test_post_hooks_run_and_see_the_skip(scaler_name):
    params, opt = make_scaled(max_grad_norm=1.0)
    scaler, seen = make_scaler(scaler_name), []
    opt.register_step_post_hook(lambda o, *_: seen.append(bool(o.found_inf)))
    for step, bad in enumerate((None, INF, None)):
        give_grads(params, step, scaler.get_scale(), bad)
        scaler.step(opt)
        scaler.update()
    assert seen == [False, True, False]


@every_scaler
def test_return_value_is_passed_on(scaler_name):
    params, opt = make_scaled()
    scaler = make_scaler(scaler_name)
    give_grads(params, 0, 8.0)
    assert scaler.step(opt, None) is None
    scaler.update()
    give_grads(params, 1, 8.0)
    assert scaler.step(opt, lambda: 3.5) == 3.5


@every_scaler
@pytest.mark.parametrize("first", ["ours", "torch"])
@pytest.mark.parametrize("bad_one", [None, 0, 1, 2])
def test_several_optimizers_one_scaler(scaler_name, first, bad_one):
    """Two of ours and one of torch's; each skips for itself, the scale falls for all."""
    mixed = [make_scaled("sgd"), make_scaled("adamw"), make_theirs("sgd")]
    stock_all = [make_theirs("sgd"), make_theirs("adamw"), make_theirs("sgd")]
    scaler, stock = make_scaler(scaler_name), make_scaler("torch")
    for step in range(4):
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


@every_scaler
def test_optimizer_without_gradients_beside_another(scaler_name):
    idle, busy = make_scaled("adamw", max_grad_norm=1.0), make_scaled("sgd")
    scaler = make_scaler(scaler_name)
    before = snapshot(*idle)
    give_grads(busy[0], 0, 8.0)
    scaler.step(idle[1])
    scaler.step(busy[1])
    scaler.update()
    assert_unmoved(before, *idle)
    assert scaler.get_scale() == 8.0
    assert float(busy[1].state[busy[0][0]]["step"]) == 1


@every_scaler
@every_kind
def test_accumulation_through_autograd(scaler_name, kind):
    gen = torch.Generator().manual_seed(3)
    data = [torch.randn(4, 6, generator=gen) for _ in range(12)]
    runs = []
    for own in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        our_cls, their_cls, kwargs, extra = KINDS[kind]
        params = list(model.parameters())
        opt = (
            our_cls(params, **kwargs, **extra, max_grad_norm=0.05)
            if own
            else their_cls(params, **kwargs)
        )
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
    ours, theirs = make_scaled("sgd", max_grad_norm=0.7), make_theirs("sgd")
    scaler = make_scaler(scaler_name, enabled=False)
    assert not scaler.is_enabled() and scaler.get_scale() == 1.0 and scaler.state_dict() == {}
    for step in range(3):
        give_grads(ours[0], step, 1.0)
        give_grads(theirs[0], step, 1.0)
        scaler.unscale_(ours[1])
        scaler.step(ours[1])
        scaler.update()
        clip_grad_norm_(theirs[0], 0.7)
        theirs[1].step()
    assert_same(ours, theirs)
    give_grads(ours[0], 9, 1.0, NAN)
    scaler.step(ours[1])  # nobody is in charge: the NaN goes through, as in torch
    assert not ours[0][1].isfinite().all()
    assert int(ours[1].skipped_steps) == 0


# Precision


@every_scaler
@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients(scaler_name, kind, dtype):
    """Unscaled in fp32: a gradient of 1e-6 survives, which in fp16 it would not."""
    params, opt = make_scaled(kind, dtype)
    theirs = [torch.nn.Parameter(p.detach().float()) for p in params]
    _, their_cls, kwargs, _ = KINDS[kind]
    their_opt = their_cls(theirs, **kwargs)
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
