"""A warning names the line of the user's, by whatever way the step was reached."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch

import fusedopt
from fusedopt.backends import registry as backends


def make(**options: object) -> tuple[torch.Tensor, fusedopt.FusedSGD]:
    param = torch.ones(3, dtype=torch.float64, requires_grad=True)
    param.grad = torch.ones_like(param)
    return param, fusedopt.FusedSGD([param], lr=0.1, **options)  # type: ignore[arg-type]


def by_step(opt: fusedopt.FusedSGD) -> int:
    opt.step()
    return line()


def by_init_state(opt: fusedopt.FusedSGD) -> int:
    opt.init_state()
    return line()


def by_load_and_step(opt: fusedopt.FusedSGD) -> int:
    opt.load_state_dict(opt.state_dict())
    opt.step()
    return line()


def by_a_scheduler(opt: fusedopt.FusedSGD) -> int:
    torch.optim.lr_scheduler.StepLR(opt, 1)
    opt.step()
    return line()


def by_hooks_and_the_profiler(opt: fusedopt.FusedSGD) -> int:
    opt.register_step_pre_hook(lambda *_: None)
    with torch.profiler.profile():
        opt.step()
        return line()


def by_torchs_scaler(opt: fusedopt.FusedSGD) -> int:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    return line()


def by_our_scaler(opt: fusedopt.FusedSGD) -> int:
    scaler = fusedopt.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    return line()


def by_a_hook_in_backward(opt: fusedopt.FusedSGD) -> int:
    lines = []
    param = opt.param_groups[0]["params"][0]

    def step(_: torch.Tensor) -> None:
        opt.step()
        lines.append(line())

    param.register_post_accumulate_grad_hook(step)
    param.sum().backward()
    return lines[0]


def under_no_grad(opt: fusedopt.FusedSGD) -> int:
    torch.no_grad()(opt.step)()
    return line()


def line() -> int:
    """The line before that of the caller."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno - 1


WAYS = [
    by_step, by_init_state, by_load_and_step, by_a_scheduler, by_hooks_and_the_profiler,
    by_torchs_scaler, by_our_scaler, by_a_hook_in_backward, under_no_grad,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_fallback_names_the_users_line(
    way: Callable[[fusedopt.FusedSGD], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_announced", set())  # it is said once in a process
    _, opt = make()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", fusedopt.FusedOptFallbackWarning)
        expected = way(opt)
    (warning,) = [w for w in said if w.category is fusedopt.FusedOptFallbackWarning]
    assert (warning.filename, warning.lineno) == (__file__, expected)
