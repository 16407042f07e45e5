"""Parameters on several devices in one optimizer: one norm and one decision.

The devices are two names of the CPU, between which the rows are dealt out; the kernels run through
the host shim.
"""

from __future__ import annotations

import gc
import weakref

import cuda_shim
import pytest
import torch

import fusedopt
from fusedopt.backends.device import DevicePlan
from fusedopt.optimizer import FusedOptimizer

shim = pytest.fixture(cuda_shim.fixture)
DEVICES = (torch.device("cpu"), torch.device("cpu", 0))
PARAMS = ((300, torch.float32), (8200, torch.bfloat16), (35, torch.float32), (0, torch.float32),
          (9000, torch.float16))  # fmt: skip
OPTIMIZERS = {
    "adamw": (fusedopt.FusedAdamW, {}),
    "sgd": (fusedopt.FusedSGD, {"momentum": 0.9}),
}


def by_position(plan, row):
    return DEVICES[plan.rows.index(row) % 2]


def train(name, backend, bad_row=None, **options):
    """Five steps under our scaler; the gradients of the third have an inf in `bad_row`."""
    generator = torch.Generator().manual_seed(0)

    def randn(n, dtype):
        return (3 * torch.randn(n, generator=generator)).to(dtype)

    params = [torch.nn.Parameter(randn(n, dtype)) for n, dtype in PARAMS]
    cls, kwargs = OPTIMIZERS[name]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.5}]
    opt = cls(groups, lr=0.01, backend=backend, **kwargs, **options)
    scaler = fusedopt.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    seen = []
    for step in range(5):
        for row, param in enumerate(params):
            param.grad = randn(param.numel(), param.dtype)
            if step == 2 and row == bad_row:
                param.grad[-1] = float("inf")
        scaler.scale(torch.ones(()))
        scaler.step(opt)
        scaler.update()
        norm = None if opt.grad_norm is None else opt.grad_norm.item()
        seen.append((norm, opt.found_inf.item(), opt.skipped_steps.item(), scaler.get_scale()))
    return params, opt, seen


def assert_same(one, other):
    assert one[2][:2] == other[2][:2]
    assert repr(one[2]) == repr(other[2])  # the norm of a bad step is inf or NaN in both
    for p, q in zip(one[0], other[0], strict=True):
        assert torch.equal(p, q)
        for key, value in one[1].state[p].items():
            assert torch.equal(value, other[1].state[q][key]), key


@pytest.mark.parametrize("bad_row", [None, 0, 1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_devices_share_norm_and_decision(shim, monkeypatch, name, bad_row):
    expected = train(name, "cpu", bad_row, max_grad_norm=1.0)
    monkeypatch.setattr(DevicePlan, "device_of", by_position)
    split = train(name, "cuda", bad_row, max_grad_norm=1.0)
    assert len(split[1]._shared.plan.parts) == 2
    assert split[2][-1][2] == (bad_row is not None)
    assert_same(expected, split)


def test_two_devices_launch_three_kernels_each(shim, monkeypatch):
    monkeypatch.setattr(DevicePlan, "device_of", by_position)
    _, opt, _ = train("adamw", "cuda", max_grad_norm=1.0)
    shim.reset()
    opt.step()
    opt.step()
    kernels = [launch.kernel.partition("_kernel")[0] for launch in shim.launches()]
    steady = kernels[-6:]
    assert steady == ["reduce"] * 2 + ["finalize"] * 2 + ["update"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_kept_in_tensors_on_the_device(shim, monkeypatch, name, dtype):
    """The device is the CPU here, whose numbers would be read at once: so they are left there."""
    left = []

    def stays(self, value):
        left.append(value)
        return True

    def with_tensors(backend):
        lr = torch.tensor(0.0, dtype=dtype)
        params = [torch.nn.Parameter(torch.full((300,), float(i + 1))) for i in range(3)]
        cls, kwargs = OPTIMIZERS[name]
        groups = [{"params": params[:1], "lr": 0.25}, {"params": params[1:]}]
        opt = cls(groups, lr=lr, backend=backend, weight_decay=0.5, **kwargs)
        for step in range(3):
            lr.fill_(2.0 ** -(step + 2))
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            opt.step()
        return params

    expected = with_tensors("cpu")
    monkeypatch.setattr(FusedOptimizer, "_stays_on_device", stays)
    got = with_tensors("cuda")
    assert left
    assert all(torch.equal(p, q) for p, q in zip(expected, got, strict=True))


def test_a_captured_plan_outlives_its_replacement(shim):
    _, opt, _ = train("adamw", "cuda", max_grad_norm=1.0)
    plan = opt._shared.plan
    plan.capture()  # as begin() notes while a graph is being captured
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(20_000))]})
    opt.param_groups[-1]["params"][0].grad = torch.ones(20_000)
    opt.step()
    assert opt._shared.plan is not plan
    assert plan in opt._shared.captured_plans
    states = [weakref.ref(value) for own in opt.state.values() for value in own.values()]
    opt.state.clear()
    gc.collect()
    kept = [ref() is not None for ref in states]
    assert all(kept[:-3]) and kept[-3:].count(True) == 1  # of the param that came after, the count


@pytest.mark.parametrize("amsgrad", [(False, True, False), (True, False, True)])
def test_amsgrad_in_some_groups(shim, amsgrad):
    def run(backend):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (100, 700, 9000)]
        groups = [{"params": [p], "amsgrad": a} for p, a in zip(params, amsgrad, strict=True)]
        opt = fusedopt.FusedAdamW(groups, backend=backend, max_grad_norm=1.0)
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator) / (step + 1)
            opt.step()
        return params, opt

    (params, ours), (others, cpu) = run("cuda"), run("cpu")
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert ours.state[p].keys() == cpu.state[q].keys()
        assert all(torch.equal(v, cpu.state[q][k]) for k, v in ours.state[p].items())
