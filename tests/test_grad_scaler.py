"""The GradScaler contract: torch's scaler, ours and a converted one, in every order of calls."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import fusedopt

SCALERS = {
    "torch": lambda **kw: torch.amp.GradScaler("cpu", **kw),
    "ours": lambda **kw: fusedopt.GradScaler("cpu", **kw),
    "converted": lambda **kw: fusedopt.fuse_scaler(torch.amp.GradScaler("cpu", **kw)),
}
ADAMW = (fusedopt.FusedAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}, {})
SGD = (
    fusedopt.FusedSGD,
    torch.optim.SGD,
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"decoupled_weight_decay": False},
)
KINDS = {"adamw": ADAMW, "sgd": SGD}
INF, NAN = float("inf"), float("nan")

every_scaler = pytest.mark.parametrize("scaler_name", SCALERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _every_backend(backend, monkeypatch):
    # "auto" takes the CPU kernels wherever they can serve: not for float64
    monkeypatch.setenv("FUSEDOPT_BACKEND", "auto" if backend == "cpu" else backend)


def make_params(dtype=torch.float32):
    gen = torch.Generator().manual_seed(7)
    return [
        torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in ((5, 3), (37,), ())
    ]


def make_ours(kind="adamw", dtype=torch.float32, **options):
    cls, _, kwargs, extra = KINDS[kind]
    params = make_params(dtype)
    return params, cls(params, **kwargs, **{**extra, **options})


def make_theirs(kind="adamw"):
    _, cls, kwargs, _ = KINDS[kind]
    params = make_params()
    return params, cls(params, **kwargs, foreach=False)


def make_scaler(name, **kwargs):
    scaler = SCALERS[name](**{"init_scale": 8.0, "growth_interval": 4, **kwargs})
    scaler.scale(torch.zeros(()))
    return scaler


def give_grads(params, step, scale, bad=None):
    """Scaled gradients; `bad` goes into the last element of the middle tensor."""
    gen = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=gen) * scale
        if bad is not None and i == 1:
            grad[-1] = bad
        param.grad = grad.to(param.dtype)


def snapshot(params, opt):
    state = {
        i: {k: v.clone() for k, v in opt.state.get(p, {}).items()} for i, p in enumerate(params)
    }
    return [p.detach().clone() for p in params], state


def assert_unmoved(before, params, opt):
    """Bit for bit; a state that was born in the meantime is as if no step had been."""
    old_params, old_state = before
    for i, (old, param) in enumerate(zip(old_params, params, strict=True)):
        assert torch.equal(old, param), f"param {i} moved"
        for key, value in opt.state.get(param, {}).items():
            if key in old_state[i]:
                assert torch.equal(old_state[i][key], value), (i, key)
            elif key == "master_param":
                assert torch.equal(value, param.float())
            else:
                assert not value.any(), (i, key)


def assert_same(ours, theirs, rtol=1e-5, atol=1e-6):
    (our_params, our_opt), (their_params, their_opt) = ours, theirs
    for i, (a, b) in enumerate(zip(our_params, their_params, strict=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, i=i: f"param {i}: {m}")
        for name, value in their_opt.state.get(b, {}).items():
            if value is not None:
                mine = our_opt.state[a][name]
                torch.testing.assert_close(mine, value, rtol=rtol, atol=atol)


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
def test_every_order_trains_as_torch(scaler_name, kind, order):
    our_call, options, their_call = ORDERS[order]
    ours, theirs = make_ours(kind, **options), make_theirs(kind)
    scaler, stock = make_scaler(scaler_name), make_scaler("torch")
    for step in range(16):
        bad = BAD_STEPS.get(step)
        give_grads(ours[0], step, scaler.get_scale(), bad)
        give_grads(theirs[0], step, stock.get_scale(), bad)
        before = snapshot(*ours)
        our_call(scaler, ours[1], ours[0])
        their_call(stock, theirs[1], theirs[0])
        assert bool(ours[1].found_inf) == (bad is not None)
        scaler.update()
        stock.update()
        assert scaler.get_scale() == stock.get_scale()
        assert scaler._get_growth_tracker() == stock._get_growth_tracker()
        if bad is not None:
            assert_unmoved(before, *ours)
        assert_same(ours, theirs)
        assert not hasattr(ours[1], "grad_scale")
    assert int(ours[1].skipped_steps) == len(BAD_STEPS)
    assert all(float(ours[1].state[p]["step"]) == 16 - len(BAD_STEPS) for p in ours[0])


@every_scaler
@pytest.mark.parametrize("seed", range(4))
def test_random_orders(scaler_name, seed):
    """Stages and overflows mixed: no flag or scale of one iteration is left for the next."""
    gen = torch.Generator().manual_seed(seed)
    calls = [step_only, unscale_first, edit_grads, clip_once]
    ours, theirs = make_ours("sgd"), make_theirs("sgd")
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
    ours, theirs = make_ours("sgd", max_grad_norm=0.7), make_theirs("sgd")
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
    params, opt = make_ours(kind, max_grad_norm=0.1, max_grad_value=0.01)
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
def test_hooks_run_and_see_the_skip(scaler_name):
    params, opt = make_ours(max_grad_norm=1.0)
    scaler, flags, seen = make_scaler(scaler_name), [], []
    opt.register_step_pre_hook(lambda o, *_: flags.append(bool(o.found_inf)))
    opt.register_step_post_hook(lambda o, *_: seen.append(bool(o.found_inf)))
    for step, bad in enumerate((None, INF, None)):
        give_grads(params, step, scaler.get_scale(), bad)
        scaler.step(opt)
        scaler.update()
    assert seen == [False, True, False]
    # before the step it is what the scaler set: torch's has looked by then, ours has not
    assert flags == ([False, True, False] if scaler_name == "torch" else [False] * 3)


@every_scaler
def test_return_value_is_passed_on(scaler_name):
    params, opt = make_ours()
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
    mixed = [make_ours("sgd"), make_ours("adamw"), make_theirs("sgd")]
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
    idle, busy = make_ours("adamw", max_grad_norm=1.0), make_ours("sgd")
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
    ours, theirs = make_ours("sgd", max_grad_norm=0.7), make_theirs("sgd")
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


# The attributes a scaler sets, set by hand

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
    (params, opt), theirs = make_ours(kind), make_theirs(kind)
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


@every_kind
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_own_check_counts_when_the_flag_is_stale(kind, options):
    """found_inf says zero, the gradients say otherwise (an edit after unscale_): nothing moves."""
    params, opt = make_ours(kind, **options)
    give_grads(params, 0, 1.0, NAN)
    before = snapshot(params, opt)
    opt.grad_scale, opt.found_inf = None, torch.tensor(0.0)
    opt.step()
    del opt.grad_scale, opt.found_inf
    assert_unmoved(before, params, opt)
    assert float(opt.found_inf) == 1.0


@every_scaler
@pytest.mark.parametrize("preset", [2.0, torch.tensor(2.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("unscale", [False, True])
def test_preset_grad_scale(scaler_name, preset, unscale):
    """READY: the product divides. UNSCALED: the preset is the only divisor."""
    ours, theirs = make_ours("sgd"), make_theirs("sgd")
    scaler = make_scaler(scaler_name)
    for step in range(2):
        give_grads(ours[0], step, 8.0 * 2.0)
        give_grads(theirs[0], step, 1.0)
        if unscale:
            scaler.unscale_(ours[1])
        ours[1].grad_scale = preset
        scaler.step(ours[1])
        scaler.update()
        theirs[1].step()
        assert not hasattr(ours[1], "grad_scale")
    assert_same(ours, theirs)


def test_grad_scale_without_a_scaler_divides_and_stays():
    ours, theirs = make_ours("sgd"), make_theirs("sgd")
    ours[1].grad_scale = torch.tensor(16.0)
    for step in range(3):
        give_grads(ours[0], step, 16.0)
        give_grads(theirs[0], step, 1.0)
        ours[1].step()
        theirs[1].step()
    assert_same(ours, theirs)
    assert float(ours[1].grad_scale) == 16.0


# An error in the middle


def break_body(params, opt):
    dense = params[-2].grad
    params[-2].grad = dense.to_sparse()
    return lambda: setattr(params[-2], "grad", dense)


def break_hook(register):
    def hook(*_):
        raise RuntimeError("sparse, says the hook")

    def apply(params, opt):
        return getattr(opt, register)(hook).remove

    return apply


BREAKS = {
    "body": break_body,
    "pre-hook": break_hook("register_step_pre_hook"),
    "post-hook": break_hook("register_step_post_hook"),
}


@every_scaler
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("where", BREAKS)
def test_error_in_step_leaves_no_scale_behind(scaler_name, unscale, where):
    ours, theirs = make_ours("sgd"), make_theirs("sgd")
    params, opt = ours
    scaler = make_scaler(scaler_name)
    give_grads(params, 0, 8.0)
    if unscale:
        scaler.unscale_(opt)
    mend = BREAKS[where](params, opt)
    before = snapshot(params, opt)
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.step(opt)
    mend()
    if where != "post-hook":
        assert_unmoved(before, params, opt)
    if where == "body":
        assert not hasattr(opt, "grad_scale")
    scaler.step(opt)
    scaler.update()
    give_grads(theirs[0], 0, 1.0)
    for _ in range(2 if where == "post-hook" else 1):
        theirs[1].step()
    assert_same(ours, theirs)
    assert scaler.get_scale() == 8.0


@every_scaler
def test_error_in_step_keeps_the_users_grad_scale(scaler_name):
    params, opt = make_ours("sgd")
    scaler = make_scaler(scaler_name)
    give_grads(params, 0, 16.0)
    opt.grad_scale = 2.0
    mend = break_body(params, opt)
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.step(opt)
    mend()
    assert float(opt.grad_scale) == 2.0
    scaler.step(opt)
    theirs = make_theirs("sgd")
    give_grads(theirs[0], 0, 1.0)
    theirs[1].step()
    assert_same((params, opt), theirs)


@every_scaler
def test_misuse_raises_as_in_torch(scaler_name):
    params, opt = make_ours()
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


# The sweep


@pytest.fixture
def sweeps(monkeypatch):
    calls = []
    real = torch._amp_foreach_non_finite_check_and_unscale_

    def counted(grads, found_inf, inv_scale):
        calls.append(len(grads))
        return real(grads, found_inf, inv_scale)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", counted)
    return calls


@pytest.mark.parametrize("scaler_name", ["ours", "converted"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}])
def test_no_sweep_over_our_gradients(scaler_name, options, sweeps):
    params, opt = make_ours("adamw", **options)
    scaler = make_scaler(scaler_name)
    for step, bad in enumerate((None, INF, NAN, None)):
        give_grads(params, step, scaler.get_scale(), bad)
        scaler.step(opt)
        scaler.update()
    assert sweeps == []
    assert (scaler.get_scale(), int(opt.skipped_steps)) == (2.0, 2)
    foreign, stock_opt = make_theirs()
    give_grads(foreign, 0, 2.0)
    scaler.step(stock_opt)
    assert len(sweeps) == 1
    scaler.update()
    give_grads(params, 9, 2.0)
    scaler.unscale_(opt)
    scaler.step(opt)
    assert len(sweeps) == 2


def test_stock_scaler_sweeps(sweeps):
    """The count above can be other than zero."""
    params, opt = make_ours()
    scaler = make_scaler("torch")
    give_grads(params, 0, 8.0)
    scaler.step(opt)
    assert len(sweeps) == 1


@pytest.mark.parametrize("scaler_name", ["ours", "converted"])
def test_foreign_fused_optimizer_is_checked_by_torch(scaler_name):
    """An optimizer that speaks the protocol and is not ours relies on the scaler's check."""
    params = make_params()
    opt = torch.optim.AdamW(params, fused=True)
    scaler = make_scaler(scaler_name)
    give_grads(params, 0, 8.0, INF)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(a, b) for a, b in zip(params, make_params(), strict=True))


