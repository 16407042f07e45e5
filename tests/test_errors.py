"""Refusals: type, words, and that nothing has moved when one is raised."""

import copy
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import fusedopt

# float64 is served by the reference backend, and says so once
pytestmark = pytest.mark.filterwarnings("ignore::fusedopt.FusedOptFallbackWarning")

OPTIMIZERS = {
    "adamw": (fusedopt.FusedAdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
}
every_kind = pytest.mark.parametrize("kind", OPTIMIZERS)
every_class = pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _every_backend(backend, monkeypatch):
    # "auto" takes the CPU kernels wherever they can serve: not for float64
    monkeypatch.setenv("FUSEDOPT_BACKEND", "auto" if backend == "cpu" else backend)


def param(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(*shape, dtype=dtype))


# Arguments

BAD_OPTIONS = [
    ("max_grad_norm", -1.0),
    ("max_grad_norm", NAN),
    ("norm_type", 1.0),
    ("norm_type", 3),
    ("norm_type", 0.0),
    ("norm_type", -INF),
    ("norm_type", NAN),
    ("max_grad_value", 0.0),
    ("max_grad_value", -2.0),
    ("max_grad_value", NAN),
    ("master_weights", "bf16"),
    ("master_weights", 2),
    ("backend", "gpu"),
    ("backend", ""),
]


ASSIGNABLE = ("max_grad_norm", "norm_type", "max_grad_value")


def assert_names(error, name, value):
    """The argument, its value, and what to pass instead."""
    text = str(error)
    assert name in text
    assert repr(value) in text or (isinstance(value, int) and repr(float(value)) in text)
    rest = text.replace(name, "").replace(repr(value), "")
    assert any(word in rest for word in ("use ", "pass ", "must be ", "one of "))


@every_class
@pytest.mark.parametrize("name, value", BAD_OPTIONS)
def test_bad_option(cls, name, value):
    with pytest.raises(ValueError) as caught:
        cls([param(3)], **{name: value})
    assert_names(caught.value, name, value)


@every_class
@pytest.mark.parametrize("name, value", [case for case in BAD_OPTIONS if case[0] in ASSIGNABLE])
def test_bad_assignment_keeps_the_old_value(cls, name, value):
    opt = cls([param(3)], max_grad_norm=0.5, norm_type=INF, max_grad_value=0.25)
    before = getattr(opt, name)
    with pytest.raises(ValueError) as caught:
        setattr(opt, name, value)
    assert_names(caught.value, name, value)
    assert getattr(opt, name) == before


@every_class
def test_good_options_at_the_edge(cls):
    opt = cls([param(3)], max_grad_norm=0, norm_type=2, max_grad_value=1e-30, master_weights=True)
    assert (opt.max_grad_norm, opt.norm_type, opt.max_grad_value) == (0.0, 2.0, 1e-30)
    opt = cls([param(3)], max_grad_norm=INF, norm_type=INF, backend="auto", amp_scaling=False)
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    opt.step()
    assert float(opt.grad_norm) == 1.0


@every_class
def test_max_grad_norm_of_zero_clips_everything(cls):
    p = param(5)
    opt = cls([p], lr=0.1, weight_decay=0.0, max_grad_norm=0.0)
    p.grad = torch.full((5,), 3.0)
    opt.step()
    assert torch.equal(p.detach(), torch.ones(5)) and float(opt.clip_coef) == 0.0


@every_class
def test_bad_environment(cls, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "nonsense")
    with pytest.raises(ValueError) as caught:
        cls([param(3)])
    assert_names(caught.value, "FUSEDOPT_BACKEND", "nonsense")


GLOBAL_OPTIONS = {
    "max_grad_norm": 1.0,
    "norm_type": 2.0,
    "max_grad_value": 1.0,
    "master_weights": False,
    "skip_nonfinite": True,
    "amp_scaling": False,
    "backend": "reference",
}


@every_class
@pytest.mark.parametrize("name", GLOBAL_OPTIONS)
def test_global_option_in_a_group(cls, name):
    value = GLOBAL_OPTIONS[name]
    with pytest.raises(ValueError) as caught:
        cls([{"params": [param(3)], name: value}])
    assert_names(caught.value, name, value)
    opt = cls([param(3)])
    before = copy.deepcopy(opt.param_groups)
    with pytest.raises(ValueError, match=name):
        opt.add_param_group({"params": [param(4)], name: value})
    assert len(opt.param_groups) == 1 and set(opt.param_groups[0]) == set(before[0])


@every_class
def test_differentiable(cls):
    with pytest.raises(RuntimeError, match=r"differentiable=True .*torch\.optim"):
        cls([param(3)], differentiable=True)


def test_positional_arguments_end_where_torchs_do():
    with pytest.raises(TypeError):
        fusedopt.FusedAdamW([param(3)], 1e-3, (0.9, 0.999), 1e-8, 0.0, False, True)
    with pytest.raises(TypeError):
        fusedopt.FusedSGD([param(3)], 1e-3, 0.0, 0.0, 0.0, False, True)
    with pytest.raises(TypeError, match="max_norm"):
        fusedopt.FusedSGD([param(3)], max_norm=1.0)


# Parameters

REFUSED_DTYPES = [torch.complex64, torch.complex128, torch.int64, torch.int8, torch.bool]
REFUSED_DTYPES += [torch.float8_e4m3fn]


@every_class
@pytest.mark.parametrize("dtype", REFUSED_DTYPES, ids=str)
def test_param_dtype(cls, dtype):
    bad = torch.zeros(3, dtype=dtype)
    with pytest.raises(TypeError, match=str(dtype)):
        cls([param(2), bad])
    opt = cls([param(2)])
    with pytest.raises(TypeError, match=str(dtype)):
        opt.add_param_group({"params": [param(4), bad]})
    assert len(opt.param_groups) == 1


@every_class
def test_wrapper_subclass(cls):
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    bad = torch.nn.Parameter(two_tensor.TwoTensor(torch.ones(3), torch.ones(3)))
    with pytest.raises(TypeError, match="TwoTensor"):
        cls([bad])


@every_class
def test_dtensor(cls):
    dist = pytest.importorskip("torch.distributed")
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        bad = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
        with pytest.raises(TypeError, match="DTensor"):
            cls([param(2), bad])
        opt = cls([param(2)])
        with pytest.raises(TypeError, match="DTensor"):
            opt.add_param_group({"params": bad})
        assert len(opt.param_groups) == 1
    finally:
        dist.destroy_process_group()


@every_class
def test_plain_subclass_is_no_wrapper(cls):
    class Marked(torch.nn.Parameter):
        pass

    p = Marked(torch.ones(3))
    opt = cls([p], lr=0.1)
    p.grad = torch.ones(3)
    opt.step()
    assert not torch.equal(p.detach(), torch.ones(3))


# What is refused at step, before anything moves


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


def give_grads(params, step):
    gen = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)


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
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    lines = done.stdout.splitlines()
    if grad == "zero-tensor":  # torch steps it as zeros: in the first step nothing moves
        assert lines[0] == "stepped: 0.0"
    assert len(lines) == 2


