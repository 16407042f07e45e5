"""State that is there in part or is of another rule: refused by name, nothing has changed."""

import copy

import pytest
import torch
from checkpoint_helpers import (
    assert_same_bits,
    clone_params,
    make,
    make_params,
    refused_load,
    remedy_in,
    run,
    run_all,
)
from protocol_helpers import (
    COUPLED,
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


def foreign(which):
    params, opt = make("adamw")
    saved = opt.state_dict()
    fill = {i: torch.full(p.shape, 0.5) for i, p in enumerate(params)}
    saved["state"] = {
        i: tree_map(lambda value, v=v: v.clone() if value is ALL else value, WITH_STATE[which])
        for i, v in fill.items()
    }
    return saved


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("which", WITH_STATE)
def test_state_of_another_rule_is_refused_at_load(which, fresh):
    params, opt = make("amsgrad" if which == "a maximum alone" else "adamw")
    if not fresh:
        run(params, opt, range(2))
    state_dict = foreign(which)
    if which == "a maximum alone":
        state_dict["param_groups"][0]["amsgrad"] = True
    message = refused_load(opt, params, state_dict, KeyError, "param 0 of group 0: its state has")
    assert "'exp_avg'" in message
    for i, value in list(state_dict["state"].items()):
        assert value, i
        message = refused_load(opt, params, state_dict, KeyError, f"param {i} of group 0")
        exec(remedy_in(message), {"state_dict": state_dict})
    opt.load_state_dict(state_dict)
    run(params, opt, [0])
    assert all(float(opt.state[p]["step"]) == 1 for p in params)


def test_without_state_a_parameter_starts_anew_beside_others():
    params, opt = make("adamw")
    run(params, opt, range(3))
    saved = opt.state_dict()
    del saved["state"][1]
    saved["state"][2] = {}
    other, other_opt = make("adamw", params=clone_params(params))
    other_opt.load_state_dict(saved)
    run(other, other_opt, [3])
    assert [float(other_opt.state[p]["step"]) for p in other] == [4, 1, 1, 4]


def test_notes_beside_the_states_are_kept():
    params, opt = make("adamw")
    run(params, opt, [0])
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0].update(ema=torch.ones(5, 3), note=None)
    opt.load_state_dict(saved)
    run(params, opt, [1])
    own = opt.state[params[0]]
    assert torch.equal(own["ema"], torch.ones(5, 3)) and own["note"] is None and own["step"] == 2


def test_notes_alone_are_kept_where_they_are_no_tensors():
    params, opt = make("adamw", torch.bfloat16)
    saved = opt.state_dict()
    notes = {"note": None, "seen": 3, "more": {"a": [1.0]}, "master_param": torch.ones(5, 3)}
    saved["state"] = {0: notes}
    opt.load_state_dict(saved)
    opt.state[params[1]].update(seen=4)
    run(params, opt, range(2))
    own = opt.state[params[0]]
    assert own["note"] is None and own["seen"] == 3 and own["more"] == {"a": [1.0]}
    assert own["step"] == opt.state[params[1]]["step"] == 2


def test_momentum_starts_beside_tensors_of_others():
    """torch's SGD asks for its buffer by name; torch's Adam fails here."""
    results = []
    for cls, extra in ((torch.optim.SGD, {}), (fusedopt.FusedSGD, COUPLED)):
        params = make_params()
        opt = cls(params, lr=0.1, momentum=0.9, **extra)
        opt.state[params[0]]["ema"] = torch.ones(5, 3)
        opt.load_state_dict({**opt.state_dict(), "state": {1: {"ema": torch.ones(37)}}})
        opt.state[params[0]]["ema"] = torch.ones(5, 3)
        run(params, opt, range(2))
        assert all(torch.equal(opt.state[p]["ema"], torch.ones_like(p)) for p in params[:2])
        results.append(params)
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours)


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


# Values that are no state

BAD_VALUES = {
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "int": lambda t: 0,
    "int tensor": lambda t: t.to(torch.int8),
    "bool tensor": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
}
SGDS = [("sgd", "momentum_buffer"), ("plain-sgd", "master_param")]
BAD_STEPS = [float("nan"), -1, float("inf"), [3], "3", torch.tensor([3.0, 4.0])]
BAD_STEPS += [torch.tensor(float("nan")), torch.tensor(-2), 3 + 1j]


@pytest.mark.parametrize("name", ["exp_avg_sq", "master_param"])
@pytest.mark.parametrize("form", BAD_VALUES)
def test_what_is_no_tensor_of_numbers_is_refused(form, name):
    params, opt = make("adamw", torch.bfloat16)
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1][name] = BAD_VALUES[form](saved["state"][1][name])
    match = f"param 1 of group 0: state '{name}' is .*not a plain tensor"
    exec(remedy_in(refused_load(opt, params, saved, TypeError, match)), {"state_dict": saved})
    make("adamw", torch.bfloat16)[1].load_state_dict(saved)
    own = opt.state[params[1]]
    own[name] = BAD_VALUES[form](own[name])
    refused_step(params, opt, match)


