"""The Optimizer protocol: everything a user of torch.optim may do to an optimizer between steps."""

import collections
import inspect
import itertools
import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import fusedopt

# float64 is served by the reference backend, and says so once
pytestmark = pytest.mark.filterwarnings("ignore::fusedopt.FusedOptFallbackWarning")

COUPLED = {"decoupled_weight_decay": False}
KINDS = {
    "adamw": (
        fusedopt.FusedAdamW,
        torch.optim.AdamW,
        {"lr": 0.1, "weight_decay": 0.1},
        {},
    ),
    "sgd": (
        fusedopt.FusedSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        COUPLED,
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF, torch.float64]


@pytest.fixture(autouse=True)
def _every_backend(backend, monkeypatch):
    # "auto" takes the CPU kernels wherever they can serve: not for float64
    monkeypatch.setenv("FUSEDOPT_BACKEND", "auto" if backend == "cpu" else backend)


def make_params(dtype=torch.float32, seed=7):
    gen = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in ((5, 3), (37,), ())
    ]


def build(own, kind, params, **options):
    our_cls, their_cls, kwargs, extra = KINDS[kind]
    if own:
        return our_cls(params, **{**kwargs, **extra, **options})
    return their_cls(params, **{**kwargs, **options}, foreach=False)


def twins(kind, **options):
    """[(params, opt) of ours, (params, opt) of torch's], the same start."""
    pairs = []
    for own in (True, False):
        params = make_params()
        pairs.append((params, build(own, kind, params, **options)))
    return pairs


def give_grads(params, step):
    gen = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)


def step_all(pairs, step):
    for params, opt in pairs:
        give_grads(params, step)
        opt.step()


def assert_twins(pairs, rtol=1e-5, atol=1e-6):
    (ours, our_opt), (theirs, their_opt) = pairs
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, i=i: f"param {i}: {m}")
        for name, value in their_opt.state.get(b, {}).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(our_opt.state[a][name], value, rtol=rtol, atol=atol)


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
def test_hyper_parameters_are_read_every_step(kind):
    pairs = twins(kind)
    for step in range(6):
        for _, opt in pairs:
            group = opt.param_groups[0]
            group["lr"] = 0.1 / (step + 1)
            group["weight_decay"] = 0.02 * step
            if kind == "adamw":
                group["betas"] = (0.9 - 0.1 * step, 0.99)
                group["eps"] = 10.0 ** -(step + 2)
            else:
                group["momentum"] = 0.5 + 0.05 * step
                group["dampening"] = 0.1 * step
            group["maximize"] = step == 4
        step_all(pairs, step)
    assert_twins(pairs)


def test_momentum_switched_on_later():
    pairs = twins("sgd", momentum=0.0)
    for step in range(5):
        if step == 2:
            for _, opt in pairs:
                opt.param_groups[0]["momentum"] = 0.9
        step_all(pairs, step)
    assert_twins(pairs)


def test_amsgrad_switched_on_later():
    params, opt = twins("adamw")[0]
    step_all([(params, opt)], 0)
    opt.param_groups[0]["amsgrad"] = True
    step_all([(params, opt)], 1)
    for p in params:  # torch raises KeyError here
        assert (opt.state[p]["max_exp_avg_sq"] >= opt.state[p]["exp_avg_sq"]).all()
        assert p.isfinite().all()


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


# Gradients that come and go


@every_kind
def test_none_gradients(kind):
    pairs = twins(kind)
    for step in range(6):
        for params, opt in pairs:
            give_grads(params, step)
            for i, p in enumerate(params):
                if (step + i) % 3 == 0:
                    p.grad = None
            opt.step()
    assert_twins(pairs)
    ours, opt = pairs[0]
    assert {float(opt.state[p]["step"]) for p in ours} == {4.0}
    params, opt = twins(kind)[0]
    opt.step()
    assert not opt.state and all(
        torch.equal(a, b) for a, b in zip(params, make_params(), strict=True)
    )


@every_kind
def test_frozen_and_thawed(kind):
    pairs = twins(kind)
    for step in range(9):
        for params, opt in pairs:
            params[1].requires_grad_(not 3 <= step < 6)
            opt.zero_grad()
            loss = sum(((p - step) ** 2).sum() for p in params)
            loss.backward()
            assert (params[1].grad is None) == (3 <= step < 6)
            opt.step()
    assert_twins(pairs)
    assert float(pairs[0][1].state[pairs[0][0][1]]["step"]) == 6


