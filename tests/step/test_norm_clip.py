"""Norm, clip coefficient and value clipping: every element counts, whatever its size and place."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    CHUNK,
    DTYPE_PAIRS,
    FLOATS,
    LAYOUT_SHAPE,
    LAYOUTS,
    LENGTHS,
    NONFINITE,
    ODD_LENGTHS,
    around,
    parametrize,
)
from harness import FUSED, Trio, make_param, randn, scaler_attributes, set_grad
from models.reference import global_norm
from tolerances import assert_norm
from torch import Tensor

NORM_TYPES = [2.0, math.inf]


def positions(length: int) -> list[int]:
    """All of them in short tensors; in long ones those at the edges of lanes, blocks and chunks."""
    if length <= 67:
        return list(range(length))
    edges = {0, length // 2, length - 1, *around(64, 256, CHUNK, 2 * CHUNK)}
    return sorted(k for k in edges if 0 <= k < length)


def measure(
    grads: list[Tensor], backend: str, norm_type: float = 2.0, grad_scale: float | None = None
) -> torch.optim.Optimizer:
    """A step that measures and moves nothing."""
    params = [make_param(torch.zeros_like(g, dtype=torch.float32)) for g in grads]
    opt = FUSED["sgd"](params, lr=0.0, max_grad_norm=math.inf, norm_type=norm_type, backend=backend)
    for param, grad in zip(params, grads, strict=True):
        set_grad(param, grad)
    with scaler_attributes(opt, grad_scale, None):
        opt.step()
    return opt


def assert_norm_of(grads: list[Tensor], backend: str, norm_type: float = 2.0) -> None:
    opt = measure(grads, backend, norm_type)
    expected = global_norm([g.double() for g in grads], norm_type)
    assert_norm(opt.grad_norm, expected, f"{[tuple(g.shape) for g in grads][:5]} {grads[0].dtype}")
    assert opt.found_inf.item() == 0.0
    assert opt.skipped_steps.item() == 0


@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norm_of_every_length(dtype: torch.dtype, norm_type: float, backend: str) -> None:
    for length in LENGTHS:
        assert_norm_of([randn(length, length, dtype)], backend, norm_type)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_one_element_is_the_whole_norm(norm_type: float, backend: str) -> None:
    """All others are zero: a dropped lane, tail or chunk shows as a norm of exactly zero."""
    for length in [*range(1, 68), 257, CHUNK, CHUNK + 1, 2 * CHUNK + 257]:
        param = make_param(torch.zeros(length))
        param.grad = torch.zeros(length)
        opt = FUSED["sgd"](
            [param], lr=0.0, max_grad_norm=math.inf, norm_type=norm_type, backend=backend
        )
        for position in positions(length):
            param.grad[position] = -3.0
            opt.step()
            assert opt.grad_norm.item() == 3.0, f"element {position} of {length}"
            param.grad[position] = 0.0


@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_nonfinite_element_anywhere(
    dtype: torch.dtype, value: float, norm_type: float, backend: str
) -> None:
    """In the first, middle and last of tensors with odd sizes, at every position of short ones."""
    params = [make_param(torch.zeros(n)) for n in (17, *ODD_LENGTHS, 0, 33)]
    for param in params:
        set_grad(param, torch.ones(param.numel(), dtype=dtype))
    opt = FUSED["sgd"](
        params, lr=0.0, max_grad_norm=math.inf, norm_type=norm_type, skip_nonfinite=True,
        backend=backend,
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
            assert opt.found_inf.item() == 1.0, label
            assert opt.skipped_steps.item() == skipped, label
            param.grad[position] = 1.0
    opt.step()
    assert opt.found_inf.item() == 0.0
    assert_norm(opt.grad_norm, global_norm([p.grad.double() for p in params], norm_type))


def test_nan_and_inf_together(backend: str) -> None:
    for length in ODD_LENGTHS[1:]:
        grad = torch.ones(length)
        grad[0], grad[-1] = math.inf, math.nan
        for norm_type in NORM_TYPES:
            opt = measure([torch.ones(5), grad, torch.ones(9)], backend, norm_type)
            assert math.isnan(opt.grad_norm.item())
            assert opt.found_inf.item() == 1.0


@parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e30, 3e37, 1e20, 1e-25, 1e-19, 1e-30, 1e-37, 1e-12])
def test_squares_out_of_range(dtype: torch.dtype, magnitude: float, backend: str) -> None:
    for length in [1, 3, 16, 17, 100, 257, CHUNK - 1, CHUNK + 1]:
        grads = [randn(length, 1, dtype, magnitude / 40)]
        assert_norm_of(grads, backend)
        assert_norm_of([randn(7, 2, dtype), *grads, randn(65, 3, dtype)], backend)


def test_every_magnitude_of_float32(backend: str) -> None:
    """Constant and mixed gradients over the whole range of exponents, denormals included."""
    for exponent in range(-148, 124, 3):
        grads = [torch.full((length,), 1.5 * 2.0**exponent) for length in (1, 33)]
        assert_norm_of(grads, backend)
        assert_norm_of([randn(300, 7, scale=2.0**exponent)], backend)


def test_huge_and_tiny_elements_in_one_chunk(backend: str) -> None:
    for length in (40, 257, CHUNK, CHUNK + 40):
        for seed in range(6):
            exponents = torch.randint(-100, 100, (length,), generator=torch.manual_seed(seed))
            assert_norm_of([torch.ldexp(randn(length, seed), exponents)], backend)
            assert_norm_of([torch.ldexp(randn(length, seed), exponents - 60)], backend)


def test_largest_finite_values(backend: str) -> None:
    for dtype in FLOATS:
        largest = torch.finfo(dtype).max
        assert_norm_of([torch.tensor([largest], dtype=dtype)], backend)
        for length in ODD_LENGTHS:
            grads = [torch.full((length,), largest, dtype=dtype)]
            if dtype == torch.float16:
                assert_norm_of(grads, backend)
            assert_norm_of(grads, backend, math.inf)
            opt = measure(grads, backend)
            assert opt.found_inf.item() == 0.0, "a norm beyond float32 is not a non-finite gradient"


@pytest.mark.parametrize("grad_scale", [1.0, 65536.0, 2.0**-7, 1000.0, 3.0, 2.0**40])
def test_norm_is_of_unscaled_gradients(grad_scale: float, backend: str) -> None:
    for param_dtype, grad_dtype in DTYPE_PAIRS:
        params = [make_param(randn(n, n, param_dtype)) for n in (3, 70, 300)]
        group = {"params": params, "lr": 0.1, "momentum": 0.9}
        trio = Trio("sgd", [group], backend, max_grad_norm=0.8)
        for step in range(2):
            grads = [randn(p.numel(), step * 9 + p.numel(), grad_dtype) for p in params]
            trio.step(grads, grad_scale=grad_scale)
            trio.check()


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_norm_of_strided_grads(param_layout: str, grad_layout: str, backend: str) -> None:
    param = make_param(LAYOUTS[param_layout](torch.zeros(LAYOUT_SHAPE)))
    opt = FUSED["sgd"]([param], lr=0.0, max_grad_norm=math.inf, backend=backend)
    for index in (0, 1, 6, 34, 207, 628, 629):
        values = torch.zeros(LAYOUT_SHAPE)
        values.view(-1)[index] = 5.0
        param.grad = LAYOUTS[grad_layout](values)
        opt.step()
        assert opt.grad_norm.item() == 5.0, f"element {index}"


def test_norm_of_thousands_of_tensors(backend: str) -> None:
    assert_norm_of([randn(n % 5, n) for n in range(2000)], backend)
    assert_norm_of([randn(CHUNK // 16, n) for n in range(300)] + [randn(3 * CHUNK, 9)], backend)


# Near 1e-6 the constant of torch's formula decides; above max_grad_norm the division does.
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-7, 1e-6, 1e-3, 0.5, 1.0, 100.0, math.inf])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("magnitude", [1e-6, 1e-5, 0.01, 1.0])
def test_clip_coef(max_grad_norm: float, norm_type: float, magnitude: float, backend: str) -> None:
    lengths = (1, 40, 900)
    group = {"params": [make_param(randn(n, n)) for n in lengths], "lr": 0.5, "momentum": 0.9}
    trio = Trio("sgd", [group], backend, max_grad_norm=max_grad_norm, norm_type=norm_type)
    for step in range(3):
        trio.step([randn(n, step + n, scale=magnitude) for n in lengths])
        trio.check()


def test_clipping_of_huge_gradients(backend: str) -> None:
    """Finite gradients whose squares overflow are clipped, neither skipped nor zeroed."""
    for magnitude in (1e20, 1e30):
        group = {"params": [make_param(randn(n, n)) for n in (17, 900)], "lr": 0.5}
        trio = Trio("sgd", [group], backend, max_grad_norm=1.0, skip_nonfinite=True)
        before = trio.params[0].detach().clone()
        trio.step([randn(n, n + 1, scale=magnitude) for n in (17, 900)])
        trio.check()
        assert not torch.equal(trio.params[0], before)
        assert trio.opt.skipped_steps.item() == 0


def test_norm_spans_groups_and_leaves_out_none(backend: str) -> None:
    groups = [{"params": [make_param(randn(n, n))], "lr": 0.1 * n} for n in (3, 5, 7)]
    trio = Trio("sgd", groups, backend, max_grad_norm=0.5)
    trio.step([randn(3, 10), None, randn(7, 11)])
    trio.check()
    trio.step([None, randn(5, 12), None])
    trio.check()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_max_grad_value(rule: str, backend: str) -> None:
    """Clipped after the norm, at the limit itself, on both sides."""
    limit = 0.25
    values = torch.tensor([limit, -limit, 0.2499, 0.2501, -9.0, 9.0, 0.0, -0.0, 1e30, -1e30])
    for common in ({}, {"max_grad_norm": 1e30}, {"max_grad_norm": 2.0}):
        for grad_scale in (None, 8.0):
            hyper = {"momentum": 0.9, "lr": 1.0} if rule == "sgd" else {"lr": 1.0, "eps": 0.1}
            trio = Trio(
                rule, [{"params": [make_param(randn(10, 1))], **hyper}], backend,
                max_grad_value=limit, **common,
            )  # fmt: skip
            for _ in range(2):
                trio.step([values * (grad_scale or 1.0)], grad_scale=grad_scale)
                trio.check()
