"""The state dict, copies and pickles: what they hold, and that nothing is shared."""

import copy
import io
import pickle

import pytest
import torch
from checkpoint_helpers import (
    assert_same_bits,
    assert_same_run,
    clone_params,
    every_kind,
    make,
    make_params,
    resumed,
    run,
    trained,
)
from protocol_helpers import INF, fallback_is_expected, on_every_backend
from torch.utils._pytree import tree_map

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# The dictionary itself


def save(opt):
    opt.state_dict()


def load_its_own(opt):
    """accelerate does it at construction, trainers do it to move states between devices."""
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("disturb", [save, load_its_own])
@pytest.mark.parametrize("kind, dtype", [("sgd", torch.float32), ("adamw", torch.float16)])
def test_saving_and_loading_do_not_disturb_the_run(kind, dtype, disturb):
    (params, opt), (other, other_opt) = make(kind, dtype), make(kind, dtype)
    for step in range(4):
        disturb(other_opt)
        run(params, opt, [step])
        run(other, other_opt, [step])
    assert_same_bits((params, opt), (other, other_opt))


def test_hooks():
    params, opt, _ = trained("sgd")
    other, other_opt = make("sgd", params=clone_params(params))
    calls = []

    def add(o, saved):
        calls.append("save-post")
        return {**saved, "extra": 1}

    def double(o, loaded):
        calls.append("load-pre")
        return {**loaded, "state": tree_map(lambda value: value * 2, loaded["state"])}

    def look(o):
        calls.append("load-post")
        calls.append(o.state[other[0]]["momentum_buffer"].clone())

    opt.register_state_dict_pre_hook(lambda o: calls.append("save-pre"))
    opt.register_state_dict_post_hook(add)
    other_opt.register_load_state_dict_pre_hook(double)
    other_opt.register_load_state_dict_post_hook(look)
    saved = opt.state_dict()
    assert saved["extra"] == 1
    other_opt.load_state_dict(saved)
    assert calls[:-1] == ["save-pre", "save-post", "load-pre", "load-post"]
    assert torch.equal(calls[-1], 2 * opt.state[params[0]]["momentum_buffer"])


def test_loading_keeps_the_constructors_global_options():
    params, _, saved = trained("adamw", max_grad_norm=0.001, skip_nonfinite=True)
    _, opt = resumed("adamw", params, saved, max_grad_norm=7.0)
    assert opt.max_grad_norm == 7.0 and opt.skip_nonfinite is False
    assert "max_grad_norm" not in opt.param_groups[0]


def test_wrong_structure_is_refused_as_in_torch():
    _, _, saved = trained("adamw")
    fewer = fusedopt.FusedAdamW(make_params()[:2])
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        fewer.load_state_dict(saved)
    groups = fusedopt.FusedAdamW([{"params": [p]} for p in make_params()])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        groups.load_state_dict(saved)


# Sharing


def all_storages(opt):
    return {
        v.untyped_storage().data_ptr() for s in opt.state.values() for v in s.values() if v.numel()
    }


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_copies(kind, dtype):
    params, opt, copied = trained(kind, dtype)
    saved = opt.state_dict()
    twins = [resumed(kind, params, saved) for _ in range(2)]
    storages = [all_storages(each) for each in (opt, *(twin_opt for _, twin_opt in twins))]
    assert len(set().union(*storages)) == sum(map(len, storages))
    assert_same_run(range(2, 4), *twins)
    for i, state in copied["state"].items():
        for key, value in state.items():
            assert torch.equal(saved["state"][i][key], value)  # the source has not moved
    other = resumed(kind, params, copied)
    for state in copied["state"].values():  # and what is changed later is not seen
        for value in state.values():
            value.fill_(123.0)
    copied["param_groups"][0]["lr"] = 77.0
    assert_same_bits((params, opt), other)
    assert_same_run(range(2, 4), (params, opt), other)


def test_an_entry_of_no_parameter_is_copied():
    """torch keeps what some libraries put beside the parameters' states."""
    _, opt = make("adamw")
    saved = opt.state_dict()
    saved["state"]["global"] = {"ema": torch.ones(3), "seen": [1, 2]}
    opt.load_state_dict(saved)
    saved["state"]["global"]["ema"].fill_(5.0)
    saved["state"]["global"]["seen"].append(3)
    assert torch.equal(opt.state["global"]["ema"], torch.ones(3))
    assert opt.state["global"]["seen"] == [1, 2]


