"""A skipped step moves nothing, to the bit; and what does and does not make a step be skipped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    CHUNK,
    FLOATS,
    FULL_CASES,
    NONFINITE,
    PLAIN_CASES,
    OptimizerCase,
    parametrize,
)
from harness import Trio, make_param, randn
from torch import Tensor

import fusedopt

# How a step comes to be skipped: by the optimizer's own check, or because a scaler is in charge.
SKIPPERS: dict[str, dict[str, Any]] = {
    "own_check": {"common": {"skip_nonfinite": True}, "step": {}},
    "own_check_with_clip": {
        "common": {"skip_nonfinite": True, "max_grad_norm": 1.0},
        "step": {},
    },
    "scaler": {"common": {}, "step": {"grad_scale": 64.0, "found_inf": 1.0}},
    "scaler_with_clip": {
        "common": {"max_grad_norm": 1.0},
        "step": {"grad_scale": 64.0, "found_inf": 1.0},
    },
    "scaler_unscaled_before": {"common": {"max_grad_norm": 1.0}, "step": {"found_inf": 1.0}},
    "both": {
        "common": {"skip_nonfinite": True, "max_grad_value": 0.5},
        "step": {"grad_scale": 64.0, "found_inf": 1.0},
    },
}
LENGTHS = [17, 0, CHUNK + 5, 33]
PLACES = [(t, e) for t in (0, 2, 3) for e in ("first", "middle", "last")]


def make_trio(case: OptimizerCase, dtype: torch.dtype, backend: str, **common: Any) -> Trio:
    params = [make_param(randn(n, n, dtype)) for n in LENGTHS]
    return Trio(case.rule, [{"params": params, **case.hyper}], backend, **common)


def good_grads(trio: Trio, step: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [
        randn(p.numel(), 100 * step + k + 7, dtype or p.dtype) for k, p in enumerate(trio.params)
    ]


def bad_grads(trio: Trio, step: int, place: tuple[int, str], value: float) -> list[Tensor]:
    tensor, element = place
    grads = good_grads(trio, step)
    last = grads[tensor].numel() - 1
    grads[tensor][{"first": 0, "middle": last // 2, "last": last}[element]] = value
    return grads


def scaled_by(step_options: dict[str, float]) -> dict[str, float]:
    """The same for a good step: found_inf is 0."""
    return {k: 0.0 if k == "found_inf" else v for k, v in step_options.items()}


@pytest.mark.parametrize("skipper", SKIPPERS)
@parametrize("dtype", FLOATS)
@parametrize("case", PLAIN_CASES)
def test_skipped_steps_move_nothing(
    case: OptimizerCase, dtype: torch.dtype, skipper: str, backend: str
) -> None:
    options = SKIPPERS[skipper]
    trio = make_trio(case, dtype, backend, **options["common"])
    for step in range(2):
        trio.step(good_grads(trio, step), **scaled_by(options["step"]))
    before = trio.snapshot()
    for count, place in enumerate(PLACES):
        for value in NONFINITE:
            trio.step(bad_grads(trio, 2, place, value), **options["step"])
            trio.assert_unmoved(before)
        assert trio.opt.skipped_steps.item() == 3 * (count + 1)
        assert trio.opt.found_inf.item() == 1.0
    for step in range(3, 6):
        trio.step(good_grads(trio, step), **scaled_by(options["step"]))
        assert trio.opt.found_inf.item() == 0.0
        trio.check()
    assert trio.opt.skipped_steps.item() == 3 * len(PLACES)


@pytest.mark.parametrize("skipper", SKIPPERS)
@parametrize("dtype", FLOATS)
@parametrize("case", FULL_CASES + PLAIN_CASES)
def test_first_step_skipped(
    case: OptimizerCase, dtype: torch.dtype, skipper: str, backend: str
) -> None:
    """The first momentum step is the first applied one: no state is born that changes it."""
    options = SKIPPERS[skipper]
    trio = make_trio(case, dtype, backend, **options["common"])
    before = trio.snapshot()
    for place in PLACES[:2]:
        trio.step(bad_grads(trio, 0, place, math.nan), **options["step"])
        trio.assert_unmoved(before)
        trio.check()
    for step in range(1, 4):
        trio.step(good_grads(trio, step), **scaled_by(options["step"]))
        trio.check()


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 0.5, 1e-30, math.inf])
@parametrize("case", PLAIN_CASES)
@pytest.mark.parametrize("common", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clip"])
def test_any_found_inf_but_zero_skips(
    case: OptimizerCase, common: dict[str, Any], found_inf: float, backend: str
) -> None:
    """A sum of flags is 2; the scaler's word holds although these gradients are finite."""
    trio = make_trio(case, torch.float32, backend, **common)
    trio.step(good_grads(trio, 0), grad_scale=4.0, found_inf=0.0)
    before = trio.snapshot()
    for options in ({"grad_scale": 4.0, "found_inf": found_inf}, {"found_inf": found_inf}):
        trio.step(good_grads(trio, 1), **options)
        trio.assert_unmoved(before)
    assert trio.opt.skipped_steps.item() == 2
    trio.step(good_grads(trio, 2), grad_scale=4.0, found_inf=0.0)
    trio.check()


