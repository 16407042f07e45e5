"""Norm, clipping and skipping: against the CPU backend, and each element by itself."""

from __future__ import annotations

import math
from typing import Any

import gpu_helpers
import pytest
import torch
from cases import (
    CHUNK,
    FLOATS,
    FULL_CASES,
    NONFINITE,
    ODD_LENGTHS,
    PLAIN_CASES,
    OptimizerCase,
    around,
    parametrize,
)
from gpu_helpers import DEVICE, MANY_LENGTHS, REAL, backend, by_speed
from gpu_twins import Twins, assert_pairs_agree, everything, grads_like, values_of
from harness import FUSED, make_param, randn, set_grad
from tolerances import assert_norm
from torch import Tensor

pytestmark = gpu_helpers.on_gpu
device = gpu_helpers.device_fixture()

NORM_TYPES = [2.0, math.inf]
EDGES = [32, 64, 256, 2048, CHUNK, 2 * CHUNK]
MANY_TENSORS = [1, 2, 255, 256, 257, 700]
MEASURE = OptimizerCase("measure", "sgd", {"lr": 0.125}, {"max_grad_norm": 2.0})


def positions(length: int) -> list[int]:
    """All of them in short tensors; in long ones those at the edges of lanes, blocks and chunks."""
    if length <= by_speed(67, 17, 5):
        return list(range(length))
    edges = {0, length // 2, length - 1, *around(*by_speed(EDGES, EDGES, [CHUNK]))}
    return sorted(k for k in edges if 0 <= k < length)


@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norm_of_every_length(dtype: torch.dtype, norm_type: float) -> None:
    for n in MANY_LENGTHS:
        twins = Twins.of(MEASURE, values_of([n]), norm_type=norm_type)
        twins.step([randn(n, n, dtype)])
        twins.check()


@pytest.mark.parametrize("n_tensors", by_speed(MANY_TENSORS, MANY_TENSORS, [1, 2, 33]))
def test_norm_of_many_tensors(n_tensors: int) -> None:
    """Partials fold over the 256 lanes of the total; magnitudes differ to make order visible."""
    twins = Twins.of(MEASURE, values_of([1 + k % 5 for k in range(n_tensors)]))
    for step in range(2):
        twins.step(
            [randn(1 + k % 5, k + step, scale=3.0 ** (k % 7)) for k in range(n_tensors)],
            grad_scale=1000.0,
        )
        twins.check()


def test_norm_of_many_chunks() -> None:
    """More chunks than a GPU has blocks at work."""
    n = (10_000 if REAL else 7) * CHUNK + 5
    twins = Twins.of(MEASURE, [torch.zeros(n)])
    grad = torch.empty(n).normal_(generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        twins.step([grad])
        twins.check()
    expected = grad.double().square().sum().sqrt()
    assert_norm(twins.opt.grad_norm.cpu(), expected)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize(
    "length", [1, 2, 3, 4, 5, 8, 9, 33, 67, 257, CHUNK, CHUNK + 1, 2 * CHUNK + 257]
)
def test_one_element_is_the_whole_norm(norm_type: float, length: int) -> None:
    """All others are zero: a dropped lane, tail or chunk shows as a norm of exactly zero."""
    param = make_param(torch.zeros(length, device=DEVICE))
    param.grad = torch.zeros(length, device=DEVICE)
    opt = FUSED["sgd"](
        [param], lr=0.0, max_grad_norm=math.inf, norm_type=norm_type, backend=backend()
    )
    for position in positions(length):
        param.grad[position] = -3.0
        opt.step()
        assert opt.grad_norm.item() == 3.0, f"element {position} of {length}"
        param.grad[position] = 0.0


# Gradients that are not finite


@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_nonfinite_element_anywhere(dtype: torch.dtype, value: float, norm_type: float) -> None:
    lengths = by_speed((17, *ODD_LENGTHS, 0, 33), (17, 0, CHUNK + 1, 33), (5, 0, 33))
    params = [make_param(torch.zeros(n, device=DEVICE)) for n in lengths]
    for param in params:
        set_grad(param, torch.ones(param.numel(), dtype=dtype, device=DEVICE))
    opt = FUSED["sgd"](
        params, lr=0.5, max_grad_norm=math.inf, norm_type=norm_type, skip_nonfinite=True,
        backend=backend(),
    )  # fmt: skip
    skipped = 0
    for index, param in enumerate(params):
        assert param.grad is not None
        for position in positions(param.numel()):
            param.grad[position] = value
            opt.step()
            skipped += 1
            label = f"element {position} of tensor {index}"
            assert_norm(opt.grad_norm, abs(value), label)
            assert (opt.found_inf.item(), opt.skipped_steps.item()) == (1.0, skipped), label
            param.grad[position] = 1.0
    assert not any(bool(p.any()) for p in params), "a skipped step moved a param"
    opt.step()
    assert opt.found_inf.item() == 0.0 and opt.skipped_steps.item() == skipped
    assert all(bool((p == -0.5).all()) for p in params)


# How a step comes to be skipped: by the optimizer's own check, or because a scaler is in charge.
SKIPPERS: dict[str, dict[str, Any]] = {
    "own_check": {"common": {"skip_nonfinite": True}, "step": {}},
    "own_check_with_clip": {"common": {"skip_nonfinite": True, "max_grad_norm": 1.0}, "step": {}},
    "scaler": {"common": {}, "step": {"grad_scale": 64.0, "found_inf": 1.0}},
    "scaler_with_clip": {
        "common": {"max_grad_norm": 1.0},
        "step": {"grad_scale": 64.0, "found_inf": 1.0},
    },
    "sum_of_flags": {"common": {}, "step": {"grad_scale": 64.0, "found_inf": 3.0}},
    "own_check_overrules": {
        "common": {"max_grad_norm": 1.0},
        "step": {"grad_scale": 64.0, "found_inf": 0.0},
    },
}


@pytest.mark.parametrize("skipper", SKIPPERS)
@pytest.mark.parametrize("skip_first", [False, True])
@parametrize("dtype", FLOATS)
@parametrize("case", PLAIN_CASES)
def test_skipped_steps_move_nothing(
    case: OptimizerCase, dtype: torch.dtype, skip_first: bool, skipper: str
) -> None:
    """And the first momentum step is the first applied one."""
    options = SKIPPERS[skipper]
    twins = Twins.of(case, values_of([17, 0, CHUNK + 5, 33], dtype), **options["common"])
    good = {k: 0.0 if k == "found_inf" else v for k, v in options["step"].items()}
    for step in range(8):
        if step in (2, 3, 6) or (skip_first and step < 2):
            before = [p.detach().clone() for p in twins.params]
            grads = grads_like(twins.twin_params, step)
            grads[(0, 2, 3)[step % 3]][-1 if step % 2 else 0] = NONFINITE[step % 3]
            twins.step(grads, **options["step"])
            assert twins.opt.found_inf.item() == 1.0
            assert all(torch.equal(p, old) for p, old in zip(twins.params, before, strict=True))
        else:
            twins.step(grads_like(twins.twin_params, step), **good)
        twins.check()
    assert twins.opt.skipped_steps.item() == (5 if skip_first else 3)


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize(
    "common",
    [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 0.5},
     {"max_grad_norm": 1.0, "max_grad_value": 0.5, "norm_type": math.inf}],
    ids=["plain", "clip", "clip_value", "both"],
)  # fmt: skip
@parametrize("case", FULL_CASES + PLAIN_CASES)
def test_without_skipping_nonfinite_values_go_their_way(
    case: OptimizerCase, common: dict[str, Any], value: float
) -> None:
    common = {**common, "skip_nonfinite": False}
    twins = Twins.of(case, values_of([17, 0, CHUNK + 5, 33]), **common)
    for step in range(4):
        grads = grads_like(twins.twin_params, step)
        if step == 1:
            grads[2][CHUNK // 2] = value
        twins.step(grads)
        twins.check()


# Gradients of any size


@pytest.mark.parametrize("scale", [1e30, 3e38, 1e19, 1e-19, 1e-25, 1e-30, 1e-41, 0.0])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@parametrize("case", PLAIN_CASES)
def test_huge_and_tiny_gradients(case: OptimizerCase, norm_type: float, scale: float) -> None:
    """Chunks that are read again with a power of two, beside chunks that are not."""
    twins = Twins.of(
        case, values_of([5, CHUNK + 77, 300]), norm_type=norm_type, max_grad_norm=1.0,
        skip_nonfinite=True,
    )  # fmt: skip
    limit = torch.finfo(torch.float32).max
    for step in range(2):
        grads = [randn(p.numel(), 9 * step + k) for k, p in enumerate(twins.twin_params)]
        grads[1] = (grads[1].double() * scale).clamp(-limit, limit).float()
        twins.step(grads)
        twins.check()
        assert twins.opt.skipped_steps.item() == 0, "finite gradients were skipped"


@pytest.mark.parametrize("grad_scale", [2.0**-10, 1e-3, 1.0, 7.0, 65536.0, 2.0**100])
@parametrize("dtype", FLOATS)
def test_every_value_of_a_half(dtype: torch.dtype, grad_scale: float) -> None:
    """All finite fp16 and bf16 numbers, denormals among them, unscaled and applied."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    grad = values.view(torch.float16).float() if dtype == torch.float32 else values.view(dtype)
    grad = torch.where(grad.isfinite(), grad, 1.0)
    twins = Twins.of(PLAIN_CASES[0], [torch.zeros(grad.numel(), dtype=dtype)], max_grad_norm=1.0)
    twins.step([grad], grad_scale=grad_scale)
    twins.check()


@parametrize("dtype", FLOATS[1:])
def test_every_rounding_to_half(dtype: torch.dtype) -> None:
    """SGD with lr = 1 puts any wanted value into the master: ties, neighbours, overflow."""
    half = randn(4000, 5, dtype)
    neighbour = (half.view(torch.int16) + 1).view(dtype)
    tie = (half.float() + neighbour.float()) / 2
    wanted = torch.cat([tie, torch.nextafter(tie, half.float()), torch.nextafter(tie, tie * 9)])
    edges = torch.tensor([6e-8, 1e-7, 65519.0, 65520.0, 7e4, 6.1e-5, 1e-39, -65519.996, 3.39e38])
    wanted = torch.cat([wanted, edges, -edges])
    plain = OptimizerCase("plain", "sgd", {"lr": 1.0})
    twins = Twins.of(plain, [torch.zeros(wanted.numel(), dtype=dtype)])
    twins.step([-wanted])
    twins.check()
    param = twins.params[0].detach().cpu()
    assert torch.equal(param.view(torch.int16), wanted.to(dtype).view(torch.int16))


@pytest.mark.parametrize("common", [{"max_grad_norm": 0.0}, {"max_grad_norm": math.inf}, {}])
def test_clipping_that_does_nothing_or_everything(common: dict[str, Any]) -> None:
    twins = Twins.of(PLAIN_CASES[0], values_of([17, 300]), **common)
    for step in range(2):
        twins.step(grads_like(twins.twin_params, step))
        twins.check()


def test_no_gradient_at_all() -> None:
    twins = Twins.of(PLAIN_CASES[0], values_of([17, 0]), max_grad_norm=1.0)
    none: list[Tensor | None] = [None, None]
    twins.step(none)
    twins.check()
    assert twins.opt.grad_norm.item() == 0.0
    twins.step(grads_like(twins.twin_params, 0))
    twins.check()


def test_only_empty_tensors() -> None:
    twins = Twins.of(PLAIN_CASES[0], [torch.empty(0, 4), torch.empty(0)], max_grad_norm=1.0)
    twins.step([torch.empty(0, 4), torch.empty(0)])
    twins.check()
    assert twins.opt.grad_norm.item() == 0.0 and twins.opt.clip_coef.item() == 1.0


def test_the_comparison_would_notice_one_bit() -> None:
    twins = Twins.of(PLAIN_CASES[0], values_of([17, CHUNK + 1]), max_grad_norm=1.0)
    twins.step(grads_like(twins.twin_params, 0))
    twins.check()
    for value in (twins.params[1], twins.opt.state[twins.params[1]]["exp_avg"]):
        with torch.no_grad():
            last = value[-1:].clone()
            value[-1:] = torch.nextafter(last, 2 * last + 1)
        with pytest.raises(AssertionError, match="1 of"):
            assert_pairs_agree(everything(twins.opt, twins.params, twins.twin, twins.twin_params))
        with torch.no_grad():
            value[-1:] = last
    twins.check()
