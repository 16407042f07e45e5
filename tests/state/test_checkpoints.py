"""Checkpoints: torch's into ours, ours into torch's, own ones, and going on from them."""

import copy
import io

import pytest
import torch
from checkpoint_helpers import (
    SGD,
    assert_same_bits,
    clone_params,
    every_dtype,
    every_kind,
    make,
    make_params,
    run,
)
from protocol_helpers import COUPLED, HALF, fallback_is_expected, on_every_backend

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)

TWINS = {
    "AdamW": (torch.optim.AdamW, fusedopt.FusedAdamW, {"lr": 0.1, "weight_decay": 0.1}, {}),
    "AdamW-amsgrad": (torch.optim.AdamW, fusedopt.FusedAdamW, {"lr": 0.1, "amsgrad": True}, {}),
    "Adam": (torch.optim.Adam, fusedopt.FusedAdamW, {"lr": 0.1, "weight_decay": 0.1}, COUPLED),
    "SGD": (torch.optim.SGD, fusedopt.FusedSGD, SGD[1], COUPLED),
    "SGD-plain": (torch.optim.SGD, fusedopt.FusedSGD, {"lr": 0.1, "weight_decay": 0.1}, COUPLED),
}


def assert_close(params, others, rtol=1e-5, atol=1e-6):
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# torch's checkpoints and ours


@pytest.mark.parametrize("twin", TWINS)
def test_torch_checkpoint_into_ours(twin):
    their_cls, our_cls, kwargs, extra = TWINS[twin]
    theirs = make_params()
    their_opt = their_cls(theirs, **kwargs)
    run(theirs, their_opt, range(3))
    ours = clone_params(theirs)
    our_opt = our_cls(ours, **{**kwargs, "lr": 5.0}, **extra)
    our_opt.load_state_dict(their_opt.state_dict())
    assert our_opt.param_groups[0]["lr"] == 0.1
    run(theirs, their_opt, range(3, 8))
    run(ours, our_opt, range(3, 8))
    assert_close(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        if "step" in their_opt.state[b]:
            assert float(our_opt.state[a]["step"]) == float(their_opt.state[b]["step"]) == 8


@pytest.mark.parametrize("twin", TWINS)
def test_our_checkpoint_into_torch(twin):
    their_cls, our_cls, kwargs, extra = TWINS[twin]
    ours = make_params()
    our_opt = our_cls(ours, **kwargs, **extra)
    run(ours, our_opt, range(3))
    theirs = clone_params(ours)
    their_opt = their_cls(theirs, lr=5.0)
    their_opt.load_state_dict(copy.deepcopy(our_opt.state_dict()))  # torch takes, and does not copy
    run(theirs, their_opt, range(3, 8))
    run(ours, our_opt, range(3, 8))
    assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:param group 0 of the state_dict has no decoupled_weight_decay")
@pytest.mark.parametrize("decoupled", [True, False])
def test_torch_sgd_checkpoint_keeps_our_decay(decoupled):
    """torch's SGD groups do not say how decay is applied: the constructor does."""
    theirs = make_params()
    their_opt = torch.optim.SGD(theirs, **SGD[1])
    run(theirs, their_opt, range(2))
    assert "decoupled_weight_decay" not in their_opt.state_dict()["param_groups"][0]
    _, our_opt = make("sgd", decoupled_weight_decay=decoupled)
    our_opt.load_state_dict(their_opt.state_dict())
    assert our_opt.param_groups[0]["decoupled_weight_decay"] is decoupled


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fp32_torch_checkpoint_into_a_half_model(kind, dtype):
    """Pretrained in fp32, continued in half: moments stay fp32, the master starts at the param."""
    params, opt = make(kind)
    run(params, opt, range(3))
    saved = opt.state_dict()
    half = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
    _, half_opt = make(kind, params=half)
    half_opt.load_state_dict(saved)
    for p, q in zip(params, half, strict=True):
        for key, value in opt.state[p].items():
            assert torch.equal(half_opt.state[q][key], value)
    twin = [torch.nn.Parameter(p.detach().float()) for p in half]
    _, twin_opt = make(kind, params=twin)
    twin_opt.load_state_dict(saved)
    for step in range(3, 5):
        run(half, half_opt, [step])
        for q, p in zip(twin, half, strict=True):
            q.grad = p.grad.float()
        twin_opt.step()
    for p, q in zip(half, twin, strict=True):
        assert torch.equal(half_opt.state[p]["master_param"], q)
        assert torch.equal(p, q.to(dtype))


# Own checkpoints


@every_kind
@every_dtype
def test_continuing_from_a_checkpoint_is_not_to_be_seen(kind, dtype):
    params, opt = make(kind, dtype, max_grad_norm=1.0)
    run(params, opt, range(3))
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "params": [p.data for p in params]}, file)
    run(params, opt, range(3, 7))

    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh = [torch.nn.Parameter(v) for v in loaded["params"]]
    _, fresh_opt = make(kind, params=fresh, lr=9.0, max_grad_norm=1.0)
    fresh_opt.load_state_dict(loaded["opt"])
    run(fresh, fresh_opt, range(3, 7))
    assert_same_bits((params, opt), (fresh, fresh_opt))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fp32_states_of_half_params_stay_fp32(kind, dtype):
    params, opt = make(kind, dtype)
    run(params, opt, range(2))
    names = {"adamw": {"step", "exp_avg", "exp_avg_sq", "master_param"}}
    names["sgd"] = {"step", "momentum_buffer", "master_param"}
    other, other_opt = make(kind, dtype)
    other_opt.load_state_dict(opt.state_dict())
    for p, q in zip(params, other, strict=True):
        assert set(opt.state[p]) == names[kind]
        for key, value in other_opt.state[q].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, opt.state[p][key])
            assert key == "step" or value.stride() == q.stride()


