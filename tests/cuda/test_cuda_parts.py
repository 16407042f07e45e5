"""Parameters on several devices in one optimizer: one norm and one decision.

The devices are two names of the CPU, between which the rows are dealt out; the kernels run through
the host shim.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from gpu_helpers import runners
from gpu_twins import Twins, grads_like
from harness import randn

import fusedopt
from fusedopt.backends.device import DevicePlan
from fusedopt.optimizer import FusedOptimizer

shim = runners("shim")
DEVICES = (torch.device("cpu"), torch.device("cpu", 0))
PARAMS = ((300, torch.float32), (8200, torch.bfloat16), (35, torch.float32), (0, torch.float32),
          (9000, torch.float16))  # fmt: skip


def twins_of(rule: str, **common: object) -> Twins:
    values = [randn(n, k, dtype) for k, (n, dtype) in enumerate(PARAMS)]
    groups = [{"params": values[:2]}, {"params": values[2:], "weight_decay": 0.5}]
    return Twins(rule, groups, **{"lr": 0.01, "max_grad_norm": 1.0, **common})


@pytest.mark.parametrize("bad_row", [None, 0, 1, 4])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_two_devices_share_norm_and_decision(cpu_backend, monkeypatch, rule, bad_row):
    """Five steps under our scaler; the gradients of the third have an inf in `bad_row`."""
    monkeypatch.setattr(
        DevicePlan, "device_of", lambda plan, row: DEVICES[plan.rows.index(row) % 2]
    )
    twins = twins_of(rule)
    scalers = [fusedopt.GradScaler("cpu", init_scale=4.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        grads = grads_like(twins.params, step, scale=3.0)
        if step == 2 and bad_row is not None:
            grads[bad_row][-1] = float("inf")
        twins.give(grads)
        for scaler, optimizer in zip(scalers, (twins.opt, twins.twin), strict=True):
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        twins.check()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert len(twins.opt._shared.plan.parts) == 2
    assert twins.opt.skipped_steps == (bad_row is not None)


def test_options_kept_in_bf16_tensors_on_the_device(cpu_backend, monkeypatch):
    """The device is the CPU here, whose numbers would be read at once: so they are left there."""
    lr = torch.tensor(0.25, dtype=torch.bfloat16)
    twins = twins_of("sgd", lr=lr, momentum=0.9)
    left = []

    def stays(self, value):
        left.append(self is twins.opt)
        return left[-1]

    monkeypatch.setattr(FusedOptimizer, "_stays_on_device", stays)
    twins.run(steps=1)
    lr.mul_(0.5)
    twins.run(steps=2)
    assert any(left)


def test_a_captured_plan_outlives_its_replacement(cpu_backend):
    twins = twins_of("adamw")
    twins.run(steps=1)
    opt = twins.opt
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
