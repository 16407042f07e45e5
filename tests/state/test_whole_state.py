"""State that is there in part or is of another rule: refused by name, nothing has changed."""

import pytest
import torch
from checkpoint_helpers import (
    assert_same_run,
    load_after_remedy,
    make,
    make_params,
    refused_load,
    remedy_in,
    resumed,
    run,
    run_all,
    trained,
)
from protocol_helpers import (
    COUPLED,
    assert_same,
    fallback_is_expected,
    give_grads,
    on_every_backend,
)
from torch.utils._pytree import tree_map

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)

ALL = object()


# Checkpoints of other rules

WITH_STATE = {
    "Adamax": {"exp_avg": ALL, "exp_inf": ALL, "step": 3},
    "Lion": {"exp_avg": ALL},
    "Lion with a count": {"exp_avg": ALL, "step": 3},
    "RMSprop": {"square_avg": ALL, "step": 3},
    "square_avg alone": {"square_avg": ALL},
    "8-bit AdamW": {"step": 3, "state1": ALL, "state2": ALL},
    "8-bit without a count": {"state1": ALL, "state2": ALL},
    "Adagrad": {"step": 3, "sum": ALL},
    "SGD": {"momentum_buffer": ALL},
    "no second moment": {"step": 3, "exp_avg": ALL},
    "a second moment of None": {"step": 3, "exp_avg": ALL, "exp_avg_sq": None},
    "no count": {"exp_avg": ALL, "exp_avg_sq": ALL},
    "a count alone": {"step": 3},
    "a maximum alone": {"max_exp_avg_sq": ALL},
    "Adafactor without a count": {"exp_avg_sq_row": ALL, "exp_avg_sq_col": ALL, "RMS": 0.5},
    "schedule-free": {"z": ALL},
    "momentum by another name": {"momentum": ALL},
    "a name that nobody knows": {"foo": ALL},
    "a name that nobody knows, and a master": {"foo": ALL, "master_param": ALL},
    "names that cannot be sorted": {1: ALL, "a": ALL},
    "preconditioners": {"left": [ALL, ALL], "block_0": {"root": (ALL,)}},
}


def foreign(which, param):
    fill = torch.full(param.shape, 0.5)
    return tree_map(lambda value: fill.clone() if value is ALL else value, WITH_STATE[which])


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("which", WITH_STATE)
def test_state_of_another_rule_is_refused(which, fresh):
    """At load; and by the step, where the user puts it beside other states."""
    params, opt = make("amsgrad" if which == "a maximum alone" else "adamw")
    if not fresh:
        run(params, opt, range(2))
    saved = opt.state_dict()
    saved["state"] = {i: foreign(which, p) for i, p in enumerate(params)}
    message = refused_load(opt, params, saved, KeyError, "param 0 of group 0: its state has")
    assert "'exp_avg'" in message
    for i in range(len(params)):
        message = refused_load(opt, params, saved, KeyError, f"param {i} of group 0")
        exec(remedy_in(message), {"state_dict": saved})
    opt.load_state_dict(saved)
    run(params, opt, [0])
    assert all(float(opt.state[p]["step"]) == 1 for p in params)
    opt.state[params[1]] = foreign(which, params[1])
    refused_step(params, opt, "param 1 of group 0: its state has .* and lacks")


def refused_step(params, opt, match):
    """`step()` and `init_state()` refuse, nothing has moved, and the remedy works."""
    give_grads(params, 5)
    values = [p.detach().clone() for p in params]
    tensors = {(p, k): v for p, own in opt.state.items() for k, v in own.items()}
    for call in (opt.step, opt.init_state):
        with pytest.raises(RuntimeError, match=match) as raised:
            call()
        assert all(map(torch.equal, params, values))
        assert {(p, k): v for p, o in opt.state.items() for k, v in o.items()} == tensors
    exec(remedy_in(str(raised.value)), {"optimizer": opt, "param": params[1]})
    opt.step()
    assert opt.state[params[1]].get("step", 1) == 1  # plain SGD counts nothing
    assert opt.state[params[0]].get("step", 2) > 1


