"""Ours and torch's optimizers and scalers side by side, for the tests of the torch.optim protocol.

A test file runs on every backend by

    _every_backend = pytest.fixture(autouse=True)(on_every_backend)
"""

import pytest
import torch

import fusedopt

COUPLED = {"decoupled_weight_decay": False}
# our class, torch's, the arguments of both, what turns our class into torch's
KINDS = {
    "adamw": (fusedopt.FusedAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}, {}),
    "sgd": (
        fusedopt.FusedSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        COUPLED,
    ),
}
OPTIMIZERS = {kind: (cls, kwargs) for kind, (cls, _, kwargs, _) in KINDS.items()}
SCALERS = {
    "torch": lambda **kw: torch.amp.GradScaler("cpu", **kw),
    "ours": lambda **kw: fusedopt.GradScaler("cpu", **kw),
    "converted": lambda **kw: fusedopt.fuse_scaler(torch.amp.GradScaler("cpu", **kw)),
}
HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF, torch.float64]
INF, NAN = float("inf"), float("nan")

every_kind = pytest.mark.parametrize("kind", KINDS)
every_class = pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])
every_scaler = pytest.mark.parametrize("scaler_name", SCALERS)
# float64 is served by the reference backend, and says so once
fallback_is_expected = pytest.mark.filterwarnings("ignore::fusedopt.FusedOptFallbackWarning")


def on_every_backend(backend, monkeypatch):
    # "auto" takes the CPU kernels wherever they can serve: not for float64
    monkeypatch.setenv("FUSEDOPT_BACKEND", "auto" if backend == "cpu" else backend)


def param(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(*shape, dtype=dtype))


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


def make_ours(kind="adamw", dtype=torch.float32, **options):
    params = make_params(dtype)
    return params, build(True, kind, params, **options)


def make_scaled(kind="adamw", dtype=torch.float32, **options):
    """One that takes scaled gradients from torch's scaler, too; from ours it does in any case."""
    return make_ours(kind, dtype, amp_scaling=True, **options)


def make_theirs(kind="adamw", **options):
    params = make_params()
    return params, build(False, kind, params, **options)


def twins(kind, **options):
    """[(params, opt) of ours, (params, opt) of torch's], the same start."""
    return [make_ours(kind, **options), make_theirs(kind, **options)]


def make_scaler(name, **kwargs):
    scaler = SCALERS[name](**{"init_scale": 8.0, "growth_interval": 4, **kwargs})
    scaler.scale(torch.zeros(()))
    return scaler


def give_grads(params, step, scale=1.0, bad=None):
    """Scaled gradients; `bad` goes into the last element of the middle tensor."""
    gen = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=gen) * scale
        if bad is not None and i == 1:
            grad[-1] = bad
        param.grad = grad.to(param.dtype)


def step_all(pairs, step):
    for params, opt in pairs:
        give_grads(params, step)
        opt.step()


def snapshot(params, opt):
    state = {
        i: {k: v.clone() for k, v in opt.state.get(p, {}).items()} for i, p in enumerate(params)
    }
    return [p.detach().clone() for p in params], state


def assert_unmoved(before, params, opt):
    """Bit for bit; a state that was born in the meantime is as if no step had been."""
    old_params, old_state = before
    for i, (old, param) in enumerate(zip(old_params, params, strict=True)):
        assert torch.equal(old, param), f"param {i} moved"
        for key, value in opt.state.get(param, {}).items():
            if key in old_state[i]:
                assert torch.equal(old_state[i][key], value), (i, key)
            elif key == "master_param":
                assert torch.equal(value, param.float()), (i, key)
            else:
                assert not value.any(), (i, key)


def assert_same(ours, theirs, rtol=1e-5, atol=1e-6):
    (our_params, our_opt), (their_params, their_opt) = ours, theirs
    for i, (a, b) in enumerate(zip(our_params, their_params, strict=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, i=i: f"param {i}: {m}")
        for name, value in their_opt.state.get(b, {}).items():
            if isinstance(value, torch.Tensor):
                mine = our_opt.state[a][name]
                torch.testing.assert_close(mine, value, rtol=rtol, atol=atol)


def assert_twins(pairs, rtol=1e-5, atol=1e-6):
    assert_same(*pairs, rtol=rtol, atol=atol)
