"""The plan: layouts that need staging, when it is rebuilt, and what its tables hold."""

import gc
import struct

import pytest
import torch

import fusedopt

OPTIMIZERS = {
    "adamw": (fusedopt.FusedAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}, {}),
    "sgd": (
        fusedopt.FusedSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"decoupled_weight_decay": False},
    ),
}
every_kind = pytest.mark.parametrize("kind", OPTIMIZERS)
HALF = [torch.float16, torch.bfloat16]


def build(kind, params, **options):
    cls, _, kwargs, extra = OPTIMIZERS[kind]
    return cls(params, **{**kwargs, **extra, **options})


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def give_grads(params, step):
    for i, p in enumerate(params):
        p.grad = randn(p.shape, 1000 * step + i).to(p.dtype)


# Layouts. Each makes, of a dense row-major tensor, one with the same values laid out otherwise.


def transposed(t):
    return t.t().contiguous().t()


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


# When the plan is rebuilt


def fresh(backend, **options):
    params = [torch.nn.Parameter(randn(s, i)) for i, s in enumerate([(5, 3), (40,), ()])]
    opt = build("sgd", params, backend=backend, **options)
    for step in range(2):
        give_grads(params, step)
        opt.step()
    return params, opt


def new_gradients(params, opt):
    give_grads(params, 5)


def none_gradient(params, opt):
    params[1].grad = None


def zero_grad(params, opt):
    opt.zero_grad()
    give_grads(params, 6)


def other_layout(params, opt):
    params[0].grad = transposed(params[0].grad)


def hyper_parameters(params, opt):
    opt.param_groups[0].update(lr=0.3, weight_decay=0.0, momentum=0.5, maximize=True, nesterov=True)


def options(params, opt):
    opt.max_grad_norm, opt.skip_nonfinite, opt.max_grad_value = 0.5, True, 0.1


def in_place_writes(params, opt):
    with torch.no_grad():
        params[0].mul_(2.0)
        opt.state[params[0]]["momentum_buffer"].zero_()
        opt.state[params[0]]["step"].fill_(7.0)


def save(params, opt):
    opt.state_dict()
    opt.memory_footprint()
    repr(opt)


def skipped_step(params, opt):
    opt.skip_nonfinite = True
    params[0].grad[0, 0] = float("inf")


def scheduler(params, opt):
    torch.optim.lr_scheduler.ExponentialLR(opt, 0.5).step()


KEEP = [new_gradients, none_gradient, zero_grad, other_layout, hyper_parameters, options]
KEEP += [in_place_writes, save, skipped_step, scheduler]


