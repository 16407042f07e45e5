"""Several devices in one optimizer, params that move, and tensors of more than 2^31 elements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gpu_helpers
import pytest
import torch
from cases import CHUNK, PLAIN_CASES, OptimizerCase, parametrize
from gpu_helpers import DEVICE, REAL, backend, by_speed, current_place, memory, two_devices
from gpu_runs import INIT_SCALE, make_scaler
from gpu_twins import Twins, grads_like, values_of
from harness import FUSED, make_param, randn
from tolerances import assert_norm, assert_same_bits
from torch import Tensor

pytestmark = gpu_helpers.on_gpu
device = gpu_helpers.device_fixture()


@pytest.fixture
def restore_device() -> Iterator[None]:
    yield
    if REAL:
        torch.cuda.set_device(DEVICE)


# Two devices in one optimizer


def over_two_devices(**common: Any) -> Twins:
    devices = two_devices()
    lengths = [17, CHUNK + 5, 0, 300, 3 * CHUNK + 1, 9]
    # neighbours on different devices, several chunks on each
    where = [devices[k % 2] for k in range(len(lengths))]
    group = {"params": values_of(lengths, torch.float16), "lr": 0.01, "weight_decay": 0.1}
    return Twins("adamw", [group], where, **common)


@pytest.mark.parametrize("current", [0, 1])
def test_two_gpus_have_one_norm(current: int, restore_device: None) -> None:
    """Each param on its own device, all with the clip coefficient of all gradients."""
    twins = over_two_devices(max_grad_norm=1.0, skip_nonfinite=True)
    if REAL:
        torch.cuda.set_device(current)
    for step in range(5):
        place = current_place()
        twins.step(grads_like(twins.twin_params, step))
        assert current_place() == place
        twins.check()


@pytest.mark.parametrize("bad", [0, 1])
def test_two_gpus_make_one_decision(bad: int) -> None:
    """An inf on one device skips the step on both."""
    twins = over_two_devices(skip_nonfinite=True)
    for step in range(4):
        grads = grads_like(twins.twin_params, step)
        if step in (0, 2):
            grads[bad][-1] = torch.inf
        twins.step(grads)
        twins.check()
    assert twins.opt.skipped_steps.item() == 2


def test_gpu_that_is_not_the_current_one() -> None:
    devices = two_devices()
    values = values_of([17, CHUNK + 5])
    twins = Twins("sgd", [{"params": values, "lr": 0.1}], [devices[1]] * 2, max_grad_norm=1.0)
    for step in range(3):
        place = current_place()
        twins.step(grads_like(twins.twin_params, step))
        assert current_place() == place
        twins.check()


@pytest.mark.parametrize("scaler_name", ["torch", "ours"])
def test_scaler_over_two_gpus(scaler_name: str) -> None:
    """torch's scaler has one flag per device and hands over their sum."""
    devices = two_devices()
    params: list[Tensor] = [
        make_param(randn(n, n).to(devices[k])) for k, n in enumerate((17, CHUNK + 5))
    ]
    opt = FUSED["adamw"](params, lr=0.1, max_grad_norm=1.0, backend=backend())
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


# Params that move


