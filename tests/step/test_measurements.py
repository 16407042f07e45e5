"""What the last step measured, and the options and the backend an optimizer shows."""

import pytest
import torch
from protocol_helpers import (
    build,
    every_kind,
    fallback_is_expected,
    give_grads,
    make_params,
    on_every_backend,
    step_all,
)

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


@every_kind
def test_measurements_are_snapshots(kind):
    params, opt = make_params(), None
    opt = build(True, kind, params, max_grad_norm=0.5, skip_nonfinite=True)
    assert opt.grad_norm is None
    kept = []
    for step in range(4):
        give_grads(params, step)
        if step == 2:
            params[0].grad[0, 0] = float("nan")
        opt.step()
        now = (opt.grad_norm, opt.clip_coef, opt.found_inf, opt.skipped_steps)
        for value, dtype in zip(now, [torch.float32] * 3 + [torch.int64], strict=True):
            assert (value.dtype, value.dim(), value.requires_grad) == (dtype, 0, False)
        kept.append((now, [v.clone() for v in now]))
    for now, copies in kept:
        for value, copied in zip(now, copies, strict=True):
            assert torch.equal(value, copied) or value.isnan()
    assert [float(now[2]) for now, _ in kept] == [0, 0, 1, 0]
    assert [int(now[3]) for now, _ in kept] == [0, 0, 1, 1]
    norms = [float(now[0]) for now, _ in kept]
    assert len(set(norms)) == 4
    for i in (0, 1, 3):
        coef = min(1.0, 0.5 / (norms[i] + 1e-6))
        assert float(kept[i][0][1]) == pytest.approx(coef, rel=1e-6)
    opt.grad_norm.fill_(-1.0)
    opt.skipped_steps.fill_(99)
    assert float(opt.grad_norm) == norms[3] and int(opt.skipped_steps) == 1


@every_kind
def test_grad_norm_only_where_measured(kind):
    params, opt = make_params(), None
    opt = build(True, kind, params)
    give_grads(params, 0)
    opt.step()
    assert opt.grad_norm is None
    assert (float(opt.clip_coef), float(opt.found_inf), int(opt.skipped_steps)) == (1.0, 0.0, 0)
    opt.max_grad_norm = float("inf")
    give_grads(params, 1)
    opt.step()
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    torch.testing.assert_close(opt.grad_norm, norm)
    assert float(opt.clip_coef) == 1.0
    opt.norm_type = float("inf")
    opt.step()
    assert float(opt.grad_norm) == max(float(p.grad.abs().max()) for p in params)
    opt.max_grad_norm = None
    opt.step()
    assert opt.grad_norm is None


@every_kind
def test_measuring_changes_no_bit(kind):
    results = []
    for options in ({}, {"max_grad_norm": float("inf")}, {"skip_nonfinite": True}):
        params = make_params()
        opt = build(True, kind, params, **options)
        for step in range(4):
            step_all([(params, opt)], step)
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_kind
def test_options_may_be_assigned(kind):
    params, opt = make_params(), None
    opt = build(True, kind, params)
    assert (opt.max_grad_norm, opt.norm_type, opt.max_grad_value) == (None, 2.0, None)
    assert opt.skip_nonfinite is False
    fixed = make_params()
    fixed_opt = build(True, kind, fixed, max_grad_norm=0.1, max_grad_value=0.02)
    opt.max_grad_norm, opt.max_grad_value = 0.1, 0.02
    for step in range(3):
        step_all([(params, opt), (fixed, fixed_opt)], step)
    assert all(torch.equal(a, b) for a, b in zip(params, fixed, strict=True))
    opt.skip_nonfinite = True
    give_grads(params, 0)
    params[0].grad[0, 0] = float("inf")
    before = params[1].detach().clone()
    opt.step()
    assert torch.equal(before, params[1]) and int(opt.skipped_steps) == 1


def test_backend_is_named(backend):
    params = make_params()
    opt = fusedopt.FusedAdamW(params)
    give_grads(params, 0)
    opt.step()
    assert opt.backend == {"cpu": backend}