@pytest.mark.parametrize("value", NONFINITE)
@parametrize("case", PLAIN_CASES)
def test_own_check_overrules_a_found_inf_of_zero(
    case: OptimizerCase, value: float, backend: str
) -> None:
    """Gradients that went bad after the scaler looked at them."""
    trio = make_trio(case, torch.float32, backend, max_grad_norm=1.0)
    trio.step(good_grads(trio, 0), found_inf=0.0)
    before = trio.snapshot()
    trio.step(bad_grads(trio, 1, (2, "last"), value), found_inf=0.0)
    trio.assert_unmoved(before)
    trio.step(good_grads(trio, 2), found_inf=0.0)
    trio.check()


def test_attributes_are_independent_and_leave_no_trace(backend: str) -> None:
    trio = make_trio(PLAIN_CASES[0], torch.float32, backend)
    for options in (
        {"grad_scale": 8.0},
        {"found_inf": 0.0},
        {},
        {"grad_scale": 16.0, "found_inf": 0.0},
        {},
    ):
        trio.step(good_grads(trio, len(options)), **options)
        trio.check()


@parametrize("case", FULL_CASES)
def test_a_skip_counts_for_no_param(case: OptimizerCase, backend: str) -> None:
    """Step counts are per param: those without a grad, those skipped, those applied."""
    trio = make_trio(case, torch.bfloat16, backend, skip_nonfinite=True)
    for step in range(8):
        grads: list[Tensor | None] = [*good_grads(trio, step)]
        grads[step % 4] = None
        if step in (0, 3, 4):
            grads[(step + 2) % 4] = torch.full_like(trio.params[(step + 2) % 4], math.inf)
        trio.step(grads)
        trio.check()


@pytest.mark.parametrize("grad_scale", [2.0**-10, 1e-3])
@parametrize("case", PLAIN_CASES)
def test_overflow_in_unscaling_is_not_finite(
    case: OptimizerCase, grad_scale: float, backend: str
) -> None:
    trio = make_trio(case, torch.float32, backend, max_grad_norm=1.0)
    trio.step(good_grads(trio, 0), grad_scale=grad_scale, found_inf=0.0)
    before = trio.snapshot()
    trio.step(bad_grads(trio, 1, (3, "last"), 1e37), grad_scale=grad_scale, found_inf=0.0)
    trio.assert_unmoved(before)
    assert trio.opt.skipped_steps.item() == 1


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_finite_gradients_are_never_skipped(
    rule: str, max_grad_norm: float | None, backend: str
) -> None:
    """Squares and norms may overflow; what is judged is each element."""
    for dtype, value in [
        (torch.float32, 3.4e38),
        (torch.bfloat16, 3.3e38),
        (torch.float16, 65504.0),
    ]:
        params = [make_param(randn(n, n, dtype)) for n in LENGTHS]
        trio = Trio(
            rule, [{"params": params, "lr": 1e-3}], backend,
            skip_nonfinite=True, max_grad_norm=max_grad_norm,
        )  # fmt: skip
        trio.opt.step()
        for sign in (1.0, -1.0):
            for param in params:
                param.grad = torch.full_like(param, sign * value)
            trio.opt.step()
        assert trio.opt.found_inf.item() == 0.0
        assert trio.opt.skipped_steps.item() == 0


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize(
    "common",
    [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 0.5},
     {"max_grad_norm": 1.0, "max_grad_value": 0.5, "norm_type": math.inf}],
    ids=["plain", "clip", "clip_value", "both"],
)  # fmt: skip
@parametrize("case", PLAIN_CASES)
def test_without_skipping_it_goes_as_in_torch(
    case: OptimizerCase, common: dict[str, Any], value: float, backend: str
) -> None:
    """The same elements become NaN or inf as with torch.optim, and no others."""
    trio = make_trio(case, torch.float32, backend, **common)
    trio.step(good_grads(trio, 0))
    trio.step(bad_grads(trio, 1, (2, "middle"), value))
    trio.check()
    assert trio.opt.skipped_steps.item() == 0
    for index, (param, in_torch) in enumerate(zip(trio.params, trio.torch.params, strict=True)):
        assert torch.equal(param.isnan(), in_torch.isnan()), f"param {index}"
        assert torch.equal(param.isinf(), in_torch.isinf()), f"param {index}"
    for step in range(2, 4):
        trio.step(good_grads(trio, step))
        trio.check()


def test_skip_nonfinite_can_be_switched(backend: str) -> None:
    trio = make_trio(PLAIN_CASES[1], torch.float32, backend, skip_nonfinite=True)
    trio.step(good_grads(trio, 0))
    before = trio.snapshot()
    trio.step(bad_grads(trio, 1, (0, "last"), math.inf))
    trio.assert_unmoved(before)
    trio.opt.skip_nonfinite = trio.oracle.skip_nonfinite = trio.torch.skip_nonfinite = False
    trio.step(bad_grads(trio, 2, (0, "last"), math.inf))
    assert not bool(trio.params[0].isfinite().all())
    assert trio.opt.skipped_steps.item() == 1


def test_the_first_step_of_a_new_plan_counts_as_before_when_it_is_skipped(backend: str) -> None:
    param = make_param(randn(17, 0))
    opt = fusedopt.FusedAdamW([param], skip_nonfinite=True, backend=backend)
    for _ in range(3):
        param.grad = randn(17, 1)
        opt.step()
    opt.load_state_dict(opt.state_dict())  # after which there is no plan
    param.grad = torch.full_like(param, math.nan)
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.state[param]["step"] == 3
