"""Layouts that need staging, and tables of many and of empty tensors."""

import pytest
import torch
from cases import FLOATS, HALVES, LAYOUTS, parametrize, transposed, with_gaps
from harness import make_param, randn
from protocol_helpers import build, every_kind

# Each makes, of a dense row-major tensor, one with the same values laid out otherwise.
LAYOUTS = {**LAYOUTS, "transposed_gaps": lambda t: with_gaps(transposed(t).mT).mT}
SHAPE = (7, 4, 21, 17)  # more than one chunk, no multiple of anything


def memory_around(tensor):
    """The whole storage with the tensor's own elements blanked out."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).clone()
    whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
    return whole


def twins(kind, start, layout, backend, **options):
    """A dense parameter and one of this layout, each with its optimizer."""
    params = [make_param(start), make_param(layout(start.clone()))]
    return params, [build(True, kind, [p], backend=backend, **options) for p in params]


@every_kind
@parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(kind, dtype, layout, backend):
    """Strides pair elements by index, not by address, and memory between them is nobody's. A copy
    of one step is not taken for the gradient, or the parameter, of a later one."""
    (plain, laid_out), opts = twins(kind, randn(SHAPE, 1, dtype), LAYOUTS[layout], backend)
    around = memory_around(laid_out.detach())
    for step, grad_layout in enumerate([*LAYOUTS, None, "transposed", "with_gaps", "contiguous"]):
        plain.grad = laid_out.grad = None
        if grad_layout is not None:
            plain.grad = randn(SHAPE, 10 + step, dtype)
            laid_out.grad = LAYOUTS[grad_layout](plain.grad.clone())
            grad_around = memory_around(laid_out.grad)
        if step % 3 == 2:
            with torch.no_grad():
                for param in (plain, laid_out):
                    param[3:, 2:] += step
        for opt in opts:
            opt.step()
        if grad_layout is not None:
            assert torch.equal(plain.grad, laid_out.grad), grad_layout
            assert torch.equal(grad_around, memory_around(laid_out.grad)), grad_layout
        assert torch.equal(plain, laid_out), grad_layout
        assert torch.equal(around, memory_around(laid_out.detach())), grad_layout
    assert laid_out.detach()[3:, 2:].mean() > 5.0
    for name, value in opts[0].state[plain].items():
        mine = opts[1].state[laid_out][name]
        assert torch.equal(value, mine), name
        if name != "step" and layout in (
            "contiguous",
            "transposed",
            "channels_last",
            "at_odd_offset",
        ):
            assert mine.stride() == laid_out.stride(), name


@pytest.mark.parametrize("shape", [(5, 1, 4, 6), (1, 3, 1, 1), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("which", ["param", "grad", "both"])
def test_channels_last(shape, which, backend):
    form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d

    def laid_out(values, what):
        return values.contiguous(memory_format=form) if which in (what, "both") else values

    start = randn(shape, 1)
    (plain, other), opts = twins("adamw", start, lambda t: laid_out(t, "param"), backend)
    for step in range(2):
        plain.grad = randn(shape, 5 + step)
        other.grad = laid_out(plain.grad.clone(), "grad")
        for opt in opts:
            opt.step()
    assert torch.equal(plain, other)


@parametrize("dtype", FLOATS)
def test_gradient_dtype_that_changes_from_step_to_step(dtype, backend):
    (p, q), opts = twins("adamw", randn(SHAPE, 1, dtype), torch.Tensor.contiguous, backend)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    for step, grad_dtype in enumerate([torch.float32, *HALVES, torch.float32]):
        for layout in ("contiguous", "transposed"):
            p.grad = randn(SHAPE, 10 + step, grad_dtype)
            q.grad = LAYOUTS[layout](p.grad.clone())
            for opt in opts:
                opt.step()
            assert torch.equal(p, q)


@pytest.mark.parametrize("place, bad", [(0, float("nan")), (4643, float("inf")), (-1, -torch.inf)])
@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["with_gaps", "transposed", "transposed_gaps"])
def test_a_nonfinite_element_of_a_staged_gradient(layout, dtype, place, bad, backend):
    param = make_param(randn(SHAPE, 1, dtype))
    before = param.detach().clone()
    opt = build(True, "adamw", [param], backend=backend, skip_nonfinite=True)
    grad = randn(SHAPE, 2, dtype)
    grad.view(-1)[place] = bad
    param.grad = LAYOUTS[layout](grad)
    opt.step()
    assert opt.found_inf == 1 and opt.skipped_steps == 1
    assert torch.equal(param, before) and opt.state[param]["step"] == 0


# Many tensors, and empty ones


def test_thousands_of_tensors(backend):
    n = 3000 if backend == "cpu" else 300
    shapes = [(i % 23,) if i % 3 else (i % 5, i % 7) for i in range(n)]
    ours = [torch.nn.Parameter(torch.full(s, i / n)) for i, s in enumerate(shapes)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]

    def groups(params):
        return [{"params": params[i::3], "lr": 0.1 / (i + 1)} for i in range(3)]

    opt = build(True, "adamw", groups(ours), max_grad_norm=1.0, backend=backend)
    their_opt = build(False, "adamw", groups(theirs))
    for step in range(2):
        flat = randn(sum(p.numel() for p in ours), step)
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
    only_empty = [torch.nn.Parameter(torch.empty(0, 4))]
    for params in (with_empty, without, only_empty):
        opt = build(True, kind, params, backend=backend, max_grad_norm=0.5)
        for step in range(2):
            flat = randn(9005, step).split([5, 9000])
            for p in params:
                p.grad = flat[p.numel() > 5].clone() if p.numel() else torch.empty(p.shape)
            opt.step()
    assert torch.equal(with_empty[1], without[0]) and torch.equal(with_empty[3], without[1])
    assert (float(opt.grad_norm), float(opt.clip_coef)) == (0.0, 1.0)