@pytest.mark.parametrize("name", ["exp_avg_sq", "exp_inf"])
def test_a_state_with_all_that_lion_has_is_anothers(name):
    """Adam's and Adamax's, which have an exp_avg as well."""
    params, opt, saved = trained("lion")
    saved["state"][1][name] = torch.ones(37)
    match = f"param 1 of group 0: its state has '{name}', which another optimizer keeps"
    load_after_remedy(opt, params, saved, KeyError, match)
    run(params, opt, [2])
    opt.state[params[1]][name] = torch.ones(37)
    refused_step(params, opt, match)


# Values that are no state


def freed(value):
    value.untyped_storage().resize_(0)
    return value


NO_TENSOR = (TypeError, "is .*not a plain tensor")
NO_MEMORY = (RuntimeError, "has no memory")
SHAPE = (RuntimeError, r"has shape .*, the parameter has \(37,\)")
UNUSABLE = {
    "list": (lambda t: t.tolist(), *NO_TENSOR),
    "numpy": (lambda t: t.numpy(), *NO_TENSOR),
    "int": (lambda t: 0, *NO_TENSOR),
    "int tensor": (lambda t: t.to(torch.int8), *NO_TENSOR),
    "bool tensor": (lambda t: t.bool(), *NO_TENSOR),
    "complex": (lambda t: t.to(torch.complex64), *NO_TENSOR),
    "sparse": (lambda t: t.to_sparse(), *NO_TENSOR),
    "meta": (lambda t: t.to("meta"), *NO_MEMORY),
    "freed": (freed, *NO_MEMORY),
    **{str(s): (lambda t, s=s: torch.ones(s), *SHAPE) for s in [(36,), (1,), (), (37, 1)]},
}
NO_COUNTS = [float("nan"), -1, float("inf"), [3], "3", torch.tensor([3.0, 4.0])]
NO_COUNTS += [torch.tensor(float("nan")), torch.tensor(-2), 3 + 1j]
NAMES = [("adamw", "exp_avg_sq"), ("adamw", "master_param")]
NAMES += [("sgd", "momentum_buffer"), ("plain-sgd", "master_param")]
CASES = [
    pytest.param(*name, *case, id=f"{'-'.join(name)}-{form}")
    for name in NAMES
    for form, case in UNUSABLE.items()
]
CASES += [
    pytest.param("adamw", "step", lambda _, v=v: v, ValueError, "is", id=f"step-{v!r}")
    for v in NO_COUNTS
]


@pytest.mark.parametrize("kind, name, edit, error, words", CASES)
def test_a_value_that_is_no_state_is_refused(kind, name, edit, error, words):
    params, opt, saved = trained(kind, torch.bfloat16)
    saved["state"][1][name] = edit(saved["state"][1][name])
    match = f"param 1 of group 0: state '{name}' {words}"
    load_after_remedy(opt, params, saved, error, match)
    run(params, opt, [2])
    own = opt.state[params[1]]
    own[name] = edit(own[name])
    refused_step(params, opt, match)


def test_state_that_is_no_dict_is_refused_by_name():
    params, opt, saved = trained()
    saved["state"][2] = [1]
    refused_load(opt, params, saved, TypeError, "param 2 of group 0: state of one parameter must")


# State that is there in part, or before its parameter


def test_without_state_a_parameter_starts_anew_beside_others():
    params, _, saved = trained(steps=3)
    del saved["state"][1]
    saved["state"][2] = {}
    other, other_opt = resumed("adamw", params, saved)
    run(other, other_opt, [3])
    assert [float(other_opt.state[p]["step"]) for p in other] == [4, 1, 1, 4]