# Memory that is shared, and memory that only looks so


def shared_pair(kind):
    base = torch.arange(20.0)
    if kind == "same":
        return base.view(-1), base.view(-1)
    if kind == "partly":
        return base[:12], base[11:]
    if kind == "one-inside-the-other":
        return base, base[5:6]
    if kind == "strided-over-dense":
        return base[::2], base[4:5]
    return base[::2], base[::3]


@every_class
@pytest.mark.parametrize(
    "kind", ["same", "partly", "one-inside-the-other", "strided-over-dense", "both-strided"]
)
@pytest.mark.parametrize("swap", [False, True])
def test_shared_memory_is_refused(cls, kind, swap):
    params = [torch.nn.Parameter(v) for v in shared_pair(kind)]
    params = params[::-1] if swap else params
    before = [p.detach().clone() for p in params]
    opt = cls(params, lr=0.1)
    for p in params:
        p.grad = torch.ones(p.shape)
    with pytest.raises(RuntimeError, match="memory"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not opt.state


@every_class
@pytest.mark.parametrize(
    "shape, stride", [((4,), (0,)), ((3, 4), (0, 1)), ((5, 3), (1, 1)), ((3, 3), (2, 1))]
)
def test_param_that_overlaps_itself_is_refused(cls, shape, stride):
    p = torch.nn.Parameter(torch.zeros(20).as_strided(shape, stride))
    p.grad = torch.ones(shape)
    opt = cls([param(2), p], lr=0.1)
    with pytest.raises(RuntimeError, match="memory"):
        opt.step()
    assert not p.any()


@every_class
@pytest.mark.parametrize("kind", ["columns", "even-odd", "neighbours", "empty"])
def test_memory_that_only_looks_shared_is_stepped(cls, kind):
    """Views of one buffer that have no element in common."""
    base = torch.ones(6, 8)
    views = {
        "columns": (base[:, :3], base[:, 3:]),
        "even-odd": (base.view(-1)[::2], base.view(-1)[1::2]),
        "neighbours": (base[:3], base[3:]),
        "empty": (base, base.view(-1)[5:5]),
    }[kind]
    params = [torch.nn.Parameter(v) for v in views]
    alone = [torch.nn.Parameter(v.clone()) for v in views]
    for group in (params, alone):
        opt = cls(group, lr=0.1)
        for step in range(2):
            give_grads(group, step)
            opt.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)


@every_class
def test_tied_parameter_object_is_stepped_once(cls):
    """The same object in two modules reaches the optimizer once, through model.parameters()."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    opt = cls(model.parameters(), lr=0.1)
    give_grads(list(model.parameters()), 0)
    opt.step()
    assert len(opt.param_groups[0]["params"]) == 3


# Sharded by FSDP1


@every_class
@pytest.mark.parametrize("stepped", [False, True])
def test_clipping_over_fsdp1_shards(cls, stepped):
    p, q = param(4), param(5)
    opt = cls([p, q], lr=0.1, max_grad_norm=None)
    p.grad, q.grad = torch.ones(4), torch.ones(5)
    q._fsdp_flattened = True
    if stepped:
        opt.step()
    opt.max_grad_norm = 1.0
    before = [p.detach().clone(), q.detach().clone()]
    with pytest.raises(RuntimeError, match="FSDP"):
        opt.step()
    assert torch.equal(p.detach(), before[0]) and torch.equal(q.detach(), before[1])
    opt.max_grad_norm = None
    opt.step()
    assert not torch.equal(p.detach(), before[0])


# A backend that cannot serve


def test_backend_by_name_that_cannot_serve():
    p = param(3, dtype=torch.float64)
    p.grad = torch.ones_like(p)
    opt = fusedopt.FusedAdamW([p], backend="cpu")
    with pytest.raises(RuntimeError, match=r"'cpu'.*backend='reference'"):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3, dtype=torch.float64)) and not opt.state


def test_meta_parameters_are_refused_until_materialized():
    model = torch.nn.Linear(3, 2, device="meta")
    opt = fusedopt.FusedAdamW(model.parameters())
    with pytest.raises((RuntimeError, TypeError), match="meta"):
        opt.init_state()
    assert not opt.state
