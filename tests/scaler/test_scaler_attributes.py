"""grad_scale and found_inf: set by hand, set before the scaler's step, after an error in it."""

import copy

import pytest
import torch
from protocol_helpers import (
    NAN,
    SCALERS,
    assert_same,
    assert_unmoved,
    every_kind,
    every_scaler,
    give_grads,
    make_scaled,
    make_scaler,
    make_theirs,
    on_every_backend,
    snapshot,
)

_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# Set by hand

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


@every_kind
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_own_check_counts_when_the_flag_is_stale(kind, options):
    """found_inf says zero, the gradients say otherwise (an edit after unscale_): nothing moves."""
    params, opt = make_scaled(kind, **options)
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
    ours, theirs = make_scaled("sgd"), make_theirs("sgd")
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
    ours, theirs = make_scaled("sgd"), make_theirs("sgd")
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
    ours, theirs = make_scaled("sgd"), make_theirs("sgd")
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
    params, opt = make_scaled("sgd")
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