def test_a_lazy_parameter_gets_its_state_before_its_shape():
    model = torch.nn.Linear(3, 2)
    lazy = torch.nn.LazyLinear(2)
    opts = [fusedopt.FusedAdamW(m.parameters(), lr=0.1) for m in (model, lazy)]
    run_all(opts[0])
    opts[1].load_state_dict(opts[0].state_dict())
    lazy(torch.ones(1, 3))
    with torch.no_grad():
        for p, q in zip(lazy.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    for opt in opts:
        run_all(opt)
    assert all(map(torch.equal, lazy.parameters(), model.parameters()))
    assert all(float(own["step"]) == 2 for opt in opts for own in opt.state.values())


def test_a_parameter_whose_memory_is_elsewhere_gets_its_state():
    """As torch does; the step wants it back."""
    params, opt, saved = trained()
    values = [p.detach().clone() for p in params]
    for param in params:
        param.data = param.data.new_empty(0)
    opt.load_state_dict(saved)
    for param, value in zip(params, values, strict=True):
        param.grad, param.data = None, value
        assert opt.state[param]["exp_avg"].shape == param.shape
    run(params, opt, [2])
    assert {float(opt.state[param]["step"]) for param in params} == {3.0}


# Notes of others beside the states


def test_notes_are_kept_beside_states_and_alone_where_they_are_no_tensors():
    params, opt, saved = trained(dtype=torch.bfloat16)
    notes = {"note": None, "seen": 3, "more": {"a": [1.0]}}
    saved["state"][0].update(ema=torch.ones(5, 3), **notes)
    saved["state"][1] = {**notes, "master_param": torch.ones(37)}
    opt.load_state_dict(saved)
    opt.state[params[2]] = {"seen": 4}
    run(params, opt, [2])
    first, second, third = (opt.state[p] for p in params[:3])
    assert torch.equal(first["ema"], torch.ones(5, 3))
    assert all(own[name] == value for own in (first, second) for name, value in notes.items())
    assert third["seen"] == 4
    assert (first["step"], second["step"], third["step"]) == (3, 1, 1)


# SGD, whose first momentum step makes the buffer


def test_momentum_starts_beside_tensors_of_others():
    """torch's SGD asks for its buffer by name; torch's Adam fails here."""
    pairs = []
    for cls, extra in ((fusedopt.FusedSGD, COUPLED), (torch.optim.SGD, {})):
        params = make_params()
        opt = cls(params, lr=0.1, momentum=0.9, **extra)
        opt.load_state_dict({**opt.state_dict(), "state": {1: {"ema": torch.ones(37)}}})
        opt.state[params[0]]["ema"] = torch.ones(5, 3)
        run(params, opt, range(2))
        pairs.append((params, opt))
    assert_same(*pairs)
    assert all(
        torch.equal(pairs[0][1].state[p]["ema"], torch.ones_like(p)) for p in pairs[0][0][:2]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by", ["hand", "checkpoint"])
def test_a_momentum_buffer_alone_counts(by, dtype):
    """As torch's SGD keeps it."""
    kwargs = {"lr": 1.0, "momentum": 0.9, "dampening": 0.5}
    results = []
    for cls in (torch.optim.SGD, fusedopt.FusedSGD):
        param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        opt = cls([param], **kwargs)
        if by == "hand":
            opt.state[param]["momentum_buffer"] = torch.ones(3, dtype=dtype)
        else:
            saved = {**opt.state_dict(), "state": {0: {"momentum_buffer": torch.ones(3)}}}
            opt.load_state_dict(saved)
        param.grad = torch.ones_like(param)
        opt.step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1].to(dtype))
    assert float(results[0][0]) == pytest.approx(-1.4, rel=1e-2)
    assert float(opt.state[param]["step"]) == 2


def test_momentum_switched_on_later_begins_with_its_count():
    params, opt, saved = trained("plain-sgd")
    saved["param_groups"][0]["momentum"] = opt.param_groups[0]["momentum"] = 0.9
    assert_same_run([2], (params, opt), resumed("plain-sgd", params, saved))
    assert all(float(opt.state[p]["step"]) == 1 for p in params)


# Masters that nobody wants


@pytest.mark.parametrize("kind", ["adamw", "sgd", "plain-sgd"])
@pytest.mark.parametrize(
    "dtype, options",
    [(torch.float32, {}), (torch.float64, {}), (torch.bfloat16, {"master_weights": False})],
)
def test_a_master_that_is_not_wanted_is_dropped(kind, dtype, options):
    half, _, saved = trained(kind, torch.bfloat16)
    assert all("master_param" in own for own in saved["state"].values())
    params, opt = resumed(kind, half, saved, dtype, **options)
    assert not any("master_param" in own for own in opt.state_dict()["state"].values())
    for i, p in enumerate(params):  # and where it was put by hand
        opt.state[p].update(saved["state"][i])
    run(params, opt, [2])
    assert not any("master_param" in own for own in opt.state_dict()["state"].values())
