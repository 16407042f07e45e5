"""The Optimizer protocol: closures, hooks, what is printed and zeroed, parameter groups."""

import inspect

import pytest
import torch
from protocol_helpers import (
    KINDS,
    assert_twins,
    build,
    every_kind,
    fallback_is_expected,
    give_grads,
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


@every_kind
def test_closure_by_name_and_value_passed_through(kind):
    params, opt = twins(kind)[0]
    give_grads(params, 0)
    token = object()
    assert opt.step(closure=lambda: token) is token
    assert opt.step() is None and opt.step(None) is None


@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])
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
    params, opt = twins(kind)[0]
    calls = []
    handles = [
        opt.register_step_pre_hook(lambda o, a, k: calls.append(("pre", o is opt, len(a)))),
        opt.register_step_post_hook(lambda o, a, k: calls.append(("post", o is opt, len(a)))),
        register_optimizer_step_pre_hook(
            lambda o, a, k: calls.append(("global-pre", o is opt, len(a)))
        ),
        register_optimizer_step_post_hook(
            lambda o, a, k: calls.append(("global-post", o is opt, len(a)))
        ),
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
def test_pre_hook_may_replace_the_closure(kind):
    params, opt = twins(kind)[0]
    give_grads(params, 0)
    opt.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 5.0), {}))
    assert opt.step(lambda: 1.0) == 5.0


@every_kind
def test_profiler_names_the_step(kind):
    params, opt = twins(kind)[0]
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
def test_groups_with_their_own_everything(kind):
    extra = (
        [{"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3}, {"amsgrad": True, "maximize": True}]
        if kind == "adamw"
        else [{"lr": 0.01, "momentum": 0.0}, {"nesterov": True, "dampening": 0, "maximize": True}]
    )
    pairs = []
    for own in (True, False):
        params = make_params()
        groups = [
            {"params": params[:1]},
            {"params": params[1:2], "weight_decay": 0.0, **extra[0]},
            {"params": params[2:], **extra[1]},
        ]
        pairs.append((params, build(own, kind, groups)))
    for step in range(4):
        step_all(pairs, step)
    assert_twins(pairs)


@every_kind
def test_add_param_group_in_the_middle(kind):
    pairs = twins(kind)
    late = [make_params(seed=8), make_params(seed=8)]
    for step in range(6):
        if step == 3:
            for (_, opt), more in zip(pairs, late, strict=True):
                opt.add_param_group({"params": more, "lr": 0.01, "weight_decay": 0.0})
        step_all(pairs, step)
        if step >= 3:
            step_all(list(zip(late, [o for _, o in pairs], strict=True)), step)
    assert_twins(pairs)
    assert_twins([(m, o) for m, (_, o) in zip(late, pairs, strict=True)])


def test_clipping_is_over_all_groups():
    params = make_params()
    opt = fusedopt.FusedSGD([{"params": [p]} for p in params], lr=1.0, max_grad_norm=0.5)
    start = [p.detach().clone() for p in params]
    give_grads(params, 0)
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    opt.step()
    torch.testing.assert_close(opt.grad_norm, norm)
    for p, s in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), s - p.grad * (0.5 / (norm + 1e-6)))


@every_kind
def test_empty_groups_and_generators(kind):
    cls = KINDS[kind][0]
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        cls([])
    opt = cls([{"params": []}], max_grad_norm=1.0)
    opt.step()
    model = torch.nn.Linear(3, 2)
    opt = cls(p for p in model.parameters())
    assert opt.param_groups[0]["params"] == list(model.parameters())
    opt.add_param_group({"params": (p for p in make_params())})
    assert len(opt.param_groups[1]["params"]) == 3
    opt.add_param_group({"params": torch.nn.Parameter(torch.zeros(2))})
    for group in opt.param_groups:
        give_grads(group["params"], 0)
    opt.step()
    # a group that is empty between two that are not
    params = make_params()
    middle = cls([{"params": params[:1]}, {"params": []}, {"params": params[1:]}], lr=0.1)
    give_grads(params, 0)
    before = [p.detach().clone() for p in params]
    middle.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@every_kind
def test_extra_group_keys_are_kept(kind):
    params = make_params()
    opt = KINDS[kind][0]([{"params": params, "param_group": "weights", "initial_lr": 0.3}])
    give_grads(params, 0)
    opt.step()
    assert opt.param_groups[0]["param_group"] == "weights"
    assert opt.state_dict()["param_groups"][0]["initial_lr"] == 0.3


@every_kind
def test_two_optimizers_in_one_process(kind):
    both = [make_params(seed=1), make_params(seed=2)]
    alone = [make_params(seed=1), make_params(seed=2)]
    opts = [build(True, kind, p, max_grad_norm=0.5) for p in both]
    for step in range(4):
        for params, opt in zip(both, opts, strict=True):
            step_all([(params, opt)], step)
    for params in alone:
        opt = build(True, kind, params, max_grad_norm=0.5)
        for step in range(4):
            step_all([(params, opt)], step)
    for a, b in zip(both[0] + both[1], alone[0] + alone[1], strict=True):
        assert torch.equal(a, b)
