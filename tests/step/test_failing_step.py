"""Steps that fail: whatever is spoilt is refused before anything moves."""

import copy
import itertools
import textwrap

import pytest
import torch
from children import in_a_child
from protocol_helpers import (
    OPTIMIZERS,
    every_kind,
    fallback_is_expected,
    give_grads,
    on_every_backend,
)
from torch.nn import Parameter

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def make(kind, dtype=torch.float32, **options):
    """Two groups, three parameters; the last of the last is the one that will be spoilt."""
    cls, kwargs = OPTIMIZERS[kind]
    gen = torch.Generator().manual_seed(7)
    shapes = (5, 3), (9000,), (7, 4)
    params = [Parameter(torch.randn(s, generator=gen).to(dtype)) for s in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    return params, cls(groups, **{**kwargs, **options})


def make_twins(kind, *arguments, **options):
    return [make(kind, *arguments, **options) for _ in range(2)]


def step_all(pairs, *steps):
    for step in steps:
        for params, opt in pairs:
            give_grads(params, step)
            opt.step()


def as_it_is(value):
    """What there is to compare: of a tensor its bytes, and where it has strides those."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    elements = value.detach().to_dense().contiguous().view(-1).view(torch.uint8)
    stride = value.stride() if value.layout == torch.strided else None
    return value.dtype, value.shape, value.layout, stride, elements.numpy().tobytes()


def snapshot(params, opt):
    """Everything a step may move, by value, by identity where it counts."""
    return {
        "params": [(p._version, as_it_is(p)) for p in params],
        "grads": [p.grad is not None and (id(p.grad), as_it_is(p.grad)) for p in params],
        "state": [
            (id(p), [(name, id(v), as_it_is(v)) for name, v in own.items()])
            for p, own in opt.state.items()
        ],
        "groups": [
            {k: as_it_is(v) for k, v in group.items() if k != "params"}
            for group in opt.param_groups
        ],
        "measured": [as_it_is(v) for v in (opt.grad_norm, opt.clip_coef, opt.skipped_steps)],
    }


# Each spoils one thing of the last parameter, and returns what mends it.


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


def with_state(name, made_of):
    """Another tensor in the place of this one; SGD has no exp_avg, but a momentum_buffer."""

    def spoil(params, opt):
        state = opt.state[params[-1]]
        key = name if name in state else "momentum_buffer"
        good = state[key]
        state[key] = made_of(good)
        return lambda: state.__setitem__(key, good)

    return spoil


def wrong_state_data(params, opt):
    """The same tensor object, on other memory."""
    state = opt.state[params[-1]]
    value = state["exp_avg" if "exp_avg" in state else "momentum_buffer"]
    good = value.data
    value.data = torch.zeros(3)
    return lambda: setattr(value, "data", good)


def with_param(made_of, in_inference_mode=False):
    """One more at the end of the last group; `made_of` sees the first parameter."""

    def spoil(params, opt):
        group = opt.param_groups[-1]
        with torch.inference_mode(in_inference_mode):
            bad = Parameter(made_of(params[0].detach()))
        bad.grad = torch.ones_like(bad)
        group["params"].append(bad)
        return lambda: group["params"].pop()

    return spoil


def stale_shape(params, opt):
    """p.data was replaced by another shape and the gradient is still the old one's."""
    p, good = params[-1], params[-1].data
    p.data = torch.zeros(3, dtype=p.dtype)
    return lambda: setattr(p, "data", good)


def bad_grad_scale(params, opt):
    opt.grad_scale = torch.tensor([1.0, 2.0])
    return lambda: delattr(opt, "grad_scale")


def bad_lr(params, opt):
    opt.param_groups[-1]["lr"] = torch.tensor([0.1, 0.2])
    return lambda: opt.param_groups[-1].update(lr=0.05)


@torch.inference_mode()
def of_inference_mode(tensor):
    return tensor.clone()


OF_INFERENCE = "state '.*' was made in inference mode"
FLOAT16, BOTH = [torch.float16], [torch.float32, torch.float16]
# what is spoilt: how, what the error says, after how many steps, of which dtype
SPOILERS = {
    "sparse grad": (sparse_grad, "sparse", (0, 2), BOTH),
    "double grad": (double_grad, "float64", (0, 2), BOTH),
    "wrong data": (wrong_state_data, "exp_avg|momentum_buffer", (2,), BOTH),
    "complex": (with_param(lambda p: p.to(torch.complex64)), "complex", (0, 2), BOTH),
    "stale shape": (stale_shape, "shape", (0, 2), BOTH),
    "expanded": (with_param(lambda p: torch.zeros(1).expand(4)), "memory", (0, 2), BOTH),
    "shared memory": (with_param(lambda p: p.view(-1)[10:]), "memory", (0, 2), BOTH),
    "of inference": (with_param(torch.clone, True), "made in inference mode", (0, 2), BOTH),
    "grad_scale": (bad_grad_scale, "grad_scale", (0, 2), BOTH),
    "lr": (bad_lr, "lr|one element", (0, 2), BOTH),
    "master": (with_state("master_param", lambda v: torch.zeros(3)), "master_param", (2,), FLOAT16),
}
for wrong in ((3,), (4, 7), (7, 5)):
    spoil = with_state("exp_avg", lambda v, wrong=wrong: torch.zeros(wrong))
    SPOILERS[f"state of {wrong}"] = (spoil, "exp_avg|momentum_buffer", (2,), BOTH)
for name in ("exp_avg", "exp_avg_sq", "step", "master_param"):
    SPOILERS[f"{name} of inference"] = (
        with_state(name, of_inference_mode), OF_INFERENCE, (2,), FLOAT16,
    )  # fmt: skip
if not hasattr(torch.Tensor, "grad_dtype"):
    del SPOILERS["double grad"]


@every_kind
@pytest.mark.parametrize("what", SPOILERS)
def test_failing_step_moves_nothing(kind, what):
    spoil, words, warm_ups, dtypes = SPOILERS[what]
    for warm_up, dtype in itertools.product(warm_ups, dtypes):
        pairs = make_twins(kind, dtype, max_grad_norm=1.0)
        (params, opt), (twin, twin_opt) = pairs
        step_all(pairs, *range(warm_up))
        give_grads(params, warm_up)
        mend = spoil(params, opt)
        before = snapshot(params, opt)
        for _ in range(2):  # the second failure is as clean as the first
            with pytest.raises((RuntimeError, ValueError), match=words):
                opt.step()
            assert before == snapshot(params, opt)
        mend()
        step_all(pairs, *range(warm_up, warm_up + 3))
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
    assert before == snapshot(params, opt)
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
    pairs = make_twins(kind)
    step_all(pairs, 0)
    for params, _ in pairs:
        give_grads(params, 1)
        params[-1].grad = None
    (params, opt), (twin, twin_opt) = pairs
    SPOILERS["state of (3,)"][0](params, opt)
    before = snapshot(params, opt)
    twin_opt.step()
    try:
        opt.step()
    except RuntimeError:
        assert before == snapshot(params, opt)
    else:
        assert all(torch.equal(a, b) for a, b in zip(params, twin, strict=True))


# A parameter of inference mode, which no step outside of it can write to


@every_kind
def test_a_parameter_of_inference_mode(kind):
    """It is stepped where torch allows it, and left alone where it has no gradient."""
    pairs = make_twins(kind)
    for (params, opt), is_odd in zip(pairs, (True, False), strict=True):
        with torch.inference_mode(is_odd):
            params.append(Parameter(torch.ones(7)))
        opt.add_param_group({"params": params[-1:]})
        with torch.inference_mode():
            step_all([(params, opt)], 0, 1)
        params[-1].grad = None
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(*(params for params, _ in pairs), strict=True))


