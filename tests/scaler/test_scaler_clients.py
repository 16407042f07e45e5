"""Who may hand the scale over to a step, what has to find unscaled gradients, and how frameworks
call scaler and optimizer, re-created by hand."""

import copy
import functools
from types import MethodType

import pytest
import torch
from protocol_helpers import (
    DTYPES,
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
from scaler_helpers import BesideTorch
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

import fusedopt
from fusedopt.optimizer import FusedOptimizer

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# Who may hand the scale over


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amp_scaling", [None, True, False])
def test_what_clients_are_told(kind, dtype, amp_scaling):
    """A stock optimizer, unless the user says otherwise or ``unscale_`` refuses the gradients."""
    params, opt = make_ours(kind, dtype, amp_scaling=amp_scaling)
    expected = amp_scaling if amp_scaling is not None else dtype == torch.float16
    assert opt._step_supports_amp_scaling is expected
    assert opt._takes_scaled_gradients()  # what our own scaler asks
    params[1]._fsdp_flattened = True
    assert not opt._step_supports_amp_scaling and not opt._takes_scaled_gradients()
    params[1]._fsdp_flattened = False
    assert opt._step_supports_amp_scaling is expected


def test_a_frozen_fp16_base_does_not_count():
    adapter = torch.nn.Parameter(torch.ones(3))
    base = torch.nn.Parameter(torch.ones(3, dtype=torch.float16), requires_grad=False)
    opt = fusedopt.FusedAdamW([base, adapter])
    assert opt._step_supports_amp_scaling is False
    base.requires_grad_()
    assert opt._step_supports_amp_scaling is True


def test_flag_survives_wrappers_that_do_not_change_the_step():
    _, opt = make_ours(amp_scaling=True)
    for _ in range(2):
        torch.optim.lr_scheduler.StepLR(opt, 1)
        assert opt._step_supports_amp_scaling is True and not make_scaler("ours").sweeps(opt)
    opt.step = opt.step  # taken off and put back, as Accelerate does
    assert opt._step_supports_amp_scaling is True

    class Renamed(fusedopt.FusedAdamW):
        pass

    assert Renamed(make_params(), amp_scaling=True)._step_supports_amp_scaling is True
    assert copy.deepcopy(opt)._step_supports_amp_scaling is True
    assert copy.deepcopy(make_ours(amp_scaling=False)[1])._step_supports_amp_scaling is False


def patch_class(monkeypatch, opt):
    inner = FusedOptimizer.step
    monkeypatch.setattr(type(opt), "step", lambda self, closure=None: inner(self, closure))


def patch_instance(monkeypatch, opt):
    inner = opt.step
    opt.step = functools.wraps(inner)(lambda closure=None: inner(closure))


def patch_under_a_scheduler(monkeypatch, opt):
    """The scheduler's own wrapper is harmless; what it wraps need not be."""
    inner = opt.step
    opt.step = MethodType(lambda self, closure=None: inner(closure), opt)
    torch.optim.lr_scheduler.StepLR(opt, 1)


def patch_over_a_scheduler(monkeypatch, opt):
    torch.optim.lr_scheduler.StepLR(opt, 1)
    patch_instance(monkeypatch, opt)


def borrow_a_step(monkeypatch, opt):
    opt.step = make_ours()[1].step


def add_hook(monkeypatch, opt):
    opt.register_step_pre_hook(lambda *_: None)


def add_global_hook(monkeypatch, opt):
    monkeypatch.setitem(_global_optimizer_pre_hooks, -1, lambda *_: None)


BETWEEN = [patch_class, patch_instance, patch_under_a_scheduler, patch_over_a_scheduler]
BETWEEN += [borrow_a_step, add_hook, add_global_hook]


@pytest.mark.parametrize("put", BETWEEN)
def test_whatever_runs_between_scaler_and_step(monkeypatch, put):
    opts = {dtype: make_ours("adamw", dtype, amp_scaling=True)[1] for dtype in DTYPES}
    for dtype, opt in opts.items():
        assert opt._step_supports_amp_scaling is True
        with monkeypatch.context() as patch:
            put(patch, opt)
            assert not opt._takes_scaled_gradients()
            # nobody can unscale fp16, and the user has said that all that runs there knows it
            assert opt._step_supports_amp_scaling is (dtype == torch.float16)
            opt.amp_scaling = None
            assert opt._step_supports_amp_scaling is False


def clip_gradients(opt, args, kwargs):
    clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1.0)


def clipping_hook(opt, params):
    return opt.register_step_pre_hook(clip_gradients)


def clipping_global_hook(opt, params):
    return register_optimizer_step_pre_hook(clip_gradients)


def clipping_step(opt, params):
    inner = opt.step

    def step(*args):
        clip_grad_norm_(params, 1.0)
        return inner(*args)

    opt.step = step