def test_lr_tensor_is_copied():
    lr = torch.tensor(0.1)
    params, opt = make("adamw", lr=lr)
    run(params, opt, range(1))
    other, other_opt = resumed("adamw", params, opt.state_dict())
    lr.fill_(100.0)
    run(other, other_opt, range(1, 2))
    assert float(other_opt.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert all(p.abs().max() < 10 for p in other)


# Copies of the whole optimizer

OPTIONS = {
    "max_grad_norm": 0.5,
    "norm_type": float("inf"),
    "max_grad_value": 0.25,
    "skip_nonfinite": True,
    "amp_scaling": False,
    "master_weights": False,
    "norm_bits": "exact",
    "backend": "reference",
}


def through_torch_save(opt):
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "torch.save": through_torch_save,
}
every_copier = pytest.mark.parametrize("copier", COPIERS)


@every_copier
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scheduled", [False, True])
def test_copy_steps_as_the_original_and_alone(copier, kind, dtype, scheduled):
    """A scheduler leaves a bound `step` on the instance; the copy must not step the original."""
    params, opt = make(kind, dtype, max_grad_norm=0.5)
    if scheduled:
        torch.optim.lr_scheduler.StepLR(opt, 1)
    run(params, opt, range(3))
    twin_opt = COPIERS[copier](opt)
    twin = twin_opt.param_groups[0]["params"]
    assert type(twin_opt) is type(opt) and twin[0] is not params[0]
    assert not all_storages(opt) & all_storages(twin_opt)
    before = [p.detach().clone() for p in params]
    run(twin, twin_opt, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    run(params, opt, range(3, 6))
    assert_same_bits((params, opt), (twin, twin_opt))
    assert torch.equal(opt.grad_norm, twin_opt.grad_norm)


@every_copier
@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])
@pytest.mark.parametrize("stepped", [False, True])
def test_copy_keeps_every_option(copier, cls, stepped):
    params = make_params(torch.bfloat16)
    opt = cls(params, **OPTIONS)
    if stepped:
        run(params, opt, range(1))
    twin = COPIERS[copier](opt)
    for name in ("max_grad_norm", "norm_type", "max_grad_value", "skip_nonfinite", "norm_bits"):
        assert getattr(twin, name) == getattr(opt, name) == OPTIONS[name]
    assert twin._step_supports_amp_scaling is False
    twin_params = twin.param_groups[0]["params"]
    run(twin_params, twin, range(1, 2), bad=1)  # skipped: skip_nonfinite
    assert float(twin.found_inf) == 1
    run(twin_params, twin, range(2, 3))
    assert twin.backend == {"cpu": "reference"}
    assert all("master_param" not in twin.state[p] for p in twin_params)
    assert all(p.isfinite().all() for p in twin_params)


@every_copier
def test_copy_with_its_model(copier):
    """The optimizer of the copied pair steps the copied model."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    pair = (model, fusedopt.FusedAdamW(model.parameters(), lr=0.1, max_grad_norm=0.1))
    model2, opt2 = COPIERS[copier](pair)
    assert opt2.param_groups[0]["params"][0] is model2.weight
    for m, o in (pair, (model2, opt2)):
        m(torch.ones(2, 4)).sum().backward()
        o.step()
    assert torch.equal(model.weight, model2.weight)


def test_copy_in_the_middle_of_a_scaler_step_is_not_scaled():
    _, opt, _ = trained("adamw")
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    assert not hasattr(copy.deepcopy(opt), "grad_scale")


# Wrappers


@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])
@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_wrappers_share_the_options_and_the_answers(cls, wrapped):
    """Lightning's and Fabric's wrappers take over ``__dict__``, once."""
    p = torch.nn.Parameter(torch.ones(4))
    opt = cls([p], lr=0.1, max_grad_norm=10.0)
    p.grad = torch.ones(4)
    if wrapped == "after":
        opt.step()
    wrapper = object.__new__(type("Wrapper", (cls,), {}))
    wrapper.__dict__ = {k: v for k, v in opt.__dict__.items() if k != "step"}
    wrapper.max_grad_norm = 1.0
    assert opt.max_grad_norm == 1.0
    opt.step()
    for each in (opt, wrapper):
        assert float(each.clip_coef) == pytest.approx(0.5) and float(each.grad_norm) == 2.0
        assert each.backend == opt.backend and each.memory_footprint() == opt.memory_footprint()
    opt.skip_nonfinite = True
    assert wrapper.skip_nonfinite
    p.grad[0] = INF
    wrapper.grad_scale = 2.0
    opt.step()
    assert float(wrapper.found_inf) == 1.0 and int(wrapper.skipped_steps) == 1
    assert opt.grad_scale == 2.0
    alone = copy.deepcopy(opt)
    alone.max_grad_norm = None
    assert opt.max_grad_norm == wrapper.max_grad_norm == 1.0
