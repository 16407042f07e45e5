"""A loss scale without a finite reciprocal, or a flag that is no number: the step is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda_shim
import pytest
import torch
import triton_interpreter
from conftest import require_cpu_backend
from models import reference
from protocol_helpers import every_kind, fallback_is_expected, make_ours, make_scaler
from scaler_helpers import iterate
from step_scenes import Scene, same

pytestmark = fallback_is_expected
# Their reciprocals are not finite in fp32; that of the last is the largest that is.
USELESS = [0.0, -0.0, 2.0**-128, 2.0**-149, float("nan")]
SMALLEST = 2.0**-127
FLAGS = [float("nan"), float("inf"), -1.0]


@pytest.fixture(params=["cpu", "reference", "cuda", "triton"])
def served_by(request: pytest.FixtureRequest) -> Iterator[str]:
    require_cpu_backend()
    stand_in = {"cuda": cuda_shim.fixture, "triton": triton_interpreter.fixture}.get(request.param)
    for _ in stand_in() if stand_in is not None else [None]:
        yield request.param


@every_kind
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_steps_are_skipped(kind: str, options: dict[str, Any], served_by: str) -> None:
    """With a scaler, and set by hand: who skips nothing would have params of NaN.

    One optimizer for all of them, since a step that is skipped leaves it as it was.
    """
    opt: Any = (scene := Scene(kind, served_by, amp_scaling=True, **options)).opt
    before = scene.values()
    skips = before.pop("skipped_steps")

    def assert_skipped(what: str) -> None:
        nonlocal skips
        skips += 1
        after = scene.values()
        assert after.pop("skipped_steps") == skips, what
        assert same(before, after), what
        assert opt.found_inf == 1, what

    for scale in USELESS:
        opt.grad_scale = torch.tensor(scale)
        opt.step()
        assert_skipped(f"grad_scale = {scale}")
        del opt.grad_scale
    for flag in FLAGS:
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(flag)
        opt.step()
        assert_skipped(f"found_inf = {flag}")
        del opt.grad_scale, opt.found_inf
    for name, scale in (("torch", 0.0), ("ours", 0.0), ("ours", 2.0**-149), ("torch", USELESS[-1])):
        scaler = make_scaler(name, init_scale=scale)
        for _ in range(2):
            scaler.step(opt)
            scaler.update()
            assert_skipped(f"{name} with the scale {scale}")
    opt.step()
    assert all(p.isfinite().all() for p in scene.params)
    assert opt.skipped_steps == skips and opt.found_inf == 0


@every_kind
@pytest.mark.parametrize("model", [reference.Oracle, reference.TorchStep])
@pytest.mark.parametrize("scale", USELESS)
def test_the_oracles_skip(kind: str, model: Any, scale: float) -> None:
    param = torch.ones(3)
    oracle = model(kind, [{"params": [param]}])
    oracle.step([torch.ones(3)], grad_scale=scale)
    (kept,) = oracle.params if model is reference.TorchStep else [oracle.slots[0].master]
    assert kept.eq(1).all()


@every_kind
def test_the_smallest_scale_is_of_use(kind: str, served_by: str) -> None:
    scene = Scene(kind, served_by)
    before = scene.values()
    for p in scene.params:
        if p.grad is not None:
            p.grad.zero_()
    scene.opt.grad_scale = torch.tensor(SMALLEST)
    scene.opt.step()
    assert scene.opt.skipped_steps == 0
    assert not same(before, scene.values())  # decay, and moments that fade
    assert all(p.isfinite().all() for p in scene.params)


def test_a_scale_that_a_backoff_has_driven_to_zero() -> None:
    """As in a run whose every step overflows."""
    params, opt = make_ours(amp_scaling=True)
    scaler = make_scaler("torch", init_scale=2.0**-126, backoff_factor=2.0**-20)
    for step, bad in enumerate((float("inf"), float("inf"), None, None)):
        iterate(scaler, (params, opt), step, bad)
    assert scaler.get_scale() == 0.0
    assert opt.skipped_steps == 4 and all(p.isfinite().all() for p in params)