@pytest.mark.parametrize("step", BAD_STEPS, ids=repr)
def test_what_is_no_count_is_refused(step):
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1]["step"] = step
    match = "param 1 of group 0: state 'step' is"
    exec(remedy_in(refused_load(opt, params, saved, ValueError, match)), {"state_dict": saved})
    make("adamw")[1].load_state_dict(saved)
    opt.state[params[1]]["step"] = step
    refused_step(params, opt, match)


@pytest.mark.parametrize("form", ["meta", "freed"])
def test_state_without_memory_is_refused_at_load(form):
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    if form == "meta":
        saved["state"][1]["exp_avg"] = saved["state"][1]["exp_avg"].to("meta")
    else:
        saved["state"][1]["exp_avg"].untyped_storage().resize_(0)
    match = "param 1 of group 0: state 'exp_avg' has no memory"
    exec(remedy_in(refused_load(opt, params, saved, RuntimeError, match)), {"state_dict": saved})
    opt.load_state_dict(saved)


@pytest.mark.parametrize("shape", [(36,), (1,), (), (37, 1)], ids=str)
@pytest.mark.parametrize("kind, name", [("adamw", "exp_avg"), ("adamw", "master_param")] + SGDS)
def test_state_of_another_shape_is_refused_at_load(kind, name, shape):
    params, opt = make(kind, torch.bfloat16)
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1][name] = torch.ones(shape)
    match = rf"param 1 of group 0: state '{name}' has shape .*, the parameter has \(37,\)"
    exec(remedy_in(refused_load(opt, params, saved, RuntimeError, match)), {"state_dict": saved})
    opt.load_state_dict(saved)
    run(params, opt, [2])


def test_a_parameter_whose_memory_is_elsewhere_gets_its_state():
    """As torch does; the step wants it back."""
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved, values = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    for param in params:
        param.data = param.data.new_empty(0)
    opt.load_state_dict(saved)
    for param, value in zip(params, values, strict=True):
        param.grad, param.data = None, value
        assert opt.state[param]["exp_avg"].shape == param.shape
    run(params, opt, [2])
    assert {float(opt.state[param]["step"]) for param in params} == {3.0}


def test_state_that_is_no_dict_is_refused_by_name():
    params, opt = make("adamw")
    run(params, opt, range(1))
    saved = opt.state_dict()
    saved["state"][2] = [1]
    refused_load(opt, params, saved, TypeError, "param 2 of group 0: state of one parameter must")


# State that the user edits


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
    assert float(opt.state[params[1]]["step"]) == 1
    assert float(opt.state[params[0]]["step"]) > 1


@pytest.mark.parametrize("which", [w for w in WITH_STATE if w != "a maximum alone"])
def test_edited_state_is_refused(which):
    params, opt = make("adamw")
    run(params, opt, range(2))
    opt.state[params[1]] = foreign(which)["state"][1]
    refused_step(params, opt, "param 1 of group 0: its state has .* and lacks")


def test_a_moment_that_is_deleted_is_not_made_anew():
    params, opt = make("adamw")
    run(params, opt, range(2))
    del opt.state[params[1]]["exp_avg_sq"]
    refused_step(params, opt, "its state has 'exp_avg', 'step' and lacks 'exp_avg_sq'")


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
    params, opt = make("plain-sgd")
    twin, twin_opt = make("plain-sgd", params=clone_params(params))
    for p, o in ((params, opt), (twin, twin_opt)):
        run(p, o, range(2))
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["momentum"] = opt.param_groups[0]["momentum"] = 0.9
    twin_opt.load_state_dict(saved)
    for p, o in ((params, opt), (twin, twin_opt)):
        run(p, o, [2])
    assert_same_bits((params, opt), (twin, twin_opt))
    assert all(float(opt.state[p]["step"]) == 1 for p in params)


# Masters that nobody wants


@pytest.mark.parametrize("kind", ["adamw", "sgd", "plain-sgd"])
@pytest.mark.parametrize("case", ["fp32", "fp64", "no masters"])
def test_a_master_that_is_not_wanted_is_dropped(kind, case):
    half, half_opt = make(kind, torch.bfloat16)
    run(half, half_opt, range(2))
    saved = copy.deepcopy(half_opt.state_dict())
    assert all("master_param" in own for own in saved["state"].values())
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(case, torch.bfloat16)
    options = {"master_weights": False} if case == "no masters" else {}
    params, opt = make(kind, dtype, **options)
    opt.load_state_dict(saved)
    assert not any("master_param" in own for own in opt.state_dict()["state"].values())
    for i, p in enumerate(params):  # and where it was put by hand
        opt.state[p].update(saved["state"][i])
    run(params, opt, [2])
    assert not any("master_param" in own for own in opt.state_dict()["state"].values())
