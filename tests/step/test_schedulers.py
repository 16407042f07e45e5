"""Hyper-parameters that change between steps: by hand, by a scheduler, as tensors, down to lr=0."""

import warnings

import pytest
import torch
from protocol_helpers import (
    HALF,
    assert_twins,
    build,
    every_kind,
    fallback_is_expected,
    make_params,
    on_every_backend,
    step_all,
    twins,
)
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# By hand


@every_kind
def test_hyper_parameters_are_read_every_step(kind):
    pairs = twins(kind)
    for step in range(6):
        for _, opt in pairs:
            group = opt.param_groups[0]
            group["lr"] = 0.1 / (step + 1)
            group["weight_decay"] = 0.02 * step
            if kind == "adamw":
                group["betas"] = (0.9 - 0.1 * step, 0.99)
                group["eps"] = 10.0 ** -(step + 2)
            else:
                group["momentum"] = 0.5 + 0.05 * step
                group["dampening"] = 0.1 * step
            group["maximize"] = step == 4
        step_all(pairs, step)
    assert_twins(pairs)


def test_momentum_switched_on_later():
    pairs = twins("sgd", momentum=0.0)
    for step in range(5):
        if step == 2:
            for _, opt in pairs:
                opt.param_groups[0]["momentum"] = 0.9
        step_all(pairs, step)
    assert_twins(pairs)


def test_amsgrad_switched_on_later():
    params, opt = twins("adamw")[0]
    step_all([(params, opt)], 0)
    opt.param_groups[0]["amsgrad"] = True
    step_all([(params, opt)], 1)
    for p in params:  # torch raises KeyError here
        assert (opt.state[p]["max_exp_avg_sq"] >= opt.state[p]["exp_avg_sq"]).all()
        assert p.isfinite().all()


# Schedulers

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "SWALR": lambda o: SWALR(o, 0.05, 3),
}


def test_no_scheduler_is_left_out():
    known = set(SCHEDULERS) | {"LRScheduler", "SWALR"}
    assert known >= set(lr_scheduler.__all__)


@every_kind
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(kind, name, tensor_lr):
    def build_pairs():
        pairs = []
        for own in (True, False):
            params = make_params()
            lr = torch.tensor(0.1) if tensor_lr else 0.1
            pairs.append((params, build(own, kind, params, lr=lr)))
        return pairs

    pairs = build_pairs()
    schedulers = [SCHEDULERS[name](opt) for _, opt in pairs]
    cycled = set()
    for step in range(8):
        for (params, opt), scheduler in zip(pairs, schedulers, strict=True):
            step_all([(params, opt)], step)
            args = (1.0,) if name == "ReduceLROnPlateau" else ()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message="The epoch parameter")
                scheduler.step(*args)
        groups = [opt.param_groups[0] for _, opt in pairs]
        torch.testing.assert_close(float(groups[0]["lr"]), float(groups[1]["lr"]))
        for key in ("momentum", "betas"):
            assert groups[0].get(key) == groups[1].get(key)
        cycled.add(str(groups[0].get("momentum", groups[0].get("betas"))))
        assert isinstance(groups[0]["lr"], torch.Tensor) is tensor_lr
    assert_twins(pairs, rtol=5e-5, atol=1e-5)
    if name in ("OneCycleLR", "CyclicLR"):
        assert len(cycled) > 3
    assert pairs[0][1].param_groups[0]["lr"] is not None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_hyper_parameters_are_read_and_never_written(shape):
    lr = torch.full(shape, 0.1)
    betas = torch.full(shape, 0.8), torch.full(shape, 0.95)
    params, plain = make_params(), make_params()
    opt = fusedopt.FusedAdamW(params, lr=lr, betas=betas)
    plain_opt = fusedopt.FusedAdamW(plain, lr=float(lr), betas=tuple(float(b) for b in betas))
    for step in range(4):
        if step == 2:
            lr.fill_(0.01)
            plain_opt.param_groups[0]["lr"] = float(lr)
        step_all([(params, opt), (plain, plain_opt)], step)
    assert float(lr) == pytest.approx(0.01) and float(betas[0]) == pytest.approx(0.8)
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


@every_kind
def test_swa_and_ema(kind):
    results = []
    for own in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.BatchNorm1d(6))
        opt = build(own, kind, list(model.parameters()))
        swa = AveragedModel(model)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        scheduler = SWALR(opt, swa_lr=0.01, anneal_epochs=3)
        gen = torch.Generator().manual_seed(1)
        batches = [torch.randn(8, 4, generator=gen) for _ in range(5)]
        for x in batches:
            opt.zero_grad()
            (model(x) ** 3).mean().backward()
            opt.step()
            swa.update_parameters(model)
            ema.update_parameters(model)
            scheduler.step()
        update_bn(batches, swa)
        results.append([*swa.parameters(), *ema.parameters(), *swa.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# lr=0


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=str)
def test_lr_zero_moves_no_parameter(kind, dtype, lr):
    params = make_params(dtype)
    opt = build(True, kind, params, lr=lr, max_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    for step in range(3):
        step_all([(params, opt)], step)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_made_by_a_zero_step(kind, dtype):
    """DCP and torchtitan: gradients of zero, lr=0, step(closure=None), then the real run."""
    params, plain = make_params(dtype), make_params(dtype)
    opt = build(True, kind, params, lr=0.0, max_grad_norm=1.0, decoupled_weight_decay=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    assert opt.step(closure=None) is None
    opt.zero_grad(set_to_none=True)
    assert float(opt.grad_norm) == 0.0 and float(opt.clip_coef) == 1.0
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
    for p in params:
        for name, value in opt.state[p].items():
            if name == "step":
                assert float(value) == 1
            elif name != "master_param":
                assert not value.any()