# The scaler as an object


def test_constructor_is_torchs():
    assert inspect.signature(fusedopt.GradScaler) == inspect.signature(torch.amp.GradScaler)
    assert issubclass(fusedopt.GradScaler, torch.amp.GradScaler)


@pytest.mark.parametrize("scaler_name", SCALERS)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_scaler_copies(scaler_name, copier, sweeps):
    params, opt = make_ours()
    scaler = make_scaler(scaler_name)
    give_grads(params, 0, 8.0, INF)
    scaler.step(opt)
    scaler.update()
    del sweeps[:]
    twin = copier(scaler)
    assert twin.state_dict() == scaler.state_dict() and twin.get_scale() == 4.0
    twin.scale(torch.zeros(()))
    give_grads(params, 1, 4.0)
    twin.step(opt)
    twin.update()
    assert len(sweeps) == (1 if scaler_name == "torch" else 0)
    assert twin._get_growth_tracker() == 1 and scaler._get_growth_tracker() == 0
    assert float(opt.state[params[0]]["step"]) == 1


@pytest.mark.parametrize("source", SCALERS)
@pytest.mark.parametrize("target", SCALERS)
def test_scaler_state_dict_travels(source, target):
    params, opt = make_ours()
    scaler = make_scaler(source)
    for step, bad in enumerate((INF, None)):
        give_grads(params, step, scaler.get_scale(), bad)
        scaler.step(opt)
        scaler.update()
    other = make_scaler(target, init_scale=1.0)
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()
    assert set(other.state_dict()) == set(make_scaler("torch").state_dict())


