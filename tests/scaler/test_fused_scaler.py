"""fusedopt.GradScaler and fuse_scaler: the sweep they leave out, and both as objects."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from protocol_helpers import (
    INF,
    NAN,
    SCALERS,
    give_grads,
    make_ours,
    make_params,
    make_scaler,
    make_theirs,
    on_every_backend,
)
from scaler_helpers import BesideTorch, iterate

import fusedopt

_every_backend = pytest.fixture(autouse=True)(on_every_backend)


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
        iterate(scaler, (params, opt), step, bad)
    assert sweeps == []
    assert (scaler.get_scale(), int(opt.skipped_steps)) == (2.0, 2)
    iterate(scaler, make_theirs(), 0)
    assert len(sweeps) == 1
    give_grads(params, 9, 2.0)
    scaler.unscale_(opt)
    scaler.step(opt)
    assert len(sweeps) == 2


@pytest.mark.parametrize("scaler_name", ["ours", "converted"])
def test_foreign_fused_optimizer_is_checked_by_torch(scaler_name):
    """An optimizer that speaks the protocol and is not ours relies on the scaler's check."""
    params = make_params()
    opt = torch.optim.AdamW(params, fused=True)
    scaler = make_scaler(scaler_name)
    assert iterate(scaler, (params, opt), 0, INF) == 4.0
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
    iterate(scaler, (params, opt), 0, INF)
    del sweeps[:]
    twin = copier(scaler)
    assert twin.state_dict() == scaler.state_dict() and twin.get_scale() == 4.0
    twin.scale(torch.zeros(()))
    iterate(twin, (params, opt), 1)
    assert len(sweeps) == (1 if scaler_name == "torch" else 0)
    assert twin._get_growth_tracker() == 1 and scaler._get_growth_tracker() == 0
    assert float(opt.state[params[0]]["step"]) == 1


@pytest.mark.parametrize("source", SCALERS)
@pytest.mark.parametrize("target", SCALERS)
def test_scaler_state_dict_travels(source, target):
    ours, scaler = make_ours(), make_scaler(source)
    for step, bad in enumerate((INF, None)):
        iterate(scaler, ours, step, bad)
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
    assert iterate(scaler, make_ours(), 0, NAN) == 4.0
    assert (scaler.updates, sweeps) == (1, [])


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
    iterate(scaler, (params, opt), 0)
    assert sweeps == []
    assert float(opt.state[params[0]]["step"]) == 1


def test_fuse_in_the_middle_of_a_run(sweeps):
    """State, scale and growth count go on; converting twice is converting once."""
    both = BesideTorch("torch", make_ours("sgd"), make_theirs("sgd"))
    for step in range(9):
        if step in (3, 5):
            assert fusedopt.fuse_scaler(both.scaler) is both.scaler
        both.iterate(step, INF if step in (1, 4) else None)
        assert both.scaler.state_dict() == both.stock.state_dict()
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


# A flag that nobody wrote, and one that was


def leave_out(scaler, opt, params):
    opt.step = lambda: None  # as a client does now and then
    scaler.step(opt)


def step_without_gradients(scaler, opt, params):
    opt.zero_grad()
    scaler.step(opt)


def fail(scaler, opt, params):
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.step(opt)


@pytest.mark.parametrize("call", [leave_out, step_without_gradients, fail])
def test_a_step_that_is_not_carried_out_repeats_no_answer(call):
    ours, scaler = make_ours(), make_scaler("ours")
    assert iterate(scaler, ours, 0, INF) == 4.0
    assert iterate(scaler, ours, 1, call=call) == 4.0


def fails(*_):
    raise KeyError("hook")


def test_an_error_after_the_decision_does_not_take_it_back():
    (params, opt), scaler = make_ours(), make_scaler("ours")
    opt.register_step_post_hook(fails)
    with pytest.raises(KeyError, match="hook"):
        iterate(scaler, (params, opt), 0, INF)
    scaler.update()
    assert scaler.get_scale() == 4.0


def test_a_later_error_leaves_an_answer_in_the_books():
    def step_twice(scaler, opt, params):
        scaler.step(opt)
        params[0].grad = params[0].grad.to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            opt.step()

    assert iterate(make_scaler("ours"), make_ours(), 0, INF, step_twice) == 4.0


@pytest.mark.parametrize("bad", [(INF, None), (None, INF)], ids=str)
def test_two_scalers_of_one_optimizer(bad):
    """Each remembers what it was told, though both update at the end."""
    scales = []
    for name in ("torch", "ours"):
        params, opt = make_ours("sgd")
        scalers = [make_scaler(name, init_scale=8.0), make_scaler(name, init_scale=4.0)]
        for step, scaler in enumerate(scalers):
            give_grads(params, step, scaler.get_scale(), bad[step])
            scaler.step(opt)
        for scaler in scalers:
            scaler.update()
        scales.append([scaler.get_scale() for scaler in scalers])
    assert scales[0] == scales[1] and scales[1] != [8.0, 4.0]


def test_no_answer_before_the_step():
    """A hook that looks at found_inf sees that nothing is known, not the last step's answer."""
    params, opt = make_ours("sgd", torch.float16, amp_scaling=True)
    scaler, seen = make_scaler("ours"), []
    opt.register_step_pre_hook(lambda o, *_: seen.append(float(o.found_inf)))
    answers = []
    for step, bad in enumerate((INF, None, None)):
        iterate(scaler, (params, opt), step, bad)
        answers.append(float(opt.found_inf))
    assert seen == [0.0, 0.0, 0.0] and answers == [1.0, 0.0, 0.0]


# A step that somebody put in place of ours


def test_an_error_in_place_of_the_step():
    """The scale is not left behind for the next step to multiply by."""
    (params, opt), (plain, plain_opt) = make_ours("sgd"), make_ours("sgd")
    inner = opt.step

    def fails(*_):
        opt.step = inner
        raise KeyError("not this time")

    opt.step = fails
    for tensors, optimizer in ((params, opt), (plain, plain_opt)):
        scaler = make_scaler("ours")
        give_grads(tensors, 0, scaler.get_scale())
        if optimizer is opt:
            with pytest.raises(KeyError, match="not this time"):
                scaler.step(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
