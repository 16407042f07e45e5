"""Layouts that need staging, and tables of many and of empty tensors."""

import pytest
import torch
from cases import transposed
from plan_helpers import OPTIMIZERS, build, every_kind, randn
from protocol_helpers import HALF

# Layouts. Each makes, of a dense row-major tensor, one with the same values laid out otherwise.


def gaps(t):
    return torch.full((t.shape[0], 2 * t.shape[1]), 7.0, dtype=t.dtype)[:, ::2].copy_(t)


def columns(t):
    return torch.full((t.shape[0], t.shape[1] + 3), 7.0, dtype=t.dtype)[:, 1:-2].copy_(t)


def odd_offset(t):
    flat = torch.full((t.numel() + 3,), 7.0, dtype=t.dtype)[1:-2]
    return flat.view(t.shape).copy_(t)


def transposed_gaps(t):
    return gaps(t.t().contiguous()).t()


LAYOUTS = {
    "dense": lambda t: t.clone(),
    "transposed": transposed,
    "gaps": gaps,
    "columns": columns,
    "odd-offset": odd_offset,
    "transposed-gaps": transposed_gaps,
}
SHAPE = (37, 251)  # more than one chunk, no multiple of anything


def memory_around(tensor):
    """The whole storage with the tensor's own elements blanked out."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).clone()
    whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
    return whole


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(kind, dtype, param_layout, grad_layout, backend):
    """Strides pair elements by index, not by address, and memory between them is nobody's."""
    plain = torch.nn.Parameter(randn(SHAPE, 1).to(dtype))
    laid_out = torch.nn.Parameter(LAYOUTS[param_layout](plain.detach()))
    around = memory_around(laid_out.detach())
    opts = [build(kind, [p], backend=backend) for p in (plain, laid_out)]
    for step in range(3):
        plain.grad = randn(SHAPE, 10 + step).to(dtype)
        laid_out.grad = LAYOUTS[grad_layout](plain.grad)
        grad_around = memory_around(laid_out.grad)
        for opt in opts:
            opt.step()
        assert torch.equal(plain.grad, laid_out.grad)
        assert torch.equal(grad_around, memory_around(laid_out.grad))
    assert torch.equal(plain, laid_out)
    assert torch.equal(around, memory_around(laid_out.detach()))
    for name, value in opts[0].state[plain].items():
        mine = opts[1].state[laid_out][name]
        assert torch.equal(value, mine), name
        if name != "step" and param_layout in ("dense", "transposed", "odd-offset"):
            assert mine.stride() == laid_out.stride(), name


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 1, 4, 6), (1, 3, 1, 1), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("which", ["param", "grad", "both"])
def test_channels_last(shape, which, backend):
    plain = torch.nn.Parameter(randn(shape, 1))
    form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    start = plain.detach().clone(memory_format=form if which != "grad" else torch.contiguous_format)
    other = torch.nn.Parameter(start)
    opts = [build("adamw", [p], backend=backend) for p in (plain, other)]
    for step in range(2):
        plain.grad = randn(shape, 5 + step)
        other.grad = plain.grad.clone(
            memory_format=form if which != "param" else torch.contiguous_format
        )
        for opt in opts:
            opt.step()
    assert torch.equal(plain, other)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_expanded_gradient(kind, dtype, backend):
    """What sum().backward() leaves: one element seen many times."""
    p, q = (torch.nn.Parameter(randn((30, 7), 1).to(dtype)) for _ in range(2))
    opts = [build(kind, [t], backend=backend, max_grad_norm=0.5) for t in (p, q)]
    for value in (2.0, -3.0):
        p.grad = torch.full((), value, dtype=dtype).expand(30, 7)
        q.grad = torch.full((30, 7), value, dtype=dtype)
        for opt in opts:
            opt.step()
        assert torch.equal(opts[0].grad_norm, opts[1].grad_norm)
        torch.testing.assert_close(float(opts[0].grad_norm), abs(value) * 210**0.5)
    assert torch.equal(p, q)


