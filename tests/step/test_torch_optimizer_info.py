"""FusedAdamW and FusedSGD over the tables torch tests its own optimizers with (OptimizerInfo)."""

import copy
import inspect
import warnings

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fusedopt

# float64 is served by the reference backend, and says so once
pytestmark = pytest.mark.filterwarnings("ignore::fusedopt.FusedOptFallbackWarning")

INFOS = {info.optim_cls: info for info in optim_db}
STEPS = 8

# (torch class, our class, what turns our class into torch's)
PAIRS = {
    "AdamW": (torch.optim.AdamW, fusedopt.FusedAdamW, {}),
    "Adam": (torch.optim.Adam, fusedopt.FusedAdamW, {"decoupled_weight_decay": False}),
    "SGD": (torch.optim.SGD, fusedopt.FusedSGD, {"decoupled_weight_decay": False}),
}


def optimizer_inputs(torch_cls):
    """The inputs of every device, once each: the capturable ones are listed for CUDA only."""
    by_desc = {}
    for device in ("cpu", "cuda", "mps"):
        for entry in INFOS[torch_cls].optim_inputs_func(device=device):
            by_desc.setdefault(entry.desc, entry.kwargs)
    return by_desc


INPUT_CASES = [
    pytest.param(pair, kwargs, id=f"{pair}-{desc}")
    for pair, (torch_cls, _, _) in PAIRS.items()
    for desc, kwargs in optimizer_inputs(torch_cls).items()
]


def make_params(dtype, size=0.01):
    """Small next to a step of lr=1e-3, so that fp32 rounding of the parameter hides nothing."""
    gen = torch.Generator().manual_seed(0)
    shapes = [(10, 5), (10,), (3, 4, 2), (1,), (), (0,), (33, 7)]
    values = [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes]
    values.append(torch.randn(6, 9, generator=gen, dtype=torch.float64).t())
    return [torch.nn.Parameter((v * size).to(dtype)) for v in values]


def set_grads(step, *param_lists):
    gen = torch.Generator().manual_seed(1000 + step)
    for group in zip(*param_lists, strict=True):
        grad = torch.randn(group[0].shape, generator=gen, dtype=torch.float64)
        for param in group:
            param.grad = grad.to(param.dtype)


def as_float(value):
    if isinstance(value, tuple):
        return tuple(as_float(v) for v in value)
    return value.item() if isinstance(value, torch.Tensor) else value


def oracle_kwargs(kwargs, torch_cls):
    """Arguments for torch's for-loop.

    capturable is refused there on the CPU and changes no value; fp32 tensors of one element become
    floats, because torch would compute 1 - lr * weight_decay in fp32.
    """
    kwargs = {k: as_float(v) for k, v in kwargs.items() if k != "capturable"}
    if torch_cls is torch.optim.Adam:
        kwargs.setdefault("weight_decay", 0)
    return {**kwargs, "foreach": False}


def run_both(pair, kwargs, dtype, schedule):
    torch_cls, our_cls, extra = PAIRS[pair]
    theirs, ours = make_params(dtype), make_params(dtype)
    theirs_kwargs = oracle_kwargs(kwargs, torch_cls)
    ours_kwargs = {**copy.deepcopy(kwargs), **extra}
    if "weight_decay" in theirs_kwargs:
        ours_kwargs["weight_decay"] = theirs_kwargs["weight_decay"]
    opts = torch_cls(theirs, **theirs_kwargs), our_cls(ours, **ours_kwargs)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.5) for o in opts]
    for step in range(STEPS):
        set_grads(step, theirs, ours)
        for opt, scheduler in zip(opts, schedulers, strict=True):
            opt.step()
            if schedule:
                scheduler.step()
    return (theirs, opts[0]), (ours, opts[1])


