"""The Optimizer protocol: closures, hooks, what is printed, zeroed and measured, groups."""

import inspect

import pytest
import torch
from protocol_helpers import (
    KINDS,
    assert_twins,
    every_class,
    every_kind,
    fallback_is_expected,
    give_grads,
    make_ours,
    make_params,
    on_every_backend,
    step_all,
    twins,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# The step and its hooks


@every_kind
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_closure(kind, grad_enabled):
    pairs = twins(kind)
    for _ in range(3):
        losses = []
        for params, opt in pairs:
            calls = []

            def closure(params=params, opt=opt, calls=calls):
                calls.append(torch.is_grad_enabled())
                opt.zero_grad()
                loss = sum(p.square().sum() for p in params)
                loss.backward()
                return loss

            with torch.set_grad_enabled(grad_enabled):
                losses.append(opt.step(closure))
                assert torch.is_grad_enabled() is grad_enabled
            assert calls == [True]
        torch.testing.assert_close(losses[0], losses[1])
        assert losses[0].requires_grad
    assert_twins(pairs)


@every_class
def test_signature_of_step(cls):
    opt = cls(make_params())
    for step in (cls.step, opt.step):
        parameters = [p for n, p in inspect.signature(step).parameters.items() if n != "self"]
        assert [(p.name, p.default) for p in parameters] == [("closure", None)]
    assert list(inspect.signature(opt.zero_grad).parameters) == ["set_to_none"]
    assert not hasattr(opt, "train") and not hasattr(opt, "eval")
    assert isinstance(opt, torch.optim.Optimizer)


@every_kind
def test_step_hooks(kind):
    params, opt = make_ours(kind)
    calls = []

    def noting(name):
        return lambda o, args, kwargs: calls.append((name, o is opt, len(args)))

    handles = [
        opt.register_step_pre_hook(noting("pre")),
        opt.register_step_post_hook(noting("post")),
        register_optimizer_step_pre_hook(noting("global-pre")),
        register_optimizer_step_post_hook(noting("global-post")),
    ]
    give_grads(params, 0)
    opt.step()
    for handle in handles:
        handle.remove()
    opt.step()
    names = ["global-pre", "pre", "post", "global-post"]
    assert calls == [(name, True, 1) for name in names]


@every_kind
def test_hooks_may_edit_gradients_and_hyper_parameters(kind):
    pairs = twins(kind)
    for params, opt in pairs:

        def edit(opt, args, kwargs, params=params):
            params[1].grad.mul_(3.0)
            opt.param_groups[0]["lr"] *= 0.5

        opt.register_step_pre_hook(edit)
    for step in range(3):
        step_all(pairs, step)
    assert_twins(pairs)


@every_kind
def test_value_of_the_closure(kind):
    """Passed through; a pre-hook may replace the closure."""
    params, opt = make_ours(kind)
    give_grads(params, 0)
    token = object()
    assert opt.step(closure=lambda: token) is token
    assert opt.step() is None and opt.step(None) is None
    opt.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 5.0), {}))
    assert opt.step(lambda: 1.0) == 5.0


@every_kind
def test_profiler_names_the_step(kind):
    params, opt = make_ours(kind)
    give_grads(params, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        opt.step()
        opt.zero_grad()
    names = {event.key for event in prof.key_averages()}
    cls = type(opt).__name__
    assert {f"Optimizer.step#{cls}.step", f"Optimizer.zero_grad#{cls}.zero_grad"} <= names


def test_repr_is_torchs():
    params = make_params()
    groups = [{"params": params[:1], "lr": 0.5, "note": "kept"}, {"params": params[1:]}]
    ours = repr(fusedopt.FusedAdamW([dict(g) for g in groups]))
    theirs = repr(torch.optim.AdamW([dict(g) for g in groups]))
    assert ours.replace("FusedAdamW", "AdamW") == theirs
    assert "decoupled_weight_decay: True" in repr(fusedopt.FusedSGD(params))


@every_kind
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(kind, set_to_none):
    pairs = twins(kind)
    step_all(pairs, 0)
    for params, opt in pairs:
        grads = [p.grad for p in params]
        opt.zero_grad(set_to_none=set_to_none)
        if set_to_none:
            assert all(p.grad is None for p in params)
        else:
            assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True))
        opt.step()  # a gradient of zero is a step, none is not
    assert_twins(pairs)
    step_all(pairs, 1)
    assert_twins(pairs)


# Groups


@every_kind
def test_empty_groups_generators_and_keys_of_others(kind):
    cls = KINDS[kind][0]
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        cls([])
    cls([{"params": []}], max_grad_norm=1.0).step()
    params = make_params()
    opt = cls((p for p in params[:1]), lr=0.1)
    opt.add_param_group({"params": [], "param_group": "none", "initial_lr": 0.3})
    opt.add_param_group({"params": (p for p in params[1:2])})
    opt.add_param_group({"params": params[2]})
    found = [group["params"] for group in opt.param_groups]
    assert found == [[params[0]], [], [params[1]], [params[2]]]
    give_grads(params, 0)
    before = [p.detach().clone() for p in params]
    opt.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert opt.param_groups[1]["param_group"] == "none"
    assert opt.state_dict()["param_groups"][1]["initial_lr"] == 0.3


# What the last step measured, and the options and the backend that an optimizer shows


@every_kind
def test_measurements_are_snapshots(kind):
    params, opt = make_ours(kind, max_grad_norm=0.5, skip_nonfinite=True)
    assert opt.grad_norm is None
    kept = []
    for step in range(4):
        give_grads(params, step, bad=float("nan") if step == 2 else None)
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
    params, opt = make_ours(kind)
    step_all([(params, opt)], 0)
    assert opt.grad_norm is None
    assert (float(opt.clip_coef), float(opt.found_inf), int(opt.skipped_steps)) == (1.0, 0.0, 0)
    opt.max_grad_norm = float("inf")
    step_all([(params, opt)], 1)
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
    pairs = [
        make_ours(kind, **options)
        for options in ({}, {"max_grad_norm": float("inf")}, {"skip_nonfinite": True})
    ]
    for step in range(4):
        step_all(pairs, step)
    for other, _ in pairs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(pairs[0][0], other, strict=True))


@every_kind
def test_options_may_be_assigned(kind):
    params, opt = make_ours(kind)
    assert (opt.max_grad_norm, opt.norm_type, opt.max_grad_value) == (None, 2.0, None)
    assert opt.skip_nonfinite is False
    fixed, fixed_opt = make_ours(kind, max_grad_norm=0.1, max_grad_value=0.02)
    opt.max_grad_norm, opt.max_grad_value = 0.1, 0.02
    for step in range(3):
        step_all([(params, opt), (fixed, fixed_opt)], step)
    assert all(torch.equal(a, b) for a, b in zip(params, fixed, strict=True))


def test_backend_is_named(backend):
    params, opt = make_ours()
    step_all([(params, opt)], 0)
    assert opt.backend == {"cpu": backend}