@every_kind
def test_gradient_layout_that_changes_from_step_to_step(kind, backend):
    """A staged copy of one step is not taken for the gradient of a later one."""
    plain, other = (torch.nn.Parameter(randn(SHAPE, 1)) for _ in range(2))
    opts = [build(kind, [p], backend=backend) for p in (plain, other)]
    order = [
        "dense",
        "transposed",
        None,
        "gaps",
        "dense",
        "transposed",
        "transposed",
        None,
        "dense",
    ]
    for step, layout in enumerate(order):
        plain.grad = other.grad = None
        if layout is not None:
            plain.grad = randn(SHAPE, 10 + step)
            other.grad = LAYOUTS[layout](plain.grad)
        for opt in opts:
            opt.step()
        assert torch.equal(plain, other), (step, layout)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_gradient_dtype_that_changes_from_step_to_step(dtype, backend):
    p, q = (torch.nn.Parameter(randn(SHAPE, 1).to(dtype)) for _ in range(2))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = q.grad_dtype = None
    opts = [build("adamw", [t], backend=backend) for t in (p, q)]
    for step, grad_dtype in enumerate([torch.float32, *HALF, torch.float32]):
        for layout in ("dense", "transposed"):
            p.grad = randn(SHAPE, 10 + step).to(grad_dtype)
            q.grad = LAYOUTS[layout](p.grad)
            for opt in opts:
                opt.step()
            assert torch.equal(p, q)


# Many tensors


@every_kind
def test_thousands_of_tensors(kind, backend):
    n = 3000 if backend == "cpu" else 300
    shapes = [(i % 23,) if i % 3 else (i % 5, i % 7) for i in range(n)]
    ours = [torch.nn.Parameter(randn(s, i)) for i, s in enumerate(shapes)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    _, their_cls, kwargs, _ = OPTIMIZERS[kind]
    groups = [{"params": ours[i::3], "lr": 0.1 / (i + 1)} for i in range(3)]
    their_groups = [{"params": theirs[i::3], "lr": 0.1 / (i + 1)} for i in range(3)]
    opt = build(kind, groups, max_grad_norm=1.0, backend=backend)
    their_opt = their_cls(their_groups, **kwargs, foreach=True)
    for step in range(2):
        flat = randn((sum(p.numel() for p in ours),), step)
        for params in (ours, theirs):
            parts = flat.split([p.numel() for p in params])
            for p, g in zip(params, parts, strict=True):
                p.grad = g.view(p.shape).clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        opt.step()
        their_opt.step()
        torch.testing.assert_close(opt.grad_norm, norm)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@every_kind
def test_empty_tensors_anywhere(kind, backend):
    """Before, between and after the others: nothing is lost around them (a bug others had)."""
    shapes = [(0,), (5,), (0, 3), (9000,), (3, 0), (0,)]
    with_empty = [torch.nn.Parameter(randn(s, i)) for i, s in enumerate(shapes)]
    without = [torch.nn.Parameter(p.detach().clone()) for p in with_empty if p.numel()]
    for params in (with_empty, without):
        opt = build(kind, params, backend=backend, max_grad_norm=0.5)
        for step in range(2):
            flat = randn((9005,), step).split([5, 9000])
            for p in params:
                p.grad = flat[p.numel() > 5].clone() if p.numel() else torch.empty(p.shape)
            opt.step()
    assert all(
        torch.equal(a, b) for a, b in zip([with_empty[1], with_empty[3]], without, strict=True)
    )


def test_only_empty_tensors(backend):
    p = torch.nn.Parameter(torch.empty(0, 4))
    opt = build("adamw", [p], backend=backend, max_grad_norm=1.0)
    p.grad = torch.empty(0, 4)
    opt.step()
    assert (float(opt.grad_norm), float(opt.clip_coef)) == (0.0, 1.0)


# What must come through the copies


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 4643, 37 * 251 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["gaps", "transposed", "transposed-gaps"])
def test_a_nonfinite_element_of_a_staged_gradient(layout, dtype, place, bad, backend):
    param = torch.nn.Parameter(randn(SHAPE, 1).to(dtype))
    before = param.detach().clone()
    opt = build("adamw", [param], backend=backend, skip_nonfinite=True)
    grad = randn(SHAPE, 2).to(dtype)
    grad.view(-1)[place] = bad
    param.grad = LAYOUTS[layout](grad)
    opt.step()
    assert opt.found_inf == 1 and opt.skipped_steps == 1
    assert torch.equal(param, before) and opt.state[param]["step"] == 0


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_write_to_a_parameter_between_steps(kind, dtype, layout, backend):
    """Wherever the kernels keep a copy of it."""
    plain = torch.nn.Parameter(randn(SHAPE, 1).to(dtype))
    laid_out = torch.nn.Parameter(LAYOUTS[layout](plain.detach()))
    for param in (plain, laid_out):
        opt = build(kind, [param], backend=backend)
        for step in range(3):
            with torch.no_grad():
                param[3:, 5:] += step
            param.grad = randn(SHAPE, 10 + step).to(dtype)
            opt.step()
    assert torch.equal(plain, laid_out)
    assert laid_out.detach()[3:, 5:].mean() > 1.0
