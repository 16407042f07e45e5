"""Checkpoints, copies and pickles: what is saved, what is loaded, and that nothing is shared."""

import copy
import io
import pickle

import pytest
import torch

import fusedopt

# float64 is served by the reference backend, and says so once
pytestmark = pytest.mark.filterwarnings("ignore::fusedopt.FusedOptFallbackWarning")

ADAMW = (fusedopt.FusedAdamW, {"lr": 0.1, "weight_decay": 0.1})
AMSGRAD = (fusedopt.FusedAdamW, {"lr": 0.1, "amsgrad": True})
SGD = (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1})
PLAIN = (fusedopt.FusedSGD, {"lr": 0.1})
KINDS = {"adamw": ADAMW, "amsgrad": AMSGRAD, "sgd": SGD, "plain-sgd": PLAIN}
HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF, torch.float64]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

COUPLED = {"decoupled_weight_decay": False}
TWINS = {
    "AdamW": (torch.optim.AdamW, fusedopt.FusedAdamW, {"lr": 0.1, "weight_decay": 0.1}, {}),
    "AdamW-amsgrad": (torch.optim.AdamW, fusedopt.FusedAdamW, {"lr": 0.1, "amsgrad": True}, {}),
    "Adam": (torch.optim.Adam, fusedopt.FusedAdamW, {"lr": 0.1, "weight_decay": 0.1}, COUPLED),
    "SGD": (torch.optim.SGD, fusedopt.FusedSGD, SGD[1], COUPLED),
    "SGD-plain": (torch.optim.SGD, fusedopt.FusedSGD, {"lr": 0.1, "weight_decay": 0.1}, COUPLED),
}


@pytest.fixture(autouse=True)
def _every_backend(backend, monkeypatch):
    # "auto" takes the CPU kernels wherever they can serve: not for float64
    monkeypatch.setenv("FUSEDOPT_BACKEND", "auto" if backend == "cpu" else backend)


def make_params(dtype=torch.float32):
    gen = torch.Generator().manual_seed(7)
    values = [torch.randn(s, generator=gen) for s in ((5, 3), (37,), ())]
    values.append(torch.randn(4, 6, generator=gen).t())
    return [torch.nn.Parameter(v.to(dtype)) for v in values]


def make(kind="adamw", dtype=torch.float32, params=None, **options):
    cls, kwargs = KINDS[kind]
    params = make_params(dtype) if params is None else params
    return params, cls(params, **{**kwargs, **options})


def clone_params(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def run(params, opt, steps, bad=None):
    for step in steps:
        gen = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        if step == bad:
            params[1].grad[3] = float("inf")
        opt.step()


def assert_close(params, others, rtol=1e-5, atol=1e-6):
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def assert_same_bits(one, two):
    (params_one, opt_one), (params_two, opt_two) = one, two
    for i, (a, b) in enumerate(zip(params_one, params_two, strict=True)):
        assert torch.equal(a, b), f"param {i}"
        assert set(opt_one.state[a]) == set(opt_two.state[b])
        for key, value in opt_one.state[a].items():
            other = opt_two.state[b][key]
            assert value.dtype == other.dtype and torch.equal(value, other), (i, key)


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


def test_loading_keeps_the_constructors_global_options():
    params, opt = make("adamw", max_grad_norm=0.001, skip_nonfinite=True)
    run(params, opt, range(2))
    _, other_opt = make("adamw", params=clone_params(params), max_grad_norm=7.0)
    other_opt.load_state_dict(opt.state_dict())
    assert other_opt.max_grad_norm == 7.0 and other_opt.skip_nonfinite is False
    assert "max_grad_norm" not in other_opt.param_groups[0]


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
