"""Steps that fail: whatever is spoilt is refused before anything moves."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from protocol_helpers import (
    OPTIMIZERS,
    every_kind,
    fallback_is_expected,
    give_grads,
    on_every_backend,
)

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def make(kind, dtype=torch.float32, **options):
    """Two groups, three parameters; the last of the last is the one that will be spoilt."""
    cls, kwargs = OPTIMIZERS[kind]
    gen = torch.Generator().manual_seed(7)
    params = [
        torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype))
        for s in ((5, 3), (9000,), (7, 4))
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    return params, cls(groups, **{**kwargs, **options})


def bits(tensor):
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        return tensor.layout, tensor.to_dense().clone()
    return tensor.stride(), tensor.clone()


def snapshot(params, opt):
    """Everything a step may move, by value, by identity where it counts."""
    values = {"params": [bits(p) for p in params], "grads": [], "state": {}}
    values["grads"] = [None if p.grad is None else (id(p.grad), bits(p.grad)) for p in params]
    for i, p in enumerate(params):
        if p in opt.state:
            values["state"][i] = {
                k: (id(v), bits(v)) if isinstance(v, torch.Tensor) else v
                for k, v in opt.state[p].items()
            }
    values["keys"] = [id(k) for k in opt.state]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    values["groups"] = copy.deepcopy(groups)
    norm = opt.grad_norm
    values["measured"] = [norm if norm is None else norm.clone(), opt.clip_coef, opt.skipped_steps]
    return values


def assert_equal(a, b, where="snapshot"):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def sparse_grad(params, opt):
    p, good = params[-1], params[-1].grad
    p.grad = good.to_sparse()
    return lambda: setattr(p, "grad", good)


def double_grad(params, opt):
    p, good = params[-1], params[-1].grad
    p.grad = None
    p.grad_dtype = torch.float64
    p.grad = good.double()

    def mend():
        p.grad = None
        p.grad_dtype = p.dtype
        p.grad = good

    return mend


def wrong_state(shape):
    def spoil(params, opt):
        state = opt.state[params[-1]]
        name = "exp_avg" if "exp_avg" in state else "momentum_buffer"
        good = state[name]
        state[name] = torch.zeros(shape)
        return lambda: state.__setitem__(name, good)

    spoil.__name__ = f"state_of_shape_{shape}"
    return spoil


def wrong_state_data(params, opt):
    """The same tensor object, on other memory."""
    state = opt.state[params[-1]]
    value = state["exp_avg" if "exp_avg" in state else "momentum_buffer"]
    good = value.data
    value.data = torch.zeros(3)
    return lambda: setattr(value, "data", good)


def wrong_master(params, opt):
    state = opt.state[params[-1]]
    good = state["master_param"]
    state["master_param"] = torch.zeros(3)
    return lambda: state.__setitem__("master_param", good)


def complex_param(params, opt):
    group = opt.param_groups[-1]
    bad = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    bad.grad = torch.zeros_like(bad)
    group["params"].append(bad)
    return lambda: group["params"].pop()


def stale_shape(params, opt):
    """p.data was replaced by another shape and the gradient is still the old one's."""
    p, good = params[-1], params[-1].data
    p.data = torch.zeros(3, dtype=p.dtype)
    return lambda: setattr(p, "data", good)


def expanded_param(params, opt):
    group = opt.param_groups[-1]
    bad = torch.nn.Parameter(torch.zeros(1).expand(4))
    bad.grad = torch.ones(4)
    group["params"].append(bad)
    return lambda: group["params"].pop()


def shared_memory(params, opt):
    group = opt.param_groups[-1]
    bad = torch.nn.Parameter(params[0].detach().view(-1)[10:])
    bad.grad = torch.ones_like(bad)
    group["params"].append(bad)
    return lambda: group["params"].pop()


def bad_grad_scale(params, opt):
    opt.grad_scale = torch.tensor([1.0, 2.0])
    return lambda: delattr(opt, "grad_scale")


def bad_lr(params, opt):
    opt.param_groups[-1]["lr"] = torch.tensor([0.1, 0.2])
    return lambda: opt.param_groups[-1].update(lr=0.05)


# what is spoilt, what the error says
SPOILERS = [
    (sparse_grad, "sparse"),
    (double_grad, "float64"),
    (wrong_state((3,)), "exp_avg|momentum_buffer"),
    (wrong_state((4, 7)), "exp_avg|momentum_buffer"),
    (wrong_state((7, 5)), "exp_avg|momentum_buffer"),
    (wrong_state_data, "exp_avg|momentum_buffer"),
    (wrong_master, "master_param"),
    (complex_param, "complex"),
    (stale_shape, "shape"),
    (expanded_param, "memory"),
    (shared_memory, "memory"),
    (bad_grad_scale, "grad_scale"),
    (bad_lr, "lr|one element"),
]
NEEDS_STATE = [spoil for spoil, words in SPOILERS if "exp_avg" in words] + [wrong_master]


