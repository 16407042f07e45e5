"""What was made in inference mode is refused in a step outside of it, before anything moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from protocol_helpers import OPTIMIZERS, every_kind, fallback_is_expected
from step_scenes import served_by
from test_failing_step import assert_equal, snapshot

pytestmark = fallback_is_expected
_served_by = served_by


def make(kind: str, backend: str, made_inside: bool) -> tuple[list[torch.nn.Parameter], Any]:
    """The second of three parameters may be made in inference mode."""
    cls, kwargs = OPTIMIZERS[kind]
    with torch.inference_mode(made_inside):
        second = torch.nn.Parameter(torch.full((7,), 2.0))
    params = [torch.nn.Parameter(torch.ones(5)), second, torch.nn.Parameter(torch.ones(4))]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    return params, cls(params, **kwargs, backend=backend)


@every_kind
@pytest.mark.parametrize("stepped", [0, 2])
def test_a_parameter(kind: str, stepped: int, served_by: str) -> None:
    (params, opt), (twins, twin_opt) = [make(kind, served_by, m) for m in (True, False)]
    with torch.inference_mode():  # where torch allows it
        for _ in range(stepped):
            opt.step()
    for _ in range(stepped):
        twin_opt.step()
    before = snapshot(params, opt)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"param 1 of group 0 was made in inference mode"):
            opt.step()
        assert_equal(before, snapshot(params, opt))
    # what the message names
    with torch.inference_mode():
        opt.step()
    twin_opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@every_kind
def test_its_clone(kind: str, served_by: str) -> None:
    params, _ = make(kind, served_by, made_inside=True)
    cls, kwargs = OPTIMIZERS[kind]
    param = torch.nn.Parameter(params[1].clone())
    opt = cls([param], **kwargs, backend=served_by)
    param.grad = torch.ones(7)
    opt.step()
    assert not torch.equal(param, params[1])


@every_kind
def test_a_parameter_that_got_other_memory(kind: str, served_by: str) -> None:
    """``.data`` of a parameter of inference mode does not make it writable, as torch has it."""
    params, opt = make(kind, served_by, made_inside=True)
    params[1].data = params[1].data.clone()
    with pytest.raises(RuntimeError, match=r"param 1 of group 0 was made in inference mode"):
        opt.step()
    params, opt = make(kind, served_by, made_inside=False)
    with torch.inference_mode():
        params[1].data = torch.full((7,), 2.0)
    assert params[1].is_inference()
    opt.step()  # and the other way round it stays so
    assert not torch.equal(params[1], torch.full((7,), 2.0))


@every_kind
def test_a_state(kind: str, served_by: str) -> None:
    (params, opt), (twins, twin_opt) = [make(kind, served_by, False) for _ in range(2)]
    opt.step()
    twin_opt.step()
    own = opt.state[params[1]]
    for name in own:
        good = own[name]
        with torch.inference_mode():
            own[name] = good.clone()
        before = snapshot(params, opt)
        with pytest.raises(RuntimeError, match=rf"param 1 of group 0: state '{name}' was made in"):
            opt.step()
        assert_equal(before, snapshot(params, opt))
        own[name] = own[name].clone()  # what the message names
    opt.step()
    twin_opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@every_kind
def test_a_parameter_without_gradient_is_left_alone(kind: str, served_by: str) -> None:
    params, opt = make(kind, served_by, made_inside=True)
    params[1].grad = None
    for _ in range(2):
        opt.step()
    assert params[1].eq(2).all() and not params[0].eq(1).any()
    params[1].grad = torch.ones(7)
    with pytest.raises(RuntimeError, match=r"param 1 of group 0 was made in inference mode"):
        opt.step()