def test_fp64_states_stay_fp64():
    params, opt = make("adamw", torch.float64)
    run(params, opt, range(2))
    other, other_opt = make("adamw", torch.float64)
    other_opt.load_state_dict(opt.state_dict())
    assert set(opt.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    for p in other:
        assert other_opt.state[p]["exp_avg"].dtype == torch.float64
        assert other_opt.state[p]["step"].dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_masters_when_not_wanted(dtype):
    params, opt = make("adamw", dtype, master_weights=False)
    run(params, opt, range(2))
    assert all("master_param" not in opt.state[p] for p in params)
    other, other_opt = make("adamw", dtype, params=clone_params(params), master_weights=False)
    other_opt.load_state_dict(opt.state_dict())
    run(params, opt, range(2, 5))
    run(other, other_opt, range(2, 5))
    assert_same_bits((params, opt), (other, other_opt))


@pytest.mark.parametrize("kind", ["adamw", "sgd", "plain-sgd"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_missing_master_is_rebuilt_from_the_param(kind, dtype):
    params, opt = make(kind, dtype)
    run(params, opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        del state["master_param"]
    other, other_opt = make(kind, params=clone_params(params))
    other_opt.load_state_dict(saved)
    # the same bits as with masters that were the rounded params all along
    for p in params:
        opt.state[p]["master_param"].copy_(p)
    run(params, opt, range(3, 6))
    run(other, other_opt, range(3, 6))
    assert_same_bits((params, opt), (other, other_opt))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_half_states_in_a_checkpoint_are_upcast(kind, param_dtype):
    """Trainers that shrink checkpoints to fp16, master included."""
    params, opt = make(kind, param_dtype)
    run(params, opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        for key in state:
            if key != "step":
                state[key] = state[key].half()
    other, other_opt = make(kind, params=clone_params(params))
    other_opt.load_state_dict(saved)
    wide = torch.float64 if param_dtype == torch.float64 else torch.float32
    for p, state in zip(other, saved["state"].values(), strict=True):
        for key, value in other_opt.state[p].items():
            assert value.dtype == (torch.float32 if key == "step" else wide)
            if key != "master_param":
                assert torch.equal(value, state[key].to(value.dtype))
    run(other, other_opt, range(3, 5))
    assert all(p.isfinite().all() for p in other)


STEPS = {
    "int": 5,
    "float": 5.0,
    "0-dim": torch.tensor(5.0),
    "1-element": torch.tensor([5.0]),
    "int64": torch.tensor(5),
    "fp16": torch.tensor(5.0, dtype=torch.float16),
}


@pytest.mark.parametrize("form", STEPS)
def test_every_form_of_step_is_understood(form):
    params, opt = make("adamw")
    run(params, opt, range(5))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = STEPS[form]
    other, other_opt = make("adamw", params=clone_params(params))
    other_opt.load_state_dict(saved)
    run(params, opt, range(5, 7))
    run(other, other_opt, range(5, 7))
    assert_same_bits((params, opt), (other, other_opt))
    for p in other:
        step = other_opt.state[p]["step"]
        assert (step.dtype, step.dim(), float(step)) == (torch.float32, 0, 7.0)
    assert float(torch.as_tensor(STEPS[form])) == 5.0  # the loaded value is not ours to count in


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_momentum_buffer_of_none(momentum):
    """Old torch checkpoints hold None where no momentum step has been."""
    kwargs = {"lr": 0.1, "momentum": momentum, "dampening": 0.5 if momentum else 0}
    theirs, ours = make_params(), make_params()
    their_opt = torch.optim.SGD(theirs, **kwargs)
    our_opt = fusedopt.FusedSGD(ours, **kwargs)
    saved = their_opt.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(theirs))}
    their_opt.load_state_dict(saved)
    our_opt.load_state_dict(saved)
    run(theirs, their_opt, range(3))
    run(ours, our_opt, range(3))
    assert_close(ours, theirs)


def test_momentum_buffer_without_step_has_begun():
    """Dampening acts on it; the first step of a fresh buffer would not be dampened."""
    params, opt = make("sgd")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        del state["step"]
    other, other_opt = make("sgd", params=clone_params(params))
    other_opt.load_state_dict(saved)
    run(params, opt, range(2, 4))
    run(other, other_opt, range(2, 4))
    for a, b in zip(params, other, strict=True):
        assert torch.equal(a, b)
        assert float(other_opt.state[b]["step"]) == 3


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [0, 2])
def test_checkpoint_after_a_skipped_step(kind, dtype, bad):
    params, opt = make(kind, dtype, skip_nonfinite=True)
    run(params, opt, range(bad + 1), bad=bad)
    assert int(opt.skipped_steps) == 1
    other, other_opt = make(kind, params=clone_params(params), skip_nonfinite=True)
    other_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    clean, clean_opt = make(kind, dtype)
    run(clean, clean_opt, range(bad))
    for p, o in ((params, opt), (other, other_opt), (clean, clean_opt)):
        run(p, o, range(bad + 1, bad + 4))
    assert_same_bits((params, opt), (other, other_opt))
    assert_same_bits((params, opt), (clean, clean_opt))


@every_kind
@every_dtype
def test_init_state_then_save_and_load(kind, dtype):
    params, opt = make(kind, dtype)
    opt.init_state()
    saved = copy.deepcopy(opt.state_dict())
    other, other_opt = make(kind, dtype)
    other_opt.load_state_dict(saved)
    plain, plain_opt = make(kind, dtype)
    for p, o in ((params, opt), (other, other_opt), (plain, plain_opt)):
        run(p, o, range(3))
    assert_same_bits((params, opt), (other, other_opt))
    assert_same_bits((params, opt), (plain, plain_opt))


def test_groups_of_an_older_checkpoint_get_defaults():
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    for key in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
        del saved["param_groups"][0][key]
    other, other_opt = make("adamw", params=clone_params(params))
    other_opt.load_state_dict(saved)
    run(params, opt, range(2, 4))
    run(other, other_opt, range(2, 4))
    assert_same_bits((params, opt), (other, other_opt))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distributed_checkpoint_state_dict(kind, dtype):
    """torch.distributed.checkpoint makes missing states by a step at lr=0 on zero gradients."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    runs = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(dtype)
        params, opt = make(kind, params=list(model.parameters()))
        run(params, opt, range(3))
        if resumed:
            saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt))
            values = [p.detach().clone() for p in params]
            model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(dtype)
            params, opt = make(kind, params=list(model.parameters()))
            with torch.no_grad():
                for p, v in zip(params, values, strict=True):
                    p.copy_(v)
            dcp.set_optimizer_state_dict(model, opt, saved)
            assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
        run(params, opt, range(3, 6))
        runs.append((params, opt))
    assert_same_bits(*runs)