@pytest.mark.parametrize("change", KEEP, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_plan_is_kept(change, backend):
    params, opt = fresh(backend)
    plan = opt._plan
    for _ in range(3):
        change(params, opt)
        opt.step()
    assert opt._plan is plan


def new_data(params, opt):
    params[1].data = torch.ones(40)


def new_dtype(params, opt):
    params[1].data = params[1].data.half()
    params[1].grad = None
    give_grads(params, 5)


def new_strides(params, opt):
    params[0].data = transposed(params[0].data)


def new_param(params, opt):
    opt.param_groups[0]["params"][1] = torch.nn.Parameter(torch.ones(4))


def fewer_params(params, opt):
    opt.param_groups[0]["params"].pop()


def other_order(params, opt):
    opt.param_groups[0]["params"].reverse()


def new_group(params, opt):
    opt.add_param_group({"params": torch.nn.Parameter(torch.ones(4))})


def new_state_tensor(params, opt):
    opt.state[params[1]]["momentum_buffer"] = torch.ones(40)


def new_state_data(params, opt):
    opt.state[params[1]]["momentum_buffer"].data = torch.ones(40)


def new_step(params, opt):
    opt.state[params[1]]["step"] = torch.tensor(9.0)


def no_state(params, opt):
    opt.state.clear()


def loaded(params, opt):
    opt.load_state_dict(opt.state_dict())


def no_momentum(params, opt):
    opt.param_groups[0]["momentum"] = 0


REBUILD = [new_data, new_dtype, new_strides, new_param, fewer_params, other_order, new_group]
REBUILD += [new_state_tensor, new_state_data, new_step, no_state, loaded, no_momentum]


@pytest.mark.parametrize("change", REBUILD, ids=lambda f: f.__name__)
def test_plan_is_rebuilt_once(change, backend):
    params, opt = fresh(backend)
    plan = opt._plan
    change(params, opt)
    opt.step()
    rebuilt = opt._plan
    assert rebuilt is not plan
    opt.step()
    assert opt._plan is rebuilt


def test_first_gradient_of_a_param_rebuilds_the_plan_once(backend):
    params = [torch.nn.Parameter(randn((n,), n)) for n in (3, 4)]
    opt = build("sgd", params, backend=backend)
    plans = []
    for step in range(6):
        give_grads(params, step)
        if step < 2:
            params[1].grad = None
        opt.step()
        plans.append(opt._plan)
    assert plans[0] is plans[1] is not plans[2]
    assert all(plan is plans[2] for plan in plans[2:])


def test_freed_gradients_are_not_read(backend):
    """A raw address is only as good as the tensor behind it."""
    params = [torch.nn.Parameter(randn((50_000,), n)) for n in range(4)]
    opt = build("sgd", params, backend=backend, max_grad_norm=1.0)
    give_grads(params, 0)
    opt.step()
    before = [p.detach().clone() for p in params]
    opt.zero_grad()
    gc.collect()
    garbage = [torch.full((50_000,), float("nan")) for _ in range(8)]
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert len(garbage) == 8


def test_dropped_optimizer_frees_everything(backend):
    """No cycle keeps the states of a dropped optimizer alive."""
    import weakref

    gc.collect()
    params, opt = fresh(backend)
    alive = [weakref.ref(opt.state[p]["momentum_buffer"]) for p in params]
    plan = weakref.ref(opt._plan)
    del opt
    gc.collect()
    assert plan() is None and all(ref() is None for ref in alive)
    assert all(p.isfinite().all() for p in params)


# The tables of the CPU backend


def test_table_sizes_are_those_of_the_native_module(cpu_backend):
    from fusedopt import _cpu
    from fusedopt.backends import native

    # param, master, state[3], step; numel; group, dtype
    assert struct.calcsize("=6Qqii") == native.ROW.size == _cpu.ROW_BYTES
    # data; dtype, present
    assert struct.calcsize("=Qii") == native.GRAD.size == _cpu.GRAD_BYTES
    # row, index; position
    assert struct.calcsize("=iiq") == _cpu.CHUNK_BYTES
    assert native.CHUNK_ELEMENTS == _cpu.CHUNK_ELEMENTS == 8192
    assert _cpu.LANES == 256


@pytest.mark.parametrize(
    "numels", [[1], [8192], [8193], [0], [5, 0, 8191, 20000], [3] * 50, [16384, 1]], ids=str
)
def test_chunk_table(cpu_backend, numels):
    from fusedopt.backends.native import chunk_table

    expected, position = [], 0
    for row, numel in enumerate(numels):
        for index in range(-(-numel // 8192)):
            expected.append((row, index, position + index * 8192))
        position += numel
    packed = b"".join(struct.pack("=iiq", *chunk) for chunk in expected)
    table = chunk_table(numels)
    assert bytes(table.contiguous().view(torch.uint8).flatten().tolist()) == packed


def test_rows_hold_the_addresses_of_the_tensors(cpu_backend):
    from fusedopt.backends.native import GRAD, ROW

    dtypes = {3: torch.float16, 0: torch.bfloat16, 90: torch.float32, 4: torch.float32}
    params = [torch.nn.Parameter(randn((n,), n).to(d)) for n, d in dtypes.items()]
    opt = fusedopt.FusedAdamW(
        [{"params": params[:2]}, {"params": params[2:], "amsgrad": True}], backend="cpu"
    )
    give_grads(params, 0)
    opt.step()
    params[3].grad = None
    opt.step()
    plan = opt._plan
    rows = list(ROW.iter_unpack(bytes(plan._rows.tolist())))
    grads = list(GRAD.iter_unpack(bytes(plan._grad_bytes)))
    codes = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for i, (p, row, grad) in enumerate(zip(params, rows, grads, strict=True)):
        state = opt.state[p]
        address = [state[n].data_ptr() if n in state else 0 for n in names]
        master = state["master_param"].data_ptr() if "master_param" in state else 0
        expected = (p.data_ptr(), master, *address, state["step"].data_ptr())
        assert row == (*expected, p.numel(), i // 2, codes[p.dtype])
        if p.grad is None:
            assert grad[2] == 0
        elif p.numel():
            assert grad == (p.grad.data_ptr(), codes[p.grad.dtype], 1)


def test_options_table_fits_the_rules(cpu_backend):
    """One line per group; the native side checks its length."""
    for kind in OPTIMIZERS:
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        opt = build(kind, [{"params": [p]} for p in params], backend="cpu")
        give_grads(params, 0)
        opt.step()
        assert len(opt._options_table) == 3 * 64
