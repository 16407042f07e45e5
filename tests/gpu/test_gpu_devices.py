"""Two launches a step; what several devices share; params that move, and huge ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CHUNK, parametrize
from gpu_helpers import (
    backend,
    by_speed,
    current_place,
    device,
    device_work,
    memory,
    only_on_a_gpu,
    real,
    runners,
    two_devices,
)
from gpu_runs import INIT_SCALE, OPTIONS, RULES, make_scaler, started
from gpu_twins import Twins, grads_like, values_of
from harness import FUSED, make_param, randn
from tolerances import assert_norm, assert_same_bits
from torch import Tensor

runner = runners()

# ---- launches -----------------------------------------------------------------------------------


def launched(call: Callable[[], Any], tmp_path: Path) -> list[str]:
    """The verbs of the kernels, and before them what brings the table to the device: with CUDA
    kernels, with Triton one copy from pinned memory."""
    names = device_work(call, tmp_path)
    is_copy = [name.startswith("Memcpy") for name in names]
    assert sum(is_copy) <= (backend() == "triton"), names
    assert all("HtoD" in name and "Pinned" in name for name in names if name.startswith("Memcpy"))
    verbs = ("reduce", "finalize", "update")
    found = [next((verb for verb in verbs if verb in name), "write") for name in names]
    assert backend() == "cuda" or is_copy == [verb == "write" for verb in found], names
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_launches(rule: str, options: dict[str, Any], tmp_path: Path) -> None:
    run = started(rule, None, **options)
    first = "finalize" if options.get("max_grad_norm", 1.0) is None else "reduce"
    assert launched(run.opt.step, tmp_path) == [first, "update"]


def test_two_launches_whatever_the_number_of_tensors_and_groups(tmp_path: Path) -> None:
    most = by_speed(1200, 40, 20)
    groups: list[dict[str, Any]] = [
        {"params": [randn(n % 50, n) for n in range(g, most, 12)], "lr": 0.01 * g}
        for g in range(1, 13)
    ]
    groups += [{"params": []}, {"params": [torch.empty(0)]}]
    twins = Twins("adamw", groups, max_grad_norm=1.0)
    twins.run(steps=2)
    twins.opt.step()
    assert launched(twins.opt.step, tmp_path) == ["reduce", "update"]
    for _ in range(2):
        twins.twin.step()
    twins.check()


def test_two_launches_in_a_scaler_step(tmp_path: Path) -> None:
    run = started("adamw", "ours")
    assert launched(lambda: run.scaler.step(run.opt), tmp_path) == ["reduce", "update"]
    run.scaler.update()


@pytest.mark.parametrize("what", ["gradient", "hyper-parameter"])
def test_what_has_moved_costs_one_launch_once(what: str, tmp_path: Path) -> None:
    run = started("adamw", None)
    old = [p.grad for p in run.params]  # lest new gradients get their addresses
    for param in run.params:
        param.grad = param.grad.clone()
    if what == "hyper-parameter":
        run.opt.step()
        run.opt.param_groups[0]["weight_decay"] = 0.25
    assert launched(run.opt.step, tmp_path) == ["write", "reduce", "update"]
    assert launched(run.opt.step, tmp_path) == ["reduce", "update"]
    assert len(old) == len(run.params)


# ---- two devices in one optimizer ---------------------------------------------------------------


@pytest.fixture
def restore_device() -> Iterator[None]:
    yield
    if real():
        torch.cuda.set_device(device())


def over_two(devices: list[torch.device], **common: Any) -> Twins:
    """Neighbours on different devices, several chunks on each; options in tensors on the first."""
    lengths = [17, by_speed(CHUNK + 5, CHUNK + 5, 40), 0, 300, by_speed(3, 3, 1) * CHUNK + 1, 9]
    values = values_of(lengths, torch.float16)
    values[3] = values[3].float()
    groups = [
        {"params": values[:4], "lr": torch.tensor(0.01), "weight_decay": 0.1},
        {"params": values[4:], "lr": 0.5},
    ]
    return Twins("adamw", groups, [devices[k % 2] for k in range(len(lengths))], **common)


@pytest.mark.parametrize("current", [0, 1])
def test_two_devices_have_one_norm(
    current: int, restore_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each param on its own device, all with the clip coefficient of all gradients."""
    twins = over_two(two_devices(monkeypatch), max_grad_norm=1.0, skip_nonfinite=True)
    if real():
        torch.cuda.set_device(current)
    for step in range(by_speed(5, 5, 3)):
        place = current_place()
        twins.run(steps=1, first=step)
        assert current_place() == place
    assert len(twins.opt._shared.plan.parts) == 2
    twins.opt.param_groups[0]["lr"].mul_(0.5)
    verbs = ("reduce", "finalize", "update")
    found = [
        verb for name in device_work(twins.opt.step, tmp_path) for verb in verbs if verb in name
    ]
    assert sorted(found) == sorted(verbs * 2)