def failing_cases():
    for spoil, words in SPOILERS:
        if spoil is double_grad and not hasattr(torch.Tensor, "grad_dtype"):
            continue
        for warm_up in (2,) if spoil in NEEDS_STATE else (0, 2):
            for dtype in (
                (torch.float16,) if spoil is wrong_master else (torch.float32, torch.float16)
            ):
                case = f"{spoil.__name__}-{warm_up}-{dtype}"
                yield pytest.param(spoil, words, warm_up, dtype, id=case)


@every_kind
@pytest.mark.parametrize("spoil, words, warm_up, dtype", list(failing_cases()))
def test_failing_step_moves_nothing(kind, spoil, words, warm_up, dtype):
    (params, opt), (twin, twin_opt) = [make(kind, dtype, max_grad_norm=1.0) for _ in range(2)]
    for step in range(warm_up):
        for p, o in ((params, opt), (twin, twin_opt)):
            give_grads(p, step)
            o.step()
    give_grads(params, warm_up)
    mend = spoil(params, opt)
    before = snapshot(params, opt)
    versions = [p._version for p in params]
    for _ in range(2):  # the second failure is as clean as the first
        with pytest.raises((RuntimeError, ValueError), match=words):
            opt.step()
        assert_equal(before, snapshot(params, opt))
        assert [p._version for p in params] == versions
    mend()
    give_grads(params, warm_up)
    give_grads(twin, warm_up)
    for step in range(warm_up, warm_up + 3):
        for p, o in ((params, opt), (twin, twin_opt)):
            give_grads(p, step)
            o.step()
    for p, q in zip(params, twin, strict=True):
        assert torch.equal(p, q)
        assert list(opt.state[p]) == list(twin_opt.state[q])
        for name, value in opt.state[p].items():
            assert torch.equal(value, twin_opt.state[q][name]), name


@every_kind
def test_failing_closure_moves_nothing(kind):
    params, opt = make(kind)
    give_grads(params, 0)
    before = snapshot(params, opt)

    def closure():
        raise KeyError("from the user")

    with pytest.raises(KeyError, match="from the user"):
        opt.step(closure)
    assert_equal(before, snapshot(params, opt))
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@every_kind
def test_error_names_the_parameter(kind):
    """Which of a thousand parameters it was, by name where names are known."""
    cls, kwargs = OPTIMIZERS[kind]
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 2, sparse=True)})
    opt = cls(model.named_parameters(), **kwargs)
    model["embed"](torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"embed\.weight"):
        opt.step()


@every_kind
def test_bad_state_of_a_param_without_gradient_is_not_read(kind):
    """Whether it is refused or left alone: nothing is read past its end, nothing moves half-way."""
    (params, opt), (twin, twin_opt) = make(kind), make(kind)
    for p, o in ((params, opt), (twin, twin_opt)):
        give_grads(p, 0)
        o.step()
        give_grads(p, 1)
        p[-1].grad = None
    wrong_state((3,))(params, opt)
    before = snapshot(params, opt)
    twin_opt.step()
    try:
        opt.step()
    except RuntimeError:
        assert_equal(before, snapshot(params, opt))
    else:
        assert all(torch.equal(a, b) for a, b in zip(params, twin, strict=True))


# A gradient with no memory behind it. Read as if it had some, it ends the process: so in another

NO_MEMORY = """
    import sys, torch, fusedopt
    from torch.testing._internal.two_tensor import TwoTensor

    params = [torch.nn.Parameter(torch.ones(50)) for _ in range(3)]
    opt = fusedopt.FusedAdamW(
        params, lr=0.1, weight_decay=0.0, backend="{backend}", max_grad_norm=1.0
    )
    for stepped in (False, True):
        for p in params:
            p.grad = torch.ones(50)
        if stepped:
            opt.step()
        before = [p.detach().clone() for p in params]
        params[1].grad = {grad}
        try:
            opt.step()
        except (RuntimeError, TypeError) as error:
            print("refused:", error)
            assert all(torch.equal(a, b) for a, b in zip(before, params))
        else:
            print("stepped:", (params[1] - before[1]).detach().abs().max().item())
            assert all(p.isfinite().all() for p in params)
"""
GRADS = {
    "zero-tensor": "torch._efficientzerotensor((50,))",
    "wrapper": "TwoTensor(torch.ones(50), torch.ones(50))",
}


@pytest.mark.parametrize("grad", GRADS)
def test_gradient_without_memory(grad, backend):
    code = textwrap.dedent(NO_MEMORY).format(backend=backend, grad=GRADS[grad])
    root = os.path.dirname(os.path.dirname(fusedopt.__file__))
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,  # `-c` looks in the working directory first: not in the checkout
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    lines = done.stdout.splitlines()
    if grad == "zero-tensor":  # torch steps it as zeros: in the first step nothing moves
        assert lines[0] == "stepped: 0.0"
    assert len(lines) == 2
