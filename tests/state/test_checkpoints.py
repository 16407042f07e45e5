"""Checkpoints: torch's into ours, ours into torch's, own ones, and going on from them."""

import copy
import io

import pytest
import torch
from checkpoint_helpers import (
    SGD,
    STEP_FORMS,
    assert_same_bits,
    assert_same_run,
    clone_params,
    every_dtype,
    every_kind,
    make,
    make_params,
    resumed,
    run,
    trained,
)
from protocol_helpers import COUPLED, HALF, assert_same, fallback_is_expected, on_every_backend

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
STATES = {"adamw": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}
every_stateful_kind = pytest.mark.parametrize("kind", STATES)
every_half = pytest.mark.parametrize("dtype", HALF, ids=str)

# torch's checkpoints and ours


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("from_torch", [True, False])
def test_torchs_checkpoints_load_here_and_ours_there(twin, from_torch):
    their_cls, our_cls, kwargs, extra = TWINS[twin]
    ours, theirs = (our_cls, {**kwargs, **extra}), (their_cls, kwargs)
    (source, options), (target, others) = (theirs, ours) if from_torch else (ours, theirs)
    params = make_params()
    opt = source(params, **options)
    run(params, opt, range(3))
    resumed_params = clone_params(params)
    resumed_opt = target(resumed_params, **{**others, "lr": 5.0})
    resumed_opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch takes, and does not copy
    assert resumed_opt.param_groups[0]["lr"] == 0.1
    pairs = [(params, opt), (resumed_params, resumed_opt)]
    for pair in pairs:
        run(*pair, range(3, 8))
    our_pair, their_pair = reversed(pairs) if from_torch else pairs
    if their_cls is torch.optim.SGD:  # which keeps our count, and does not count on
        for own in their_pair[1].state.values():
            own.pop("step", None)
    assert_same(our_pair, their_pair)


@every_stateful_kind
@every_half
def test_fp32_checkpoint_into_a_half_model(kind, dtype):
    """Pretrained in fp32, continued in half: moments stay fp32, the master starts at the param."""
    params, opt, saved = trained(kind, steps=3)
    half, half_opt = resumed(kind, params, saved, dtype)
    twin, twin_opt = resumed(kind, half, saved, torch.float32)
    for p, q in zip(params, half, strict=True):
        for key, value in opt.state[p].items():
            assert torch.equal(half_opt.state[q][key], value)
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
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = resumed(kind, loaded["params"], loaded["opt"], lr=9.0, max_grad_norm=1.0)
    assert_same_run(range(3, 7), (params, opt), other)


@every_stateful_kind
@every_dtype
def test_states_are_wide_and_lie_as_the_parameter(kind, dtype):
    params, opt, saved = trained(kind, dtype)
    other, other_opt = resumed(kind, params, saved)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p, q in zip(params, other, strict=True):
        masters = {"master_param"} if dtype in HALF else set()
        assert set(opt.state[p]) == STATES[kind] | {"step"} | masters
        for key, value in other_opt.state[q].items():
            assert type(value) is torch.Tensor and torch.equal(value, opt.state[p][key])
            assert value.dtype == (torch.float32 if key == "step" else wide)
            assert key == "step" or value.stride() == q.stride()


@every_half
def test_no_masters_when_not_wanted(dtype):
    params, opt, saved = trained(dtype=dtype, master_weights=False)
    assert all("master_param" not in opt.state[p] for p in params)
    other = resumed("adamw", params, saved, master_weights=False)
    assert_same_run(range(2, 5), (params, opt), other)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "plain-sgd"])
@every_half
def test_missing_master_is_rebuilt_from_the_param(kind, dtype):
    params, opt, saved = trained(kind, dtype, 3)
    for state in saved["state"].values():
        del state["master_param"]
    other = resumed(kind, params, saved)
    # the same bits as with masters that were the rounded params all along
    for p in params:
        opt.state[p]["master_param"].copy_(p)
    assert_same_run(range(3, 6), (params, opt), other)


@every_stateful_kind
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_half_states_in_a_checkpoint_are_upcast(kind, param_dtype):
    """Trainers that shrink checkpoints to fp16, master included."""
    params, _, saved = trained(kind, param_dtype, 3)
    for state in saved["state"].values():
        state.update({key: value.half() for key, value in state.items() if key != "step"})
    other, other_opt = resumed(kind, params, saved)
    wide = torch.float64 if param_dtype == torch.float64 else torch.float32
    for p, state in zip(other, saved["state"].values(), strict=True):
        for key, value in other_opt.state[p].items():
            assert value.dtype == (torch.float32 if key == "step" else wide)
            if key != "master_param":
                assert torch.equal(value, state[key].to(value.dtype))
    run(other, other_opt, range(3, 5))
    assert all(p.isfinite().all() for p in other)


@pytest.mark.parametrize("form", STEP_FORMS)
def test_every_form_of_step_is_understood(form):
    params, opt, saved = trained()
    count = STEP_FORMS[form]()
    for p, state in zip(params, saved["state"].values(), strict=True):
        opt.state[p]["step"].fill_(20.0)
        state["step"] = count
    other, other_opt = resumed("adamw", params, saved)
    assert_same_run(range(2, 4), (params, opt), (other, other_opt))
    for p in other:
        step = other_opt.state[p]["step"]
        assert (step.dtype, step.dim(), float(step)) == (torch.float32, 0, 22.0)
    assert float(count) == 20.0  # the loaded value is not ours to count in


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_momentum_buffer_of_none(momentum):
    """Old torch checkpoints hold None where no momentum step has been."""
    pairs = []
    for cls in (fusedopt.FusedSGD, torch.optim.SGD):
        params = make_params()
        opt = cls(params, lr=0.1, momentum=momentum, dampening=0.5 if momentum else 0)
        saved = opt.state_dict()
        saved["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
        opt.load_state_dict(saved)
        run(params, opt, range(3))
        pairs.append((params, opt))
    assert_same(*pairs)


@every_stateful_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [0, 2])
def test_checkpoint_after_a_skipped_step(kind, dtype, bad):
    params, opt = make(kind, dtype, skip_nonfinite=True)
    run(params, opt, range(bad + 1), bad=bad)
    assert int(opt.skipped_steps) == 1
    other = resumed(kind, params, opt.state_dict(), skip_nonfinite=True)
    clean = make(kind, dtype)
    run(*clean, range(bad))
    assert_same_run(range(bad + 1, bad + 4), (params, opt), other, clean)


@every_kind
@every_dtype
def test_init_state_then_save_and_load(kind, dtype):
    params, opt = make(kind, dtype)
    opt.init_state()
    other = resumed(kind, params, opt.state_dict())
    assert_same_run(range(3), (params, opt), other, make(kind, dtype))


@every_stateful_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distributed_checkpoint_state_dict(kind, dtype):
    """torch.distributed.checkpoint makes missing states by a step at lr=0 on zero gradients."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(dtype)
    params, opt = make(kind, params=list(model.parameters()))
    run(params, opt, range(3))
    resumed_model = copy.deepcopy(model)
    other, other_opt = make(kind, params=list(resumed_model.parameters()))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt))
    dcp.set_optimizer_state_dict(resumed_model, other_opt, saved)
    assert_same_bits((params, opt), (other, other_opt))
    assert_same_run(range(3, 6), (params, opt), (other, other_opt))