@pytest.mark.parametrize("steps_before", [0, 2])
@parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_model_moved_after_construction(
    rule: str, dtype: torch.dtype, steps_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """model.to(device) keeps the Parameter objects: their states follow at the next step.

    The backend is chosen anew, by "auto" if it is the one that "auto" prefers.
    """
    hyper = {"lr": 0.1, "weight_decay": 0.1, "max_grad_norm": 1.0}
    hyper |= {"momentum": 0.9} if rule == "sgd" else {}
    models = [torch.nn.Linear(19, 7, dtype=dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [FUSED[rule](m.parameters(), **hyper) for m in models]

    def step(k: int) -> None:
        for model, opt in zip(models, opts, strict=True):
            for n, param in enumerate(model.parameters()):
                param.grad = randn(tuple(param.shape), 10 * k + n, dtype).to(param.device)
            if REAL and backend() != "cuda":
                name = backend() if param.is_cuda else "cpu"
                monkeypatch.setenv("FUSEDOPT_BACKEND", name)
            opt.step()

    for k in range(steps_before):
        step(k)
    models[0].to(DEVICE)
    for k in range(steps_before, steps_before + 3):
        step(k)
    if REAL:
        assert opts[0].backend == {str(DEVICE): backend()}
    models[0].to("cpu")
    step(9)
    for ours, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(ours, twin, "param")
        for name, value in opts[1].state[twin].items():
            assert_same_bits(opts[0].state[ours][name], value, name)


# Many and large


@parametrize("case", PLAIN_CASES)
@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_thousand_tensors(case: OptimizerCase, dtype: torch.dtype) -> None:
    """Of 1 to 5,000 elements, shuffled: more rows than the parameters of a kernel can hold."""
    n, longest = by_speed((5000, 5000), (120, 4920), (20, 800))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()
    lengths = [1 + longest // n * k for k in order]
    flat = torch.empty(sum(lengths)).normal_(generator=torch.Generator().manual_seed(2)).to(dtype)
    twins = Twins.of(case, list(flat.split(lengths)), max_grad_norm=1.0)
    for step in range(3):
        grad = torch.empty_like(flat).normal_(generator=torch.Generator().manual_seed(3 + step))
        twins.step(list(grad.split(lengths)))
        twins.check()


HUGE = 2**31 + 3 * CHUNK + 5 if REAL else 2 * CHUNK + 5
MIDDLE = 2**31 if REAL else CHUNK
SLICES = [slice(0, 300), slice(MIDDLE - 300, MIDDLE + 300), slice(HUGE - 300, HUGE)]


@pytest.mark.parametrize(
    ("rule", "master_weights", "n_bytes"),
    [("sgd", False, 4), ("adamw", False, 12), ("adamw", None, 16)],
)
def test_more_than_two_to_the_31_elements(
    rule: str, master_weights: bool | None, n_bytes: int
) -> None:
    """Beginning, end and the place where 32 bits run out, against a small optimizer."""
    with memory(HUGE * n_bytes):
        a_huge_tensor(rule, master_weights)


def a_huge_tensor(rule: str, master_weights: bool | None) -> None:
    param = make_param(torch.zeros(HUGE, dtype=torch.bfloat16, device=DEVICE))
    param.grad = torch.full((HUGE,), -0.5, dtype=torch.bfloat16, device=DEVICE)
    small = [make_param(torch.zeros(s.stop - s.start, dtype=torch.bfloat16)) for s in SLICES]
    options = {"lr": 0.125, "max_grad_norm": math.inf, "master_weights": master_weights}
    opt = FUSED[rule]([param], backend=backend(), **options)
    twin = FUSED[rule](small, backend="cpu", **options)
    for k, (part, where) in enumerate(zip(small, SLICES, strict=True)):
        part.grad = randn(part.numel(), k, torch.bfloat16)
        param.grad[where] = part.grad.to(DEVICE)
    for _ in range(2):
        opt.step()
        twin.step()
    for part, where in zip(small, SLICES, strict=True):
        assert_same_bits(param.detach()[where].cpu(), part.detach(), f"{where}")
        for name, value in twin.state[part].items():
            if name != "step":
                assert_same_bits(opt.state[param][name][where].cpu(), value, f"{name} {where}")
    between = param.detach()[300 : MIDDLE - 300]
    assert between.min() == between.max() > 0.0
    n_others = HUGE - sum(part.numel() for part in small)
    squares = sum(float(part.grad.double().square().sum()) for part in small)
    assert_norm(opt.grad_norm.cpu(), math.sqrt(0.25 * n_others + squares))


def test_every_part_of_a_huge_gradient_counts() -> None:
    """A norm that is one element's, wherever it is; and one NaN at the very end is a skip."""
    with memory(HUGE * 4):
        one_element_of_a_huge_gradient()


def one_element_of_a_huge_gradient() -> None:
    param = make_param(torch.zeros(HUGE, dtype=torch.float16, device=DEVICE))
    param.grad = torch.zeros_like(param)
    opt = FUSED["sgd"](
        [param], lr=1.0, max_grad_norm=math.inf, master_weights=False, skip_nonfinite=True,
        backend=backend(),
    )  # fmt: skip
    positions = [0, MIDDLE - 1, MIDDLE, MIDDLE + 1, HUGE - 1]
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