def assert_same_training(theirs, ours, rtol, atol):
    """Compares what moved, not where it is: next to the parameter a wrong step is small."""
    (their_params, their_opt), (our_params, our_opt) = theirs, ours
    start = make_params(their_params[0].dtype)
    for i, (a, b, s) in enumerate(zip(their_params, our_params, start, strict=True)):
        torch.testing.assert_close(
            (b - s).detach(), (a - s).detach(), rtol=rtol, atol=atol, msg=lambda m, i=i: f"{i}: {m}"
        )
        for name, value in their_opt.state[a].items():
            if name == "momentum_buffer" and value is None:
                continue
            mine = our_opt.state[b][name]
            torch.testing.assert_close(mine.to(value.dtype), value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype, schedule", [(torch.float32, False), (torch.float64, True)])
@pytest.mark.parametrize("pair, kwargs", INPUT_CASES)
def test_same_as_torch(pair, kwargs, dtype, schedule):
    theirs, ours = run_both(pair, kwargs, dtype, schedule)
    rtol, atol = (2e-5, 2e-8) if dtype == torch.float32 else (1e-6, 1e-9)
    assert_same_training(theirs, ours, rtol, atol)
    for a, b in zip(theirs[1].param_groups, ours[1].param_groups, strict=True):
        assert float(a["lr"]) == pytest.approx(float(b["lr"]), rel=1e-6)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("pair", PAIRS)
def test_implementation_flags_are_accepted_and_change_nothing(pair, flag):
    _, our_cls, extra = PAIRS[pair]
    results = []
    for kwargs in ({}, {flag: True}, {flag: False}):
        params = make_params(torch.float32)
        opt = our_cls(params, lr=0.1, weight_decay=0.1, **extra, **kwargs)
        for step in range(3):
            set_grads(step, params)
            opt.step()
        assert opt.param_groups[0][flag] == kwargs.get(flag)
        results.append([p.detach().clone() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def error_cases():
    for pair, (torch_cls, _, _) in PAIRS.items():
        for entry in INFOS[torch_cls].optim_error_inputs_func("cpu", torch.float32):
            yield pytest.param(pair, entry, id=f"{pair}-{entry.optimizer_error_input.desc}")


def build(cls, entry, extra):
    given = entry.optimizer_error_input
    params = given.params
    if params is None:
        params = [torch.nn.Parameter(torch.randn(2, 3))]
    opt = cls(copy.deepcopy(params), **copy.deepcopy(given.kwargs), **extra)
    if entry.error_on is OptimizerErrorEnum.STEP_ERROR:
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        opt.step()


@pytest.mark.parametrize("pair, entry", list(error_cases()))
def test_error_inputs_raise_the_same(pair, entry):
    torch_cls, our_cls, extra = PAIRS[pair]
    if issubclass(entry.error_type, Warning):  # of duplicates, which ours refuses
        with pytest.raises(ValueError, match="list each parameter once"):
            build(our_cls, entry, extra)
        return
    texts = []
    for cls, more in ((torch_cls, {}), (our_cls, extra)):
        with pytest.raises(entry.error_type, match=entry.error_regex) as caught:
            build(cls, entry, more)
        assert caught.type is entry.error_type
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


# Arguments torch refuses, beyond its tables.
MORE_ERRORS = [
    ("AdamW", {"lr": -1e-3}),
    ("AdamW", {"lr": torch.tensor([1e-3, 1e-3])}),
    ("AdamW", {"eps": -1.0}),
    ("AdamW", {"betas": (0.9, 1.0)}),
    ("AdamW", {"betas": (-0.1, 0.9)}),
    ("AdamW", {"weight_decay": -0.5}),
    ("AdamW", {"fused": True, "foreach": True}),
    ("AdamW", {"fused": True, "differentiable": True}),
    ("Adam", {"weight_decay": -0.5}),
    ("SGD", {"lr": -1.0}),
    ("SGD", {"weight_decay": -0.5}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ("SGD", {"fused": True, "foreach": True}),
    ("SGD", {"fused": True, "differentiable": True}),
]


@pytest.mark.parametrize("pair, kwargs", MORE_ERRORS, ids=lambda v: str(v).replace(" ", ""))
def test_argument_errors_are_torchs(pair, kwargs):
    torch_cls, our_cls, extra = PAIRS[pair]
    caught = []
    for cls, more in ((torch_cls, {}), (our_cls, extra)):
        with pytest.raises((ValueError, RuntimeError)) as info:
            cls(make_params(torch.float32), **kwargs, **more)
        caught.append((info.type, str(info.value)))
    assert caught[0] == caught[1]


COMMON = {
    "max_grad_norm": None,
    "norm_type": 2.0,
    "max_grad_value": None,
    "master_weights": None,
    "skip_nonfinite": False,
    "amp_scaling": None,
    "backend": None,
    "norm_group": None,
    "norm_bits": None,
    "state_dtype": None,
    "min_8bit_size": 4096,
}


@pytest.mark.parametrize("pair", ["AdamW", "SGD"])
def test_signature_is_torchs_plus_ours(pair):
    torch_cls, our_cls, _ = PAIRS[pair]
    theirs = inspect.signature(torch_cls).parameters
    ours = inspect.signature(our_cls).parameters
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    extra = {n: p.default for n, p in ours.items() if n not in theirs}
    assert extra == {"decoupled_weight_decay": True, **COMMON}
    assert all(ours[n].kind is inspect.Parameter.KEYWORD_ONLY for n in extra)


@pytest.mark.parametrize("pair", PAIRS)
def test_group_keys_are_torchs(pair):
    torch_cls, our_cls, extra = PAIRS[pair]
    theirs = torch_cls(make_params(torch.float32)).param_groups[0]
    ours = our_cls(make_params(torch.float32), **extra).param_groups[0]
    assert set(ours) == set(theirs) | {"decoupled_weight_decay"}
    differ = {"params", "decoupled_weight_decay"} | ({"weight_decay"} if pair == "Adam" else set())
    assert {k: v for k, v in ours.items() if k not in differ} == {
        k: v for k, v in theirs.items() if k not in differ
    }


def test_no_warning_in_an_ordinary_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, our_cls, extra in PAIRS.values():
            params = make_params(torch.float32)
            opt = our_cls(params, lr=0.1, **extra)
            set_grads(0, params)
            opt.step()