@every_kind
def test_stale_gradient_of_a_frozen_param_is_used_as_in_torch(kind):
    pairs = twins(kind)
    step_all(pairs, 0)
    for params, opt in pairs:
        params[0].requires_grad_(False)
        opt.step()
    assert_twins(pairs)


@every_kind
def test_thawed_after_init_state(kind):
    """init_state leaves frozen params out; they get their state when they first have a gradient."""
    pairs = twins(kind)
    for params, opt in pairs:
        params[1].requires_grad_(False)
        if isinstance(opt, KINDS[kind][0]):
            opt.init_state()
            assert params[1] not in opt.state and params[0] in opt.state
        params[1].requires_grad_(True)
    step_all(pairs, 0)
    assert_twins(pairs)


# Parameters that are moved, converted and replaced


def wide_twin(params, opt, kind, dtype):
    """An oracle that goes on from the values `params` have now, in `dtype`, with opt's moments."""
    twin = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
    for p, q in zip(params, twin, strict=True):
        master = opt.state[p].get("master_param")
        if master is not None and p.dtype in HALF:  # from half to half: where it fits, it stays
            q.data.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
    twin_opt = build(False, kind, twin)
    for p, q in zip(params, twin, strict=True):
        for key, value in opt.state[p].items():
            if key not in ("master_param", "step") or (key == "step" and kind == "adamw"):
                twin_opt.state[q][key] = value.to(dtype if key != "step" else value.dtype).clone()
    return twin, twin_opt


