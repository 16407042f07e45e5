"""Hyper-parameters that change between steps: by a scheduler, by an average of the weights."""

import warnings

import pytest
import torch
from protocol_helpers import (
    assert_twins,
    build,
    every_kind,
    fallback_is_expected,
    make_ours,
    make_params,
    make_theirs,
    on_every_backend,
    step_all,
)
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def test_amsgrad_switched_on_later():
    params, opt = make_ours("adamw")
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
    pairs = []
    for make in (make_ours, make_theirs):
        pairs.append(make(kind, lr=torch.tensor(0.1) if tensor_lr else 0.1))
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


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_made_by_a_zero_step(kind, dtype):
    """DCP and torchtitan: gradients of zero, lr=0, step(closure=None), then the real run."""
    plain = make_params(dtype)
    params, opt = make_ours(kind, dtype, lr=0.0, max_grad_norm=1.0, decoupled_weight_decay=True)
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
