"""The state dict, copies and pickles: what they hold, and that nothing is shared."""

import copy
import io
import pickle

import pytest
import torch
from checkpoint_helpers import (
    assert_same_bits,
    clone_params,
    every_dtype,
    every_kind,
    make,
    make_params,
    run,
)
from protocol_helpers import fallback_is_expected, on_every_backend

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# The dictionary itself


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_state_dict_holds_tensors_and_plain_values(kind, dtype):
    params, opt = make(kind, dtype, max_grad_norm=1.0, skip_nonfinite=True)
    run(params, opt, range(2))
    saved = opt.state_dict()
    assert set(saved) == {"state", "param_groups"}
    for state in saved["state"].values():
        assert all(type(v) is torch.Tensor for v in state.values())
    plain = (bool, int, float, str, type(None))
    for group in saved["param_groups"]:
        for key, value in group.items():
            items = value if isinstance(value, (list, tuple)) else [value]
            assert all(isinstance(v, plain) for v in items), key
    theirs = torch.optim.AdamW if "sgd" not in kind else torch.optim.SGD
    keys = set(theirs(make_params()).state_dict()["param_groups"][0])
    assert set(saved["param_groups"][0]) == keys | {"decoupled_weight_decay"}


def test_saving_does_not_disturb_the_run():
    (params, opt), (other, other_opt) = make("sgd"), make("sgd")
    for step in range(4):
        run(params, opt, [step])
        run(other, other_opt, [step])
        other_opt.state_dict()
    assert_same_bits((params, opt), (other, other_opt))


def test_hooks():
    params, opt = make("sgd")
    run(params, opt, range(2))
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append("save-pre"))

    def add(o, saved):
        calls.append("save-post")
        return {**saved, "extra": 1}

    opt.register_state_dict_post_hook(add)
    saved = opt.state_dict()
    assert saved["extra"] == 1 and calls == ["save-pre", "save-post"]

    other, other_opt = make("sgd", params=clone_params(params))

    def double(o, loaded):
        calls.append("load-pre")
        state = {
            i: {k: v * 2 if k == "momentum_buffer" else v for k, v in s.items()}
            for i, s in loaded["state"].items()
        }
        return {**loaded, "state": state}

    other_opt.register_load_state_dict_pre_hook(double)
    seen = []
    other_opt.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[other[0]]["momentum_buffer"].clone())
    )
    other_opt.load_state_dict(saved)
    assert calls[2:] == ["load-pre"] and len(seen) == 1
    assert torch.equal(seen[0], 2 * opt.state[params[0]]["momentum_buffer"])


def test_named_parameters():
    model = torch.nn.Linear(3, 2)
    opt = fusedopt.FusedAdamW(model.named_parameters())
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    run(list(model.parameters()), opt, range(1))
    saved = opt.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    unnamed = torch.nn.Linear(3, 2)
    other = fusedopt.FusedAdamW(unnamed.named_parameters())
    del saved["param_groups"][0]["param_names"]
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]
    assert torch.equal(other.state[unnamed.bias]["exp_avg"], opt.state[model.bias]["exp_avg"])


def test_loading_keeps_the_constructors_global_options():
    params, opt = make("adamw", max_grad_norm=0.001, skip_nonfinite=True)
    run(params, opt, range(2))
    _, other_opt = make("adamw", params=clone_params(params), max_grad_norm=7.0)
    other_opt.load_state_dict(opt.state_dict())
    assert other_opt.max_grad_norm == 7.0 and other_opt.skip_nonfinite is False
    assert "max_grad_norm" not in other_opt.param_groups[0]


def test_wrong_structure_is_refused_as_in_torch():
    params, opt = make("adamw")
    run(params, opt, range(1))
    saved = opt.state_dict()
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
    params, opt = make(kind, dtype)
    run(params, opt, range(2))
    saved = opt.state_dict()
    twins = [make(kind, params=clone_params(params)) for _ in range(2)]
    for _, twin_opt in twins:
        twin_opt.load_state_dict(saved)
    storages = [all_storages(o) for o in (opt, twins[0][1], twins[1][1])]
    assert not (storages[0] & storages[1] or storages[0] & storages[2] or storages[1] & storages[2])
    reference = copy.deepcopy(saved)
    for _, twin_opt in twins:
        run(*make_pair(twin_opt), range(2, 4))
    for i, state in reference["state"].items():
        for key, value in state.items():
            assert torch.equal(saved["state"][i][key], value)  # the source has not moved
    assert_same_bits(*twins)


def make_pair(opt):
    return opt.param_groups[0]["params"], opt


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_changing_the_loaded_dict_later_changes_nothing(kind):
    params, opt = make(kind, torch.bfloat16)
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    other, other_opt = make(kind, params=clone_params(params))
    other_opt.load_state_dict(saved)
    for state in saved["state"].values():
        for value in state.values():
            value.fill_(123.0)
    saved["param_groups"][0]["lr"] = 77.0
    assert_same_bits((params, opt), (other, other_opt))
    run(params, opt, range(2, 4))
    run(other, other_opt, range(2, 4))
    assert_same_bits((params, opt), (other, other_opt))


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


def test_loading_its_own_state_dict_changes_nothing():
    """accelerate does it at construction, trainers do it to move states between devices."""
    (params, opt), (other, other_opt) = make("adamw", torch.float16), make("adamw", torch.float16)
    for step in range(4):
        other_opt.load_state_dict(other_opt.state_dict())
        run(params, opt, [step])
        run(other, other_opt, [step])
    assert_same_bits((params, opt), (other, other_opt))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_lr_tensor_is_copied(device):
    lr = torch.tensor(0.1, device=device)
    params, opt = make("adamw", lr=lr)
    run(params, opt, range(1))
    other, other_opt = make("adamw", params=clone_params(params))
    other_opt.load_state_dict(opt.state_dict())
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
@every_dtype
def test_copy_steps_as_the_original_and_alone(copier, kind, dtype):
    params, opt = make(kind, dtype, max_grad_norm=0.5)
    run(params, opt, range(3))
    twin_opt = COPIERS[copier](opt)
    twin, _ = make_pair(twin_opt)
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
    for name in ("max_grad_norm", "norm_type", "max_grad_value", "skip_nonfinite"):
        assert getattr(twin, name) == getattr(opt, name) == OPTIONS[name]
    assert twin._step_supports_amp_scaling is False
    twin_params, _ = make_pair(twin)
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


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copy_of_a_wrapped_step_is_no_longer_tied_to_the_original(copier):
    """A scheduler leaves a bound `step` on the instance; the copy must not step the original."""
    params, opt = make("adamw")
    torch.optim.lr_scheduler.StepLR(opt, 1)
    run(params, opt, range(2))
    twin_opt = COPIERS[copier](opt)
    twin, _ = make_pair(twin_opt)
    before = [p.detach().clone() for p in params]
    run(twin, twin_opt, range(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, twin, strict=True))


def test_copy_in_the_middle_of_a_scaler_step_is_not_scaled():
    params, opt = make("adamw")
    run(params, opt, range(1))
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    twin_opt = copy.deepcopy(opt)
    del opt.grad_scale, opt.found_inf
    assert not hasattr(twin_opt, "grad_scale")