@pytest.mark.parametrize(("bad", "norm_type"), [(0, 2.0), (1, math.inf)])
def test_two_devices_make_one_decision(
    bad: int, norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inf on one device skips the step on both."""
    twins = over_two(two_devices(monkeypatch), skip_nonfinite=True, norm_type=norm_type)
    for step in range(4):
        grads = grads_like(twins.twin_params, step)
        if step in (0, 2):
            grads[bad][-1] = torch.inf
        twins.step(grads, grad_scale=4.0)
        twins.check()
    assert twins.opt.skipped_steps.item() == 2


def test_gpu_that_is_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    other = two_devices(monkeypatch)[1]
    group = {"params": values_of([17, 300]), "lr": 0.1}
    twins = Twins("sgd", [group], [other] * 2, max_grad_norm=1.0)
    place = current_place()
    twins.run()
    assert current_place() == place


@pytest.mark.parametrize("scaler_name", ["torch", "ours"])
def test_scaler_over_two_devices(scaler_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's scaler has one flag per device and hands over their sum."""
    devices = two_devices(monkeypatch)
    params: list[Tensor] = [make_param(randn(n, n).to(devices[k])) for k, n in enumerate((17, 300))]
    options = {"max_grad_norm": 1.0, "amp_scaling": scaler_name == "torch" or None}
    opt = FUSED["adamw"](params, lr=0.1, backend=backend(), **options)
    scaler = make_scaler(scaler_name)
    for step, bad in enumerate([None, 0, 1, None]):
        before = [p.detach().clone() for p in params]
        for k, param in enumerate(params):
            param.grad = randn(param.numel(), step + k).to(param.device)
            if k == bad:
                param.grad[-1] = torch.nan
        scaler.step(opt)
        scaler.update()
        same = [torch.equal(p, old) for p, old in zip(params, before, strict=True)]
        assert same == [bad is not None] * 2, f"step {step}"
    assert opt.skipped_steps.item() == 2
    assert scaler.get_scale() == INIT_SCALE / 4


# ---- params that move ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps_before", [0, 2])
@parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_model_moved_after_construction(
    rule: str, dtype: torch.dtype, steps_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """model.to(device) keeps the Parameter objects: their states follow at the next step.

    The backend is chosen anew, by "auto" if it is the one that "auto" prefers.
    """
    only_on_a_gpu()
    hyper = {"lr": 0.1, "weight_decay": 0.1, "max_grad_norm": 1.0}
    hyper |= {"momentum": 0.9} if rule == "sgd" else {}
    models = [torch.nn.Linear(19, 7, dtype=dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [FUSED[rule](m.parameters(), **hyper) for m in models]

    def step(k: int) -> None:
        for model, opt in zip(models, opts, strict=True):
            for n, param in enumerate(model.parameters()):
                param.grad = randn(tuple(param.shape), 10 * k + n, dtype).to(param.device)
            if backend() != "cuda":
                name = backend() if param.is_cuda else "cpu"
                monkeypatch.setenv("FUSEDOPT_BACKEND", name)
            opt.step()

    for k in range(steps_before):
        step(k)
    models[0].to(device())
    for k in range(steps_before, steps_before + 3):
        step(k)
    if real():
        assert opts[0].backend == {str(device()): backend()}
    models[0].to("cpu")
    step(9)
    for ours, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(ours, twin, "param")
        for name, value in opts[1].state[twin].items():
            assert_same_bits(opts[0].state[ours][name], value, name)


# ---- more than 2^31 elements --------------------------------------------------------------------


def huge() -> tuple[int, int]:
    """A length, and the place where 32 bits run out."""
    return (2**31 + 3 * CHUNK + 5, 2**31) if real() else (2 * CHUNK + 5, CHUNK)


@pytest.mark.parametrize(
    ("rule", "master_weights", "n_bytes"),
    [("sgd", False, 4), ("adamw", False, 12), ("adamw", None, 16)],
)
def test_more_than_two_to_the_31_elements(
    rule: str, master_weights: bool | None, n_bytes: int
) -> None:
    """Beginning, end and the place where 32 bits run out, against a small optimizer."""
    with memory(huge()[0] * n_bytes):
        a_huge_tensor(rule, master_weights)


def a_huge_tensor(rule: str, master_weights: bool | None) -> None:
    n, middle = huge()
    slices = [slice(0, 300), slice(middle - 300, middle + 300), slice(n - 300, n)]
    param = make_param(torch.zeros(n, dtype=torch.bfloat16, device=device()))
    param.grad = torch.full((n,), -0.5, dtype=torch.bfloat16, device=device())
    small = [make_param(torch.zeros(s.stop - s.start, dtype=torch.bfloat16)) for s in slices]
    options = {"lr": 0.125, "max_grad_norm": math.inf, "master_weights": master_weights}
    opt = FUSED[rule]([param], backend=backend(), **options)
    twin = FUSED[rule](small, backend="cpu", **options)
    for k, (part, where) in enumerate(zip(small, slices, strict=True)):
        part.grad = randn(part.numel(), k, torch.bfloat16)
        param.grad[where] = part.grad.to(device())
    for _ in range(2):
        opt.step()
        twin.step()
    for part, where in zip(small, slices, strict=True):
        assert_same_bits(param.detach()[where].cpu(), part.detach(), f"{where}")
        for name, value in twin.state[part].items():
            if name != "step":
                assert_same_bits(opt.state[param][name][where].cpu(), value, f"{name} {where}")
    between = param.detach()[300 : middle - 300]
    assert between.min() == between.max() > 0.0
    n_others = n - sum(part.numel() for part in small)
    squares = sum(float(part.grad.double().square().sum()) for part in small)
    assert_norm(opt.grad_norm.cpu(), math.sqrt(0.25 * n_others + squares))


def test_every_part_of_a_huge_gradient_counts() -> None:
    """A norm that is one element's, wherever it is; and one NaN at the very end is a skip."""
    with memory(huge()[0] * 4):
        one_element_of_a_huge_gradient()


def one_element_of_a_huge_gradient() -> None:
    n, middle = huge()
    param = make_param(torch.zeros(n, dtype=torch.float16, device=device()))
    param.grad = torch.zeros_like(param)
    common = {"max_grad_norm": math.inf, "skip_nonfinite": True, "master_weights": False}
    opt = FUSED["sgd"]([param], lr=1.0, backend=backend(), **common)
    positions = [0, middle - 1, middle, middle + 1, n - 1]
    for position in positions:
        param.grad[position] = -3.0
        opt.step()
        assert opt.grad_norm.item() == 3.0, f"element {position}"
        param.grad[position] = 0.0
    assert param.detach()[positions].tolist() == [3.0] * 5
    param.grad[-1] = torch.nan
    opt.step()
    assert (opt.found_inf.item(), opt.skipped_steps.item()) == (1.0, 1)
    assert param.detach()[-1].item() == 3.0