@every_kind
def test_a_parameter_of_inference_mode_that_got_other_memory(kind):
    """``.data`` does not make it writable, as torch has it."""
    cls, kwargs = OPTIMIZERS[kind]
    with torch.inference_mode():
        made_inside = Parameter(torch.ones(7))
    made_inside.data = made_inside.data.clone()
    made_outside = Parameter(torch.ones(7))
    with torch.inference_mode():
        made_outside.data = torch.ones(7)
    assert made_outside.is_inference()
    for p in (made_inside, made_outside):
        p.grad = torch.ones(7)
    with pytest.raises(RuntimeError, match="param 0 of group 0 was made in inference mode"):
        cls([made_inside], **kwargs).step()
    cls([made_outside], **kwargs).step()  # and the other way round it stays so
    assert made_inside.eq(1).all() and not made_outside.eq(1).any()


# A gradient with no memory behind it. Read as if it had some, it ends the process: so in another

NO_MEMORY = """
    import torch, fusedopt
    from torch.testing._internal.two_tensor import TwoTensor

    grads = torch._efficientzerotensor((50,)), TwoTensor(torch.ones(50), torch.ones(50))
    for backend in ("cpu", "reference"):
        for name, grad in zip(("zero-tensor", "wrapper"), grads):
            params = [torch.nn.Parameter(torch.ones(50)) for _ in range(3)]
            opt = fusedopt.FusedAdamW(
                params, lr=0.1, weight_decay=0.0, backend=backend, max_grad_norm=1.0
            )
            for stepped in (False, True):
                for p in params:
                    p.grad = torch.ones(50)
                if stepped:
                    opt.step()
                before = [p.detach().clone() for p in params]
                params[1].grad = grad
                try:
                    opt.step()
                except (RuntimeError, TypeError):
                    print(backend, name, "refused")
                    assert all(torch.equal(a, b) for a, b in zip(before, params))
                else:
                    print(backend, name, "stepped", torch.equal(params[1], before[1]))
                    assert all(p.isfinite().all() for p in params)
"""


@pytest.mark.parametrize("backend", ["reference"])  # one process for both
def test_gradient_without_memory(cpu_backend, tmp_path):
    done = in_a_child(textwrap.dedent(NO_MEMORY), tmp_path)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    for backend in ("cpu", "reference"):  # torch steps it as zeros: at first nothing moves
        assert f"{backend} zero-tensor stepped True" in lines