class CountingScaler(torch.amp.GradScaler):
    updates = 0

    def update(self, new_scale=None):
        self.updates += 1
        super().update(new_scale)


@pytest.mark.parametrize("copied", [False, True])
def test_fuse_keeps_a_subclass(copied, sweeps):
    scaler = CountingScaler("cpu", init_scale=8.0)
    assert fusedopt.fuse_scaler(scaler) is scaler
    if copied:
        scaler = pickle.loads(pickle.dumps(scaler))
    assert isinstance(scaler, CountingScaler)
    scaler.scale(torch.zeros(()))
    params, opt = make_ours()
    give_grads(params, 0, 8.0, NAN)
    scaler.step(opt)
    scaler.update()
    assert (scaler.get_scale(), scaler.updates, sweeps) == (4.0, 1, [])


@pytest.mark.parametrize("module", [torch.cuda.amp, torch.cpu.amp], ids=lambda m: m.__name__)
def test_fuse_deprecated_classes(module, sweeps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaler = module.GradScaler(init_scale=8.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fusedopt.fuse_scaler(scaler) is scaler
    assert isinstance(scaler, torch.amp.GradScaler)
    scaler.scale(torch.zeros(()))
    params, opt = make_ours()
    give_grads(params, 0, scaler.get_scale())
    scaler.step(opt)
    scaler.update()
    assert sweeps == []
    assert float(opt.state[params[0]]["step"]) == 1


def test_fuse_in_the_middle_of_a_run(sweeps):
    """State, scale and growth count go on; converting twice is converting once."""
    ours, theirs = make_ours("sgd"), make_theirs("sgd")
    scaler, stock = make_scaler("torch"), make_scaler("torch")
    for step in range(9):
        if step in (3, 5):
            assert fusedopt.fuse_scaler(scaler) is scaler
        bad = INF if step in (1, 4) else None
        for s, (params, opt) in ((scaler, ours), (stock, theirs)):
            give_grads(params, step, s.get_scale(), bad)
            s.step(opt)
            s.update()
        assert scaler.state_dict() == stock.state_dict()
    assert_same(ours, theirs)
    assert len(sweeps) == 9 + 3
    own = fusedopt.GradScaler("cpu")
    assert fusedopt.fuse_scaler(own) is own and type(own) is fusedopt.GradScaler


def test_fuse_refuses_a_sharded_scaler():
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    scaler = ShardedGradScaler("cpu")
    with pytest.raises((TypeError, ValueError, RuntimeError), match="ShardedGradScaler"):
        fusedopt.fuse_scaler(scaler)
    assert type(scaler) is ShardedGradScaler


@pytest.mark.parametrize("thing", [None, 8.0, object()])
def test_fuse_refuses_what_is_no_scaler(thing):
    with pytest.raises(TypeError, match="GradScaler"):
        fusedopt.fuse_scaler(thing)


# Precision


@every_scaler
@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients(scaler_name, kind, dtype):
    """Unscaled in fp32: a gradient of 1e-6 survives, which in fp16 it would not."""
    params, opt = make_ours(kind, dtype)
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
    params, opt = make_ours(kind, **options)
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


# Who may hand the scale over


def test_flag_is_on_by_default_and_guarded():
    for cls in (fusedopt.FusedAdamW, fusedopt.FusedSGD):
        assert cls(make_params())._step_supports_amp_scaling is True
        assert cls(make_params(), amp_scaling=True)._step_supports_amp_scaling is True
        assert cls(make_params(), amp_scaling=False)._step_supports_amp_scaling is False
    params, opt = make_ours()
    params[1]._fsdp_flattened = True
    assert opt._step_supports_amp_scaling is False
    params[1]._fsdp_flattened = False
    assert opt._step_supports_amp_scaling is True


def test_flag_survives_wrappers_that_do_not_change_the_step():
    _, opt = make_ours()
    torch.optim.lr_scheduler.StepLR(opt, 1)
    assert opt._step_supports_amp_scaling is True

    class Renamed(fusedopt.FusedAdamW):
        pass

    assert Renamed(make_params())._step_supports_amp_scaling is True
    assert copy.deepcopy(opt)._step_supports_amp_scaling is True
    assert copy.deepcopy(make_ours(amp_scaling=False)[1])._step_supports_amp_scaling is False


@every_scaler
@every_kind
def test_amp_scaling_off_is_a_stock_optimizer(scaler_name, kind):
    ours, theirs = make_ours(kind, amp_scaling=False), make_theirs(kind)
    scaler, stock = make_scaler(scaler_name), make_scaler("torch")
    calls = []
    ours[1].register_step_post_hook(lambda *_: calls.append(1))
    for step, bad in enumerate((INF, None, NAN, None)):
        for s, (params, opt) in ((scaler, ours), (stock, theirs)):
            give_grads(params, step, s.get_scale(), bad)
            s.step(opt)
            s.update()
        assert scaler.get_scale() == stock.get_scale()
        for p, q in zip(ours[0], theirs[0], strict=True):
            assert torch.equal(p.grad.nan_to_num(), q.grad.nan_to_num())  # unscaled in place
        assert_same(ours, theirs)
    assert len(calls) == 2


def test_amp_scaling_off_refuses_fp16_gradients_as_torch():
    params, opt = make_ours(dtype=torch.float16, amp_scaling=False)
    give_grads(params, 0, 8.0)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        make_scaler("ours").step(opt)


# Clients, re-created by hand


def clipping_subclass(base):
    """detectron2's full-model clipping: a class made on the fly whose step clips first."""

    def step(self, closure=None):
        clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 0.7)
        base.step(self, closure)

    return type(base.__name__ + "WithGradientClip", (base,), {"step": step})


@every_scaler
@every_kind
def test_detectron2_clips_inside_step(scaler_name, kind):
    our_cls, their_cls, kwargs, extra = KINDS[kind]
    ours, theirs = make_params(), make_params()
    our_opt = clipping_subclass(our_cls)(ours, **kwargs, **extra)
    their_opt = clipping_subclass(their_cls)(theirs, **kwargs)
    assert our_opt._step_supports_amp_scaling is False
    assert our_cls(make_params(), **kwargs, **extra)._step_supports_amp_scaling is True
    scaler, stock = make_scaler(scaler_name), make_scaler("torch")
    for step, bad in enumerate((None, INF, None, None)):
        for s, params, opt in ((scaler, ours, our_opt), (stock, theirs, their_opt)):
            give_grads(params, step, s.get_scale(), bad)
            s.step(opt)
            s.update()
        assert scaler.get_scale() == stock.get_scale()
        assert_same((ours, our_opt), (theirs, their_opt))


class Accelerated:
    """accelerate's AcceleratedOptimizer: step replaced by an attribute, closure by position."""

    def __init__(self, optimizer, scaler):
        self.optimizer, self.scaler, self.called, self.step_was_skipped = optimizer, scaler, 0, 0
        self.original = optimizer.step
        optimizer.load_state_dict(optimizer.state_dict())

        def patched_step(*args, **kwargs):
            self.called = True
            return self.original(*args, **kwargs)

        self.patched = patched_step

    def step(self, closure=None):
        self.called = False
        self.optimizer.step = self.patched
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.step_was_skipped = not self.called
        self.optimizer.step = self.original


@every_scaler
@every_kind
@pytest.mark.parametrize("amp_scaling", [None, False])
@pytest.mark.parametrize("clip", [False, True])
def test_accelerate(scaler_name, kind, amp_scaling, clip):
    ours, theirs = make_ours(kind, amp_scaling=amp_scaling), make_theirs(kind)
    scaler, stock = make_scaler(scaler_name), make_scaler("torch")
    wrapped = Accelerated(ours[1], scaler), Accelerated(theirs[1], stock)
    for step, bad in enumerate((INF, None, None, NAN, None)):
        for wrapper, (params, opt) in zip(wrapped, (ours, theirs), strict=True):
            give_grads(params, step, wrapper.scaler.get_scale(), bad)
            if clip:
                wrapper.scaler.unscale_(opt)
                clip_grad_norm_(params, 0.7)
            wrapper.step()
        assert scaler.get_scale() == stock.get_scale()
        assert_same(ours, theirs)
        assert bool(ours[1].found_inf) == (bad is not None) or amp_scaling is False
        if amp_scaling is False:
            assert wrapped[0].step_was_skipped == (bad is not None)


def lightning_step(opt, scaler, closure, clip=None):
    """Lightning's MixedPrecision.optimizer_step."""
    handles_unscaling = getattr(opt, "_step_supports_amp_scaling", False)
    closure()
    if not handles_unscaling:
        scaler.unscale_(opt)
    if clip is not None:
        if handles_unscaling:
            raise RuntimeError("gradient clipping is not supported with this optimizer")
        clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], clip)
    scaler.step(opt)
    scaler.update()