@every_kind
@pytest.mark.parametrize("first, second", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_module_to_dtype_between_steps(kind, first, second):
    torch.manual_seed(0)
    model = torch.nn.Linear(9, 5).to(first)
    params = list(model.parameters())
    opt = build(True, kind, params)
    for step in range(2):
        step_all([(params, opt)], step)
    model.to(second)
    assert all(p.dtype == second for p in params)
    wide = torch.float64 if second == torch.float64 else torch.float32
    twin, twin_opt = wide_twin(params, opt, kind, wide)
    for step in range(2, 5):
        step_all([(params, opt)], step)
        for p, q in zip(params, twin, strict=True):
            q.grad = p.grad.to(wide)
        twin_opt.step()
    for p, q in zip(params, twin, strict=True):
        own = opt.state[p]["master_param"] if second in HALF else p
        assert own.dtype == wide
        torch.testing.assert_close(own.detach(), q.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(p, own.to(second))


@every_kind
def test_param_data_replaced(kind):
    pairs = twins(kind)
    gen = torch.Generator().manual_seed(5)
    for step in range(4):
        step_all(pairs, step)
        fresh = torch.randn(37, generator=gen)
        strided = torch.randn(3, 5, generator=gen).t()
        for params, _ in pairs:
            params[1].data = fresh.clone()
            params[0].data = strided.clone() if step % 2 else strided.clone().contiguous()
    assert_twins(pairs)


@every_kind
def test_param_data_replaced_leaves_the_old_memory_alone(kind):
    params, opt = twins(kind)[0]
    step_all([(params, opt)], 0)
    old = params[1].data
    kept = old.clone()
    params[1].data = torch.zeros(37)
    step_all([(params, opt)], 1)
    assert torch.equal(old, kept)
    assert params[1].any()


@every_kind
def test_external_writes_between_steps(kind):
    pairs = twins(kind)
    for step in range(4):
        step_all(pairs, step)
        with torch.no_grad():
            for params, _ in pairs:
                params[0].mul_(0.5)
                params[1][::2] = 1.0
    assert_twins(pairs)


def densify(params, opt, key, grow):
    """Gaussian splatting: replace a parameter by a longer one and carry its state over by hand."""
    group = opt.param_groups[0]
    old = group["params"][1]
    new = torch.nn.Parameter(torch.cat([old.detach(), torch.ones(grow)]))
    state = opt.state.pop(old)
    for name in key:
        state[name] = torch.cat([state[name], torch.zeros(grow)])
    group["params"][1] = params[1] = new
    opt.state[new] = state


def prune(params, opt, key, keep):
    group = opt.param_groups[0]
    old = group["params"][1]
    new = torch.nn.Parameter(old.detach()[:keep].clone())
    state = opt.state.pop(old)
    for name in key:
        state[name] = state[name][:keep]  # a view into the longer state
    group["params"][1] = params[1] = new
    opt.state[new] = state


@every_kind
def test_param_replaced_in_its_group(kind):
    pairs = twins(kind)
    key = ["exp_avg", "exp_avg_sq"] if kind == "adamw" else ["momentum_buffer"]
    for step in range(8):
        for params, opt in pairs:
            if step == 2:
                densify(params, opt, key, 20)
            if step == 5:
                prune(params, opt, key, 11)
        step_all(pairs, step)
    assert_twins(pairs)
    assert float(pairs[0][1].state[pairs[0][0][1]]["step"]) == 8


@every_kind
def test_param_replaced_without_its_state(kind):
    pairs = twins(kind)
    step_all(pairs, 0)
    for params, opt in pairs:
        opt.param_groups[0]["params"][1] = params[1] = torch.nn.Parameter(torch.ones(4))
    step_all(pairs, 1)
    assert_twins(pairs)
    assert float(pairs[0][1].state[pairs[0][0][1]]["step"]) == 1


def replace_state(params, opt):
    opt.state = collections.defaultdict(dict)


def clear_state(params, opt):
    opt.state.clear()


def clear_inner(params, opt):
    opt.state[params[1]].clear()


def copy_state(params, opt):
    opt.state = collections.defaultdict(
        dict, {p: {k: v.clone() for k, v in s.items()} for p, s in opt.state.items()}
    )


def moment(state):
    return "exp_avg" if "exp_avg" in state else "momentum_buffer"


def replace_tensor(params, opt):
    state = opt.state[params[1]]
    state[moment(state)] = torch.linspace(-1, 1, 37)


def replace_data(params, opt):
    state = opt.state[params[1]]
    state[moment(state)].data = torch.linspace(-1, 1, 37)


def write_in_place(params, opt):
    state = opt.state[params[1]]
    state[moment(state)].zero_()


def restride(params, opt):
    """The same values, transposed in memory."""
    state = opt.state[params[0]]
    state[moment(state)] = state[moment(state)].t().contiguous().t()


def plain_dict(params, opt):
    opt.state = {p: collections.OrderedDict(s) for p, s in opt.state.items()}


def foreign_entries(params, opt):
    opt.state["counter"] = {"a": 1}
    opt.state[torch.nn.Parameter(torch.ones(2))] = {"exp_avg": torch.ones(5)}
    opt.state[params[0]]["note"] = "kept"


def copy_groups(params, opt):
    opt.param_groups = [{**g, "params": list(g["params"])} for g in opt.param_groups]


def tuple_of_params(params, opt):
    opt.param_groups[0]["params"] = tuple(params)


def into_shared_memory(params, opt):
    for p in params:
        p.share_memory_()


SURGERIES = [replace_state, clear_state, clear_inner, copy_state, replace_tensor, replace_data]
SURGERIES += [write_in_place, restride, plain_dict, foreign_entries, copy_groups, tuple_of_params]
SURGERIES += [into_shared_memory]


@every_kind
@pytest.mark.parametrize("surgery", SURGERIES, ids=lambda f: f.__name__)
def test_state_surgery(kind, surgery):
    pairs = twins(kind)
    for step in range(6):
        if step in (2, 4):
            for params, opt in pairs:
                surgery(params, opt)
        step_all(pairs, step)
    assert_twins(pairs)


STEP_FORMS = {
    "fp32": lambda: torch.tensor(20.0),
    "fp64": lambda: torch.tensor(20.0, dtype=torch.float64),
    "int64": lambda: torch.tensor(20),
    # with room behind it, for whoever takes it for fp32
    "fp16": lambda: torch.tensor([20.0, 0, 0, 0], dtype=torch.float16)[0],
    "1-element": lambda: torch.tensor([20.0]),
    "int": lambda: 20,
    "float": lambda: 20.0,
}


@pytest.mark.parametrize("form", STEP_FORMS)
def test_step_count_may_be_set(form):
    pairs = twins("adamw")
    step_all(pairs, 0)
    for i, (params, opt) in enumerate(pairs):
        opt.state[params[0]]["step"].fill_(50.0)
        opt.state[params[1]]["step"] = torch.tensor(20.0) if i else STEP_FORMS[form]()
    for step in (1, 2):
        step_all(pairs, step)
    for (params, opt), (others, other_opt) in itertools.pairwise(pairs):
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            assert float(opt.state[p]["step"]) == float(other_opt.state[q]["step"])


@every_kind
@pytest.mark.parametrize("what", ["param", "state"])
def test_transposed_in_place(kind, what):
    """The same tensor on the same memory with other strides."""
    pairs = []
    for own in (True, False):
        params = [torch.nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))]
        pairs.append((params, build(own, kind, params)))
    for step in range(4):
        if step == 2:
            for params, opt in pairs:
                state = opt.state[params[0]]
                with torch.no_grad():
                    (params[0] if what == "param" else state[moment(state)]).t_()
        step_all(pairs, step)
    assert_twins(pairs)


