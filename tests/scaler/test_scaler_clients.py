"""How frameworks call scaler and optimizer, re-created by hand."""

import functools
import inspect
import warnings

import pytest
import torch
from protocol_helpers import (
    INF,
    KINDS,
    NAN,
    assert_same,
    every_kind,
    every_scaler,
    fallback_is_expected,
    give_grads,
    make_ours,
    make_params,
    make_scaler,
    make_theirs,
    on_every_backend,
)
from torch.nn.utils import clip_grad_norm_

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def clipping_subclass(base, wraps):
    """detectron2's full-model clipping: a class made on the fly whose step clips first."""

    def step(self, closure=None):
        clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 0.7)
        base.step(self, closure)

    if wraps:  # which leaves a way past it, to the step of the base
        step = functools.wraps(base.step)(step)
    return type(base.__name__ + "WithGradientClip", (base,), {"step": step})


@every_scaler
@every_kind
@pytest.mark.parametrize("wraps", [False, True])
def test_detectron2_clips_inside_step(scaler_name, kind, wraps):
    our_cls, their_cls, kwargs, extra = KINDS[kind]
    ours, theirs = make_params(), make_params()
    our_opt = clipping_subclass(our_cls, wraps)(ours, **kwargs, **extra)
    their_opt = clipping_subclass(their_cls, wraps)(theirs, **kwargs)
    assert not our_opt._takes_scaled_gradients()
    assert our_cls(make_params(), **kwargs, **extra)._takes_scaled_gradients()
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
@pytest.mark.parametrize("amp_scaling", [None, True, False])
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
@pytest.mark.parametrize("options", [{"max_grad_norm": 0.7}, {}, {"amp_scaling": False}])
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