@every_scaler
@every_kind
@pytest.mark.parametrize("options", [{"max_grad_norm": 0.7}, {"amp_scaling": False}])
def test_lightning(scaler_name, kind, options):
    ours, theirs = make_ours(kind, **options), make_theirs(kind)
    scaler, stock = make_scaler(scaler_name), make_scaler("torch")
    trainer_clip = None if "max_grad_norm" in options else 0.7
    for step, bad in enumerate((None, INF, None, None)):
        for s, (params, opt), clip in ((scaler, ours, trainer_clip), (stock, theirs, 0.7)):
            lightning_step(
                opt,
                s,
                lambda s=s, p=params, i=step, b=bad: give_grads(p, i, s.get_scale(), b),
                clip,
            )
        assert scaler.get_scale() == stock.get_scale()
        assert_same(ours, theirs)


class FabricOptimizer:
    """Lightning Fabric's wrapper: of the optimizer's class, without its __init__ and __dict__."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        cls = type(optimizer)
        self.__class__ = type("Fabric" + cls.__name__, (type(self), cls), {})

    def __getattr__(self, name):
        return getattr(self.__dict__["_optimizer"], name)

    def state_dict(self):
        return self._optimizer.state_dict()

    def step(self, closure=None):
        return self._optimizer.step(closure)


@every_kind
def test_fabric(kind):
    ours, theirs = make_ours(kind), make_theirs(kind)
    wrapper = FabricOptimizer(ours[1])
    assert isinstance(wrapper, torch.optim.Optimizer)
    assert wrapper.param_groups is ours[1].param_groups
    for step in range(2):
        give_grads(ours[0], step, 1.0)
        give_grads(theirs[0], step, 1.0)
        assert wrapper.step(lambda: 2.0) == 2.0
        theirs[1].step()
    assert_same(ours, theirs)
    assert set(wrapper.state_dict()) == {"state", "param_groups"}


@every_scaler
def test_no_warning_under_a_scaler(scaler_name):
    """No `grad_scaler` parameter in step, so none of torch's deprecated path."""
    params, opt = make_ours()
    scaler = make_scaler(scaler_name)
    assert "grad_scaler" not in inspect.signature(opt.step).parameters
    give_grads(params, 0, 8.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(opt)
        scaler.update()
