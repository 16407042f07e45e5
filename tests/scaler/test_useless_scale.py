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
from protocol_helpers import every_kind, fallback_is_expected, make_ours
from step_scenes import Scene, same

import fusedopt

pytestmark = fallback_is_expected
# Their reciprocals are not finite in fp32; that of the last is the largest that is.
USELESS = [0.0, -0.0, 2.0**-128, 2.0**-149, float("nan")]
SMALLEST = 2.0**-127


@pytest.fixture(params=["cpu", "reference", "cuda", "triton"])
def served_by(request: pytest.FixtureRequest) -> Iterator[str]:
    require_cpu_backend()
    stand_in = {"cuda": cuda_shim.fixture, "triton": triton_interpreter.fixture}.get(request.param)
    for _ in stand_in() if stand_in is not None else [None]:
        yield request.param


def scaler_of(name: str, scale: float) -> Any:
    cls: Any = torch.amp.GradScaler if name == "torch" else fusedopt.GradScaler
    scaler = cls("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    return scaler


def assert_skipped(scene: Scene, before: dict[str, Any], skips: int) -> None:
    after = scene.values()
    assert after.pop("skipped_steps") == skips
    del before["skipped_steps"]
    assert same(before, after)
    assert scene.opt.found_inf == 1


@every_kind
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
@pytest.mark.parametrize("scale", USELESS)
@pytest.mark.parametrize("name", ["torch", "ours"])
def test_with_a_scaler(
    kind: str, name: str, scale: float, options: dict[str, Any], served_by: str
) -> None:
    scene = Scene(kind, served_by, amp_scaling=True, **options)
    scaler = scaler_of(name, scale)
    for skips in (1, 2):
        before = scene.values()
        scaler.step(scene.opt)
        scaler.update()
        assert_skipped(scene, before, skips)


@every_kind
@pytest.mark.parametrize("scale", USELESS)
def test_set_by_hand(kind: str, scale: float, served_by: str) -> None:
    """Whoever skips nothing would have params of NaN."""
    scene = Scene(kind, served_by)
    before = scene.values()
    scene.opt.grad_scale = torch.tensor(scale)
    scene.opt.step()
    assert_skipped(scene, before, 1)
    del scene.opt.grad_scale
    scene.opt.step()
    assert all(p.isfinite().all() for p in scene.params)
    assert scene.opt.skipped_steps == 1 and scene.opt.found_inf == 0


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


@every_kind
@pytest.mark.parametrize("flag", [float("nan"), float("inf"), -1.0])
def test_any_flag_but_zero_skips(kind: str, flag: float, served_by: str) -> None:
    scene = Scene(kind, served_by)
    before = scene.values()
    scene.opt.grad_scale = torch.tensor(2.0)
    scene.opt.found_inf = torch.tensor(flag)
    scene.opt.step()
    assert_skipped(scene, before, 1)


def test_a_scale_that_a_backoff_has_driven_to_zero() -> None:
    """As in a run whose every step overflows."""
    params, opt = make_ours(amp_scaling=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-126, backoff_factor=2.0**-20)
    scaler.scale(torch.zeros(()))
    for bad in (True, True, False, False):
        for p in params:
            p.grad = torch.full_like(p, float("inf") if bad else 1.0)
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 0.0
    assert opt.skipped_steps == 4 and all(p.isfinite().all() for p in params)