@every_kind
def test_memory_shared_by_a_lazy_clone_is_left_alone(kind):
    """A copy-on-write clone keeps its values when the original is stepped."""
    if not hasattr(torch, "_lazy_clone"):
        pytest.skip("this torch has no lazy clones")
    params, opt = twins(kind)[0]
    source = params[0].detach().clone()
    params[0].data = torch._lazy_clone(source)
    for step in range(2):
        held = [torch._lazy_clone(p.detach()) for p in params]
        held += [torch._lazy_clone(v) for s in opt.state.values() for v in s.values()]
        values = [t.clone() for t in held]
        kept = source.clone()
        step_all([(params, opt)], step)
        assert torch.equal(source, kept)
        assert all(torch.equal(a, b) for a, b in zip(held, values, strict=True))
        assert not torch.equal(held[0], params[0])


# External writes to a half param


@every_kind
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("write", ["in-place", "data-copy", "data-new", "load_state_dict"])
def test_master_follows_an_external_write(kind, dtype, write):
    torch.manual_seed(0)
    model = torch.nn.Linear(9, 5).to(dtype)
    params = list(model.parameters())
    opt = build(True, kind, params)
    step_all([(params, opt)], 0)
    masters = [opt.state[p]["master_param"].clone() for p in params]
    values = params[0].detach().clone()
    values[1:3] = 0.25
    if write == "in-place":
        with torch.no_grad():
            params[0].copy_(values)
    elif write == "data-copy":
        params[0].data.copy_(values)
    elif write == "data-new":
        params[0].data = values
    else:
        model.load_state_dict({"weight": values, "bias": params[1].detach()})
    for group in opt.param_groups:
        group.update(lr=0.0)
    step_all([(params, opt)], 1)
    assert torch.equal(params[0], values)  # not undone
    after = opt.state[params[0]]["master_param"]
    assert torch.equal(after[1:3], torch.full((2, 9), 0.25))
    # elements nobody wrote keep what the master knows and the param does not
    assert torch.equal(after[0], masters[0][0]) and torch.equal(after[3:], masters[0][3:])
    assert torch.equal(opt.state[params[1]]["master_param"], masters[1])


# Autograd


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
def test_version_counters(kind, dtype):
    """A graph that saved a parameter must not be walked after the parameter has changed."""
    param = torch.nn.Parameter(torch.ones(20, dtype=dtype))
    idle = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    opt = build(True, kind, [param, idle])
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    versions = param._version, idle._version, param.grad._version
    opt.step()
    assert param._version > versions[0]
    assert (idle._version, param.grad._version) == versions[1:]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_kind
def test_parameters_stay_leaves(kind):
    params, opt = twins(kind)[0]
    step_all([(params, opt)], 0)
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
    assert not any(v.requires_grad for s in opt.state.values() for v in s.values())


@every_kind
def test_gradient_with_a_graph(kind):
    """create_graph=True leaves gradients that require grad themselves."""
    pairs = twins(kind)
    for params, opt in pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sum((p**3).sum() for p in params).backward(create_graph=True)
        assert params[0].grad.requires_grad
        opt.step()
        for p in params:
            p.grad = None
    assert_twins(pairs)


@every_kind
@pytest.mark.parametrize("mode", ["no_grad", "inference", "autocast"])
def test_stepped_under_another_mode(kind, mode):
    modes = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    params, plain = make_params(), make_params()
    opts = [build(True, kind, p, max_grad_norm=0.5) for p in (params, plain)]
    for step in range(3):
        for p in (params, plain):
            give_grads(p, step)
        with modes[mode]():
            opts[0].step()
        opts[1].step()
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