@every_scaler
@every_kind
@pytest.mark.parametrize("amp_scaling", [None, True, False])
@pytest.mark.parametrize("clip", [clipping_hook, clipping_global_hook, clipping_step])
def test_hooks_and_patched_steps_see_unscaled_gradients(scaler_name, kind, amp_scaling, clip):
    ours, theirs = make_ours(kind, amp_scaling=amp_scaling), make_theirs(kind)
    both = BesideTorch(scaler_name, ours, theirs, init_scale=2.0**16)
    handles = [clip(opt, params) for params, opt in (ours, theirs)]
    for step, bad in enumerate((INF, None, NAN, None)):
        both.iterate(step, bad)
    for handle in filter(None, handles):
        handle.remove()


class Wrapper:
    """Lookahead and the like: a scaler is given the wrapper, which steps what is inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self):
        self.optimizer.step()


def test_a_scaler_tells_whether_it_sweeps():
    scaler, opt = make_scaler("ours"), make_ours()[1]
    assert not scaler.sweeps(opt) and not scaler.sweeps(make_ours(amp_scaling=False)[1])
    assert scaler.sweeps(Wrapper(opt)) and scaler.sweeps(make_theirs()[1])
    opt.register_step_pre_hook(lambda *_: None)
    assert scaler.sweeps(opt)
    half = make_ours("adamw", torch.float16, amp_scaling=True)[1]
    half.register_step_pre_hook(lambda *_: None)
    assert not scaler.sweeps(half)


@every_kind
@pytest.mark.parametrize("amp_scaling", [None, False])
def test_to_torchs_scaler_we_are_a_stock_optimizer(kind, amp_scaling):
    ours, theirs = make_ours(kind, amp_scaling=amp_scaling), make_theirs(kind)
    both, calls = BesideTorch("torch", ours, theirs), []
    ours[1].register_step_post_hook(lambda *_: calls.append(1))
    for step, bad in enumerate((INF, None, NAN, None)):
        both.iterate(step, bad)
        for p, q in zip(ours[0], theirs[0], strict=True):
            assert torch.equal(p.grad.nan_to_num(), q.grad.nan_to_num())  # unscaled in place
    assert len(calls) == 2


def test_amp_scaling_off_refuses_fp16_gradients_as_torch():
    params, opt = make_ours(dtype=torch.float16, amp_scaling=False)
    give_grads(params, 0, 8.0)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        make_scaler("torch").step(opt)
    make_scaler("ours").step(opt)  # which needs no unscaled gradients


# Frameworks


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
    both = BesideTorch(scaler_name, (ours, our_opt), (theirs, their_opt))
    for step, bad in enumerate((None, INF, None, None)):
        both.iterate(step, bad)


class Accelerated:
    """accelerate's AcceleratedOptimizer: step replaced by an attribute, closure by position."""

    def __init__(self, optimizer, clip):
        self.called, self.clip = False, clip
        optimizer.load_state_dict(optimizer.state_dict())
        self.original = optimizer.step

        def patched(*args, **kwargs):
            self.called = True
            return self.original(*args, **kwargs)

        self.patched = patched

    def __call__(self, scaler, optimizer, params):
        self.called = False
        if self.clip:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, 0.7)
        optimizer.step = self.patched
        scaler.step(optimizer, None)
        optimizer.step = self.original


@every_scaler
@every_kind
@pytest.mark.parametrize("amp_scaling", [None, True, False])
@pytest.mark.parametrize("clip", [False, True])
def test_accelerate(scaler_name, kind, amp_scaling, clip):
    ours, theirs = make_ours(kind, amp_scaling=amp_scaling), make_theirs(kind)
    calls = Accelerated(ours[1], clip), Accelerated(theirs[1], clip)
    both = BesideTorch(scaler_name, ours, theirs, *calls)
    for step, bad in enumerate((INF, None, None, NAN, None)):
        both.iterate(step, bad)
        assert calls[0].called == (bad is None)


def lightning_step(clip, scaler, opt, params):
    """Lightning's MixedPrecision.optimizer_step."""
    handles_unscaling = getattr(opt, "_step_supports_amp_scaling", False)
    if not handles_unscaling:
        scaler.unscale_(opt)
    if clip is not None:
        if handles_unscaling:
            raise RuntimeError("gradient clipping is not supported with this optimizer")
        clip_grad_norm_(params, clip)
    scaler.step(opt)


@every_scaler
@every_kind
@pytest.mark.parametrize("options", [{"max_grad_norm": 0.7}, {}, {"amp_scaling": False}])
def test_lightning(scaler_name, kind, options):
    trainer_clip = None if "max_grad_norm" in options else 0.7
    calls = (functools.partial(lightning_step, clip) for clip in (trainer_clip, 0.7))
    both = BesideTorch(scaler_name, make_ours(kind, **options), make_theirs(kind), *calls)
    for step, bad in enumerate((None, INF, None, None)):
        both.iterate(step, bad)


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
