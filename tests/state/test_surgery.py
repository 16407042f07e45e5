"""Parameters and states moved, converted, replaced and written to between steps."""

import collections
import itertools

import pytest
import torch
from checkpoint_helpers import STEP_FORMS
from protocol_helpers import (
    DTYPES,
    HALF,
    KINDS,
    assert_twins,
    build,
    every_kind,
    fallback_is_expected,
    on_every_backend,
    step_all,
    twins,
)

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


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


# State and parameters that the user edits


def moments(state):
    """By name; those of torch's optimizer are the same."""
    return [name for name in ("exp_avg", "exp_avg_sq", "momentum_buffer") if name in state]


def replace_param(params, opt, new, state):
    opt.param_groups[0]["params"][1] = params[1] = torch.nn.Parameter(new)
    if state:
        opt.state[params[1]] = state


def densify(params, opt):
    """Gaussian splatting: replace a parameter by a longer one and carry its state over by hand."""
    state = opt.state.pop(params[1])
    for name in moments(state):
        state[name] = torch.cat([state[name], torch.zeros(20)])
    replace_param(params, opt, torch.cat([params[1].detach(), torch.ones(20)]), state)


def prune(params, opt):
    state, keep = opt.state.pop(params[1]), len(params[1]) // 2
    for name in moments(state):
        state[name] = state[name][:keep]  # a view into the longer state
    replace_param(params, opt, params[1].detach()[:keep].clone(), state)


def replace_param_alone(params, opt):
    replace_param(params, opt, torch.ones(4), None)


def write_to_params(params, opt):
    with torch.no_grad():
        params[0].mul_(0.5)
        params[1][::2] = 1.0


def replace_param_data(params, opt):
    """By a transposed matrix, and then by one that is not."""
    params[1].data = torch.linspace(-1, 1, 37)
    fresh = torch.linspace(-1, 1, 15).view(3, 5).t()
    params[0].data = fresh if params[0].is_contiguous() else fresh.contiguous()


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


def replace_tensor(params, opt):
    state = opt.state[params[1]]
    state[moments(state)[0]] = torch.linspace(-1, 1, 37)


def replace_data(params, opt):
    state = opt.state[params[1]]
    state[moments(state)[0]].data = torch.linspace(-1, 1, 37)


def write_in_place(params, opt):
    state = opt.state[params[1]]
    state[moments(state)[0]].zero_()


def restride(params, opt):
    """The same values, transposed in memory."""
    state = opt.state[params[0]]
    for name in moments(state):
        state[name] = state[name].t().contiguous().t()


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


SURGERIES = [densify, prune, replace_param_alone, write_to_params, replace_param_data]
SURGERIES += [replace_state, clear_state, clear_inner, copy_state, replace_tensor, replace_data]
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


@pytest.mark.parametrize("form", STEP_FORMS)
def test_step_count_may_be_set(form):
    pairs = twins("adamw")
    step_all(pairs, 0)
    for i, (params, opt) in enumerate(pairs):
        opt.state[params[0]]["step"].fill_(50.0)
        opt.state[params[1]]["step"] = torch.tensor(20.0) if i else STEP_FORMS[form]()
    for step in (1, 2):
        step_all(pairs, step)
    assert_twins(pairs)


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
                    (params[0] if what == "param" else state[moments(state)[0]]).t_()
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


@every_kind
def test_lazy_parameter(kind):
    """Built before its shape is known: refused by name until it has one, then as any other."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LazyLinear(2))
    opt = KINDS[kind][0](model.parameters(), lr=0.1, max_grad_norm=1.0)
    model[0](torch.ones(2, 3)).sum().backward()
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"param 2 of group 0.*run a forward pass"):
        opt.step()
    assert torch.equal(before, model[0].weight)
    model(torch.ones(2, 3)).sum().backward()
    start = model[1].weight.detach().clone()
    opt.step()
    assert not torch.equal(start, model[1].weight)