@every_kind
def test_step_in_backward(kind):
    """One optimizer a parameter, stepped as soon as the gradient is there."""
    results = []
    for own in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        opts = {p: build(own, kind, [p]) for p in model.parameters()}

        def step(param, opts=opts):
            opts[param].step()
            opts[param].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        gen = torch.Generator().manual_seed(1)
        for _ in range(3):
            model(torch.randn(3, 4, generator=gen)).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        results.append(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_kind
def test_gradient_with_the_negative_bit(kind):
    """A view that says "negate me" when read: its memory holds the opposite sign."""
    pairs = twins(kind)
    for step in range(2):
        for params, opt in pairs:
            give_grads(params, step)
            params[1].grad = torch._neg_view(params[1].grad)
            assert params[1].grad.is_neg()
            opt.step()
    assert_twins(pairs)


@every_kind
def test_swapped_module_parameters(kind):
    """torch's other way of converting a module: the tensors behind the parameters are swapped."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = torch.nn.Linear(9, 5)
        params = list(model.parameters())
        opt = build(True, kind, params)
        step_all([(params, opt)], 0)
        model.to(torch.bfloat16)
        assert model.weight is params[0] and params[0].dtype == torch.bfloat16
        before = [p.detach().clone() for p in params]
        step_all([(params, opt)], 1)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, opt.state[p]["master_param"].bfloat16())
        assert not torch.equal(p, old)
        assert float(opt.state[p]["step"]) == 2


@every_kind
def test_lazy_parameter(kind):
    """Built before its shape is known; without a gradient it is left alone, as any other."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LazyLinear(2))
    opt = KINDS[kind][0](model.parameters(), lr=0.1, max_grad_norm=1.0)
    model[0](torch.ones(2, 3)).sum().backward()
    before = model[0].weight.detach().clone()
    opt.step()
    assert not torch.equal(before, model[0].weight)
    model(torch.ones(2, 3)).sum().backward()
    start = model[1].weight.detach().clone()
    opt.step()
    assert not torch.equal(start, model[1].weight)


# Process-wide defaults


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_changes_nothing(kind, dtype):
    starts = [p.detach().clone() for p in make_params()]
    grads = []
    for step in range(4):
        give_grads(holders := make_params(), step)
        grads.append([p.grad for p in holders])
    grads[1][0][0, 0] = float("inf")

    def train():
        params = [torch.nn.Parameter(v.clone()) for v in starts]
        opt = build(True, kind, params, max_grad_norm=0.5, skip_nonfinite=True)
        seen = [opt.clip_coef, opt.found_inf, opt.skipped_steps]
        # or the kernels would write fp32 into memory made for something narrower
        assert [v.dtype for v in seen] == [torch.float32, torch.float32, torch.int64]
        opt.init_state()
        for step in range(4):
            if step == 3:
                opt.max_grad_norm, opt.skip_nonfinite = None, False
            for p, g in zip(params, grads[step], strict=True):
                p.grad = g.clone()
            opt.step()
            seen += [opt.grad_norm, opt.clip_coef, opt.found_inf, opt.skipped_steps]
        return [*params, *(v for p in params for v in opt.state[p].values()), *seen]

    expected = train()
    torch.set_default_dtype(dtype)
    try:
        results = train()
    finally:
        torch.set_default_dtype(torch.float32)
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        if a is not None and b is not None:
            assert a.dtype == b.dtype, i
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a is b


@every_kind
@pytest.mark.parametrize("when", ["construction", "first-step", "later-step", "all"])
def test_default_device_changes_nothing(kind, when):
    """The default device is where new tensors go; a step on CPU parameters has none to put there.

    "meta" stands in for the "cuda" of torch.set_default_device, whose memory the CPU cannot read.
    """
    params, plain = make_params(), make_params()
    plain_opt = build(True, kind, plain, max_grad_norm=0.5)

    def under(moment):
        return torch.device("meta" if when in (moment, "all") else "cpu")

    with under("construction"):
        opt = build(True, kind, params, max_grad_norm=0.5)
    for step in range(3):
        give_grads(params, step)
        give_grads(plain, step)
        with under("later-step" if step else "first-step"):
            opt.step()
        plain_opt.step()
        assert torch.equal(opt.grad_norm, plain_opt.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


# Schedulers

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "SWALR": lambda o: SWALR(o, 0.05, 3),
}


def test_no_scheduler_is_left_out():
    known = set(SCHEDULERS) | {"LRScheduler", "SWALR"}
    assert known >= set(lr_scheduler.__all__)


@every_kind
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(kind, name, tensor_lr):
    def build_pairs():
        pairs = []
        for own in (True, False):
            params = make_params()
            lr = torch.tensor(0.1) if tensor_lr else 0.1
            pairs.append((params, build(own, kind, params, lr=lr)))
        return pairs

    pairs = build_pairs()
    schedulers = [SCHEDULERS[name](opt) for _, opt in pairs]
    cycled = set()
    for step in range(8):
        for (params, opt), scheduler in zip(pairs, schedulers, strict=True):
            step_all([(params, opt)], step)
            args = (1.0,) if name == "ReduceLROnPlateau" else ()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message="The epoch parameter")
                scheduler.step(*args)
        groups = [opt.param_groups[0] for _, opt in pairs]
        torch.testing.assert_close(float(groups[0]["lr"]), float(groups[1]["lr"]))
        for key in ("momentum", "betas"):
            assert groups[0].get(key) == groups[1].get(key)
        cycled.add(str(groups[0].get("momentum", groups[0].get("betas"))))
        assert isinstance(groups[0]["lr"], torch.Tensor) is tensor_lr
    assert_twins(pairs, rtol=5e-5, atol=1e-5)
    if name in ("OneCycleLR", "CyclicLR"):
        assert len(cycled) > 3
    assert pairs[0][1].param_groups[0]["lr"] is not None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_hyper_parameters_are_read_and_never_written(shape):
    lr = torch.full(shape, 0.1)
    betas = torch.full(shape, 0.8), torch.full(shape, 0.95)
    params, plain = make_params(), make_params()
    opt = fusedopt.FusedAdamW(params, lr=lr, betas=betas)
    plain_opt = fusedopt.FusedAdamW(plain, lr=float(lr), betas=tuple(float(b) for b in betas))
    for step in range(4):
        if step == 2:
            lr.fill_(0.01)
            plain_opt.param_groups[0]["lr"] = float(lr)
        step_all([(params, opt), (plain, plain_opt)], step)
    assert float(lr) == pytest.approx(0.01) and float(betas[0]) == pytest.approx(0.8)
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


# lr=0


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=str)
def test_lr_zero_moves_no_parameter(kind, dtype, lr):
    params = make_params(dtype)
    opt = build(True, kind, params, lr=lr, max_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    for step in range(3):
        step_all([(params, opt)], step)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_made_by_a_zero_step(kind, dtype):
    """DCP and torchtitan: gradients of zero, lr=0, step(closure=None), then the real run."""
    params, plain = make_params(dtype), make_params(dtype)
    opt = build(True, kind, params, lr=0.0, max_grad_norm=1.0, decoupled_weight_decay=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    assert opt.step(closure=None) is None
    opt.zero_grad(set_to_none=True)
    assert float(opt.grad_norm) == 0.0 and float(opt.clip_coef) == 1.0
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
    for p in params:
        for name, value in opt.state[p].items():
            if name == "step":
                assert float(value) == 1
            elif name != "master_param":
                assert not value.any()


# What the last step measured


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


# torch.compile, SWA and EMA


@every_kind
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compiled_function_with_a_step(kind, compiler):
    torch._dynamo.reset()
    (params, opt), (plain, plain_opt) = twins(kind)[0], twins(kind)[0]

    @torch.compile(backend=compiler)
    def compiled():
        opt.step()
        opt.zero_grad(set_to_none=False)

    for step in range(4):
        give_grads(params, step)
        compiled()
        step_all([(plain, plain_opt)], step)
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
    assert not params[0].grad.any()
    assert float(opt.state[params[0]]["step"]) == 4


@every_kind
def test_compiled_training_step(kind):
    torch._dynamo.reset()
    results = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        opt = build(True, kind, list(model.parameters()), max_grad_norm=0.1)
        scheduler = lr_scheduler.LinearLR(opt, 0.1, 1.0, 5)

        def train(x, model=model, opt=opt):
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        run = torch.compile(train, backend="eager") if compile_it else train
        gen = torch.Generator().manual_seed(1)
        for _ in range(6):
            run(torch.randn(16, 4, generator=gen))
            scheduler.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_kind
def test_swa_and_ema(kind):
    results = []
    for own in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.BatchNorm1d(6))
        opt = build(own, kind, list(model.parameters()))
        swa = AveragedModel(model)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        scheduler = SWALR(opt, swa_lr=0.01, anneal_epochs=3)
        gen = torch.Generator().manual_seed(1)
        batches = [torch.randn(8, 4, generator=gen) for _ in range(5)]
        for x in batches:
            opt.zero_grad()
            (model(x) ** 3).mean().backward()
            opt.step()
            swa.update_parameters(model)
            ema.update_parameters(model)
            scheduler.step()
        update_bn(batches, swa)
        results.append([*swa.parameters(), *ema.parameters(), *swa.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
