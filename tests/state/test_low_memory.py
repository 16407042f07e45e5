"""States of 16 and 8 bits, remainders and dithered params: what is kept, saved, loaded, refused."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from protocol_helpers import give_grads
from tolerances import assert_same_bits, same_bits

import fusedopt
from fusedopt.codecs import SCALE_BLOCK

SHAPES = ((70, 30), (129,), (), (4096,))
STATES = [None, "bf16", "8bit", {"exp_avg": "8bit", "exp_avg_sq": "bf16"}]
MASTERS = {
    torch.float32: [None],
    torch.float16: [None, False, "remainder"],
    torch.bfloat16: [None, False, "remainder", "remainder8", "dither"],
}
MODES = [
    (dtype, master, state)
    for dtype, masters in MASTERS.items()
    for master, state in itertools.product(masters, STATES)
]
every_mode = pytest.mark.parametrize(("dtype", "master", "state"), MODES, ids=str)
every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
AS_FP32 = {"master_param", "exp_avg", "exp_avg_sq", "step"}


def make(dtype=torch.float32, master=None, state=None, cls=fusedopt.FusedAdamW, **options):
    gen = torch.Generator().manual_seed(7)
    params = [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in SHAPES]
    params[0].data = params[0].data.t()  # dense, not row-major
    options = {"lr": 0.01, "max_grad_norm": 1.0, "min_8bit_size": 1} | options
    return params, cls(params, master_weights=master, state_dtype=state, **options)


def run(params, opt, steps):
    for step in steps:
        give_grads(params, step)
        opt.step()


def clones(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_same_state(one, two):
    (params, opt), (others, other) = one, two
    for i, (a, b) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(a.detach(), b.detach(), f"param {i}")
        assert opt.state[a].keys() == other.state[b].keys()
        for name, value in opt.state[a].items():
            assert_same_bits(value, other.state[b][name], f"{name} of param {i}")


# ---- what there is ------------------------------------------------------------------------------


@every_backend
@every_mode
def test_what_is_kept(backend, dtype, master, state):
    params, opt = make(dtype, master, state, backend=backend)
    run(params, opt, range(2))
    form_of = state if isinstance(state, dict) else dict.fromkeys(("exp_avg", "exp_avg_sq"), state)
    for p in params:
        own = dict(opt.state[p])
        assert own.pop("step") == 2
        for name, form in form_of.items():
            if form == "8bit":
                codes, scales = own.pop(f"{name}_log8"), own.pop(f"{name}_log8_scale")
                assert codes.dtype == scales.dtype == torch.uint8
                assert scales.shape == (-(-p.numel() // SCALE_BLOCK),)
            else:
                codes = own.pop(name)
                assert codes.dtype == (torch.bfloat16 if form == "bf16" else torch.float32)
            assert (codes.shape, codes.stride()) == (p.shape, p.stride())
        kept = {
            None: {"master_param": torch.float32},
            "remainder": {"master_remainder": torch.int16},
        }
        kept["remainder8"] = {"master_remainder": torch.int8}
        masters = kept.get(master, {}) if dtype != torch.float32 else {}
        assert {name: value.dtype for name, value in own.items()} == masters


@pytest.mark.parametrize(
    ("dtype", "master", "state", "expected"),
    [
        (torch.float32, None, None, 16),
        (torch.float32, None, "bf16", 12),
        (torch.float32, None, "8bit", 10 + 2 / 128),
        (torch.bfloat16, None, None, 16),
        (torch.bfloat16, "remainder", None, 14),
        (torch.bfloat16, "remainder", "bf16", 10),
        (torch.float16, "remainder", "8bit", 8 + 2 / 128),
        (torch.bfloat16, "remainder8", "8bit", 7 + 2 / 128),
        (torch.bfloat16, "dither", "8bit", 6 + 2 / 128),
    ],
    ids=str,
)
def test_bytes_a_parameter(cpu_backend, dtype, master, state, expected):
    n = 1 << 20
    param = torch.nn.Parameter(torch.ones(n, dtype=dtype))
    param.grad = torch.ones_like(param)
    opt = fusedopt.FusedAdamW([param], master_weights=master, state_dtype=state, backend="cpu")
    opt.step()
    sizes = opt.memory_footprint()
    assert (sizes["total"] - sizes["plan"]) / n == pytest.approx(expected, abs=1e-4)


def test_small_tensors_and_groups_keep_fp32(cpu_backend):
    small, large, third = (torch.nn.Parameter(torch.ones(n)) for n in (4095, 4096, 5000))
    groups = [{"params": [small, large]}, {"params": [third], "state_dtype": None}]
    opt = fusedopt.FusedAdamW(groups, state_dtype="8bit")
    run([small, large, third], opt, range(1))
    assert opt.state[small].keys() == opt.state[third].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert "exp_avg_log8" in opt.state[large]


@pytest.mark.parametrize(
    ("cls", "options", "name"),
    [
        (fusedopt.FusedSGD, {"momentum": 0.9}, "momentum_buffer"),
        (fusedopt.FusedLion, {}, "exp_avg"),
    ],
)
@every_backend
def test_other_rules(backend, cls, options, name):
    for state in ("bf16", "8bit"):
        params, opt = make(state=state, cls=cls, backend=backend, **options)
        others, other = make(cls=cls, backend=backend, **options)
        run(params, opt, range(5))
        run(others, other, range(5))
        assert (name if state == "bf16" else f"{name}_log8") in opt.state[params[0]]
        for p, q in zip(params, others, strict=True):
            # a sign of Lion's may turn: two steps of lr apart
            assert torch.allclose(p, q, rtol=0, atol=0.1 if cls is fusedopt.FusedLion else 0.05)


@every_backend
def test_a_dithered_param_of_plain_sgd_counts(backend):
    params, opt = make(torch.bfloat16, "dither", cls=fusedopt.FusedSGD, lr=1e-4, backend=backend)
    start = [p.detach().float().clone() for p in params]
    for _ in range(400):  # a rounded param would stand still
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert opt.state[params[0]].keys() == {"step"}
    norm = sum(p.numel() for p in params) ** 0.5
    moved = torch.cat([(s - p.float()).flatten() for s, p in zip(start, params, strict=True)])
    assert moved.mean().item() == pytest.approx(400 * 1e-4 / norm, rel=0.1)


# ---- a change of mind ----------------------------------------------------------------------------


@every_backend
def test_a_precision_changes_between_steps(backend):
    params, opt = make(state="8bit", backend=backend)
    run(params, opt, range(3))
    before = copy.deepcopy(opt.state[params[0]])
    opt.state_dtype = None
    opt.init_state()
    exported = fusedopt.to_torch({"state": {0: before}, "param_groups": []})["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(opt.state[params[0]][name], exported[name], name)
    assert opt.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    opt.param_groups[0]["state_dtype"] = "bf16"
    run(params, opt, range(3, 5))
    assert opt.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    assert opt.state[params[0]]["step"] == 5


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_master_and_a_remainder_become_each_other(backend, dtype):
    params, opt = make(dtype, None, backend=backend)
    run(params, opt, range(3))
    masters = [opt.state[p]["master_param"].clone() for p in params]
    shown = [p.detach().clone() for p in params]
    opt.master_weights = "remainder"
    opt.init_state()
    assert all("master_param" not in opt.state[p] for p in params)
    opt.master_weights = None
    opt.init_state()
    for p, master, before in zip(params, masters, shown, strict=True):
        assert torch.equal(p, before)  # a conversion moves no param
        kept = opt.state[p]["master_param"]
        small = master.abs() < 2.0**-16
        assert torch.equal(kept[~small], master[~small])
        assert (kept - master).abs().max() <= 2.0**-40


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_remainder_follows_a_write_to_the_param(backend, dtype):
    """A master that is not near its param any more is not turned into a remainder."""
    params, opt = make(dtype, None, backend=backend)
    run(params, opt, range(3))
    with torch.no_grad():
        params[0].copy_(torch.linspace(-3, 3, params[0].numel()).view(params[0].shape))
    opt.master_weights = "remainder"
    opt.init_state()
    rest = opt.state[params[0]]["master_remainder"]
    assert (rest == 0).float().mean() > 0.95  # elsewhere the value was near by chance
    assert opt.state[params[1]]["master_remainder"].count_nonzero() > 0


@every_backend
@pytest.mark.parametrize("master", ["remainder", "remainder8"])
def test_a_write_to_a_param_is_honoured(backend, master):
    params, opt = make(torch.bfloat16, master, backend=backend, lr=0.0)
    run(params, opt, range(2))
    written = torch.linspace(-3, 3, params[0].numel()).view(params[0].shape).bfloat16()
    with torch.no_grad():
        params[0].copy_(written)
    run(params, opt, range(2, 4))
    ulp = 2.0 ** (written.float().abs().log2().floor() - 7)
    assert ((params[0].float() - written.float()).abs() <= ulp).all()
    assert params[0].isfinite().all()


# ---- steps ---------------------------------------------------------------------------------------


@every_backend
@every_mode
def test_a_skipped_step_moves_no_byte(backend, dtype, master, state):
    params, opt = make(dtype, master, state, backend=backend, skip_nonfinite=True)
    run(params, opt, range(2))
    before = copy.deepcopy([(p.detach(), opt.state[p]) for p in params])
    give_grads(params, 2)
    params[1].grad[3] = float("inf")
    opt.step()
    assert opt.skipped_steps == 1
    for p, (value, own) in zip(params, before, strict=True):
        assert same_bits(p.detach(), value)
        for name, tensor in own.items():
            assert same_bits(opt.state[p][name], tensor), name


@every_backend
def test_freezing_thawing_and_odd_layouts(backend):
    """A frozen param keeps its bytes; gradients may be expanded or strided, lr a tensor."""
    params, opt = make(
        torch.bfloat16,
        "remainder",
        "8bit",
        backend=backend,
        lr=torch.tensor(0.01, dtype=torch.float64),
    )
    others, other = make(torch.bfloat16, "remainder", "8bit", backend=backend)
    for step in range(4):
        for one in (params, others):
            give_grads(one, step)
            one[1].grad = torch.full((), 0.5, dtype=torch.bfloat16).expand(129)
            one[3].grad = torch.full((4096,), 0.25, dtype=torch.bfloat16)
        params[3].grad = torch.full((8192,), 0.25, dtype=torch.bfloat16)[::2]
        if step == 2:
            params[0].grad = others[0].grad = None
            before = copy.deepcopy(opt.state[params[0]])
        opt.step()
        other.step()
        if step == 2:
            assert all(same_bits(opt.state[params[0]][k], v) for k, v in before.items())
    assert_same_state((params, opt), (others, other))


def test_a_param_with_gaps(cpu_backend):
    wide = torch.nn.Parameter(torch.randn(64, 130)[:, :65])
    dense = torch.nn.Parameter(wide.detach().clone(memory_format=torch.contiguous_format))
    pairs = []
    for p in (wide, dense):
        opt = fusedopt.FusedAdamW([p], state_dtype="8bit", min_8bit_size=1, backend="cpu")
        run([p], opt, range(3))
        pairs.append(([p], opt))
    assert_same_state(*pairs)


# ---- checkpoints ---------------------------------------------------------------------------------


@every_backend
@every_mode
def test_a_resumed_run_is_the_same_to_the_bit(backend, dtype, master, state):
    params, opt = make(dtype, master, state, backend=backend)
    run(params, opt, range(3))
    file = io.BytesIO()
    torch.save([opt.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    saved, values = torch.load(file)
    others, other = make(dtype, master, state, backend=backend)
    for p, value in zip(others, values, strict=True):
        p.data.copy_(value)
    other.load_state_dict(saved)
    assert_same_state((params, opt), (others, other))
    run(others, other, range(3, 6))
    run(params, opt, range(3, 6))
    assert_same_state((params, opt), (others, other))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_precision_loads_into_any_other(backend, dtype):
    """The loading optimizer's own precision decides; numbers keep what it has room for."""
    modes = [(m, s) for d, m, s in MODES if d == dtype]
    pairs = list(itertools.permutations(modes, 2))
    some = pairs if backend == "cpu" else pairs[:: max(1, len(pairs) // 20)]  # the same loader
    for (master, state), (other_master, other_state) in some:
        params, opt = make(dtype, master, state, backend=backend)
        run(params, opt, range(2))
        others = clones(params)
        other = fusedopt.FusedAdamW(
            others,
            lr=0.01,
            master_weights=other_master,
            state_dtype=other_state,
            min_8bit_size=1,
            backend=backend,
        )
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        saved = fusedopt.to_torch(opt.state_dict())["state"]
        loaded = fusedopt.to_torch(other.state_dict())["state"]
        for i in range(len(params)):
            for name in ("exp_avg", "exp_avg_sq"):
                x, y = saved[i][name].float(), loaded[i][name].float()
                # half a cell of twelve an octave, and for moments near zero of the block's largest
                slack = 2.0**-9 / 12 * 1.5 * x.abs().max() if name == "exp_avg" else 1e-6 * x.max()
                assert ((x - y).abs() <= 0.043 * x.abs() + slack).all(), (name, other_state)
        run(others, other, range(2, 3))
        expected, _ = make(dtype, other_master, other_state, backend=backend)
        fresh = fusedopt.FusedAdamW(
            expected,
            master_weights=other_master,
            state_dtype=other_state,
            min_8bit_size=1,
            backend=backend,
        )
        fresh.init_state()
        assert other.state[others[0]].keys() == fresh.state[expected[0]].keys()


@every_backend
def test_a_failed_load_changes_nothing(backend):
    params, opt = make(state="8bit", backend=backend)
    run(params, opt, range(2))
    before = copy.deepcopy([opt.state[p] for p in params])
    for break_it, match in (
        (lambda own: own.pop("exp_avg_log8_scale"), "'exp_avg_log8_scale' is None"),
        (
            lambda own: own.update(exp_avg_log8_scale=torch.ones(3, dtype=torch.uint8)),
            r"shape \(3,\)",
        ),
        (lambda own: own.update(exp_avg_log8=own.pop("exp_avg_log8").float()), "lacks 'exp_avg'"),
        (lambda own: own.update(exp_avg_log4=own.pop("exp_avg_log8")), "'exp_avg_log4'"),
    ):
        saved = copy.deepcopy(opt.state_dict())
        break_it(saved["state"][0])
        with pytest.raises((KeyError, RuntimeError, TypeError), match=match):
            opt.load_state_dict(saved)
        for p, own in zip(params, before, strict=True):
            assert all(same_bits(opt.state[p][name], value) for name, value in own.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_through_torch_and_back(cpu_backend, dtype):
    """torch loads what `to_torch` gives, and an untouched checkpoint comes back with its codes."""
    params, opt = make(dtype, state="8bit")
    run(params, opt, range(20))
    exported = fusedopt.to_torch(opt.state_dict())
    theirs = torch.optim.AdamW(clones(params))
    theirs.load_state_dict(copy.deepcopy(exported))
    others, other = make(dtype, state="8bit")
    through = theirs.state_dict() if dtype == torch.float32 else exported
    other.load_state_dict(copy.deepcopy(through))
    for p, q in zip(params, others, strict=True):
        for name, value in opt.state[p].items():
            if "log8" in name:
                assert_same_bits(other.state[q][name], value, name)
    for p in theirs.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    theirs.step()
    other.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert other.state[others[0]]["step"] == 21


@every_backend
def test_copies_and_pickles(backend):
    params, opt = make(torch.bfloat16, "remainder8", "8bit", backend=backend)
    run(params, opt, range(2))
    for others, other in (copy.deepcopy((params, opt)), pickle.loads(pickle.dumps((params, opt)))):
        assert other.state_dtype == "8bit" and other.master_weights == "remainder8"
        mine = copy.deepcopy((params, opt))
        run(*mine, range(2, 4))
        run(others, other, range(2, 4))
        assert_same_state(mine, (others, other))


def relaid(value):
    return value.detach().clone(memory_format=torch.contiguous_format)


@every_backend
@pytest.mark.parametrize("other_state", ["8bit", None, "bf16"])
@pytest.mark.parametrize("by", ["loading", "between two steps"])
def test_another_memory_layout_keeps_the_numbers(backend, other_state, by):
    """Blocks are runs of memory: codes that move apart take their scales with them."""
    values = torch.randn(16, 16, 4, 4).to(memory_format=torch.channels_last)
    sizes = torch.logspace(-4, 0, values.numel()).view(values.shape)
    param = torch.nn.Parameter(values)
    opt = fusedopt.FusedAdamW([param], state_dtype="8bit", min_8bit_size=1, backend=backend)
    param.grad = (torch.randn(values.shape) * sizes).to(memory_format=torch.channels_last)
    opt.step()
    wanted = fusedopt.to_torch(opt.state_dict())["state"][0]
    if by == "loading":
        param, saved = torch.nn.Parameter(relaid(param)), copy.deepcopy(opt.state_dict())
        opt = fusedopt.FusedAdamW(
            [param], state_dtype=other_state, min_8bit_size=1, backend=backend
        )
        opt.load_state_dict(saved)
    else:
        param.data, param.grad = relaid(param), None
        opt.state_dtype = other_state
        opt.init_state()
    found = fusedopt.to_torch(opt.state_dict())["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        assert found[name].is_contiguous()
        error = (found[name] - wanted[name]).abs() / wanted[name].abs().clamp(min=1e-30)
        in_cells = wanted[name].abs() > wanted[name].abs().max() * 1e-2
        assert error[in_cells].max() <= 1 / 24 + 2.0**-9, name  # half of the widest cell


# ---- what is refused -----------------------------------------------------------------------------

FP32, HALF, DOUBLE = ([torch.nn.Parameter(torch.ones(3, dtype=d))] for d in (
    torch.float32, torch.float16, torch.float64
))  # fmt: skip


@pytest.mark.parametrize(
    ("params", "options", "match"),
    [
        (FP32, {"state_dtype": "fp8"}, "Invalid state_dtype value: 'fp8'; use None for fp32"),
        (FP32, {"state_dtype": {"exp_avg": "9bit"}}, "Invalid state_dtype value"),
        (FP32, {"state_dtype": {"momentum": "8bit"}}, "the states are exp_avg, exp_avg_sq"),
        (FP32, {"min_8bit_size": -1}, "Invalid min_8bit_size value: -1"),
        (FP32, {"master_weights": "remainder"}, "no parameter is fp16 or bf16"),
        (FP32, {"master_weights": "half"}, "Invalid master_weights value: 'half'"),
        (HALF, {"master_weights": "remainder8"}, "some parameters are fp16; use 'remainder'"),
        (HALF, {"master_weights": "dither"}, "some parameters are fp16; use 'remainder'"),
        (DOUBLE, {"state_dtype": "8bit"}, "some parameters are float64"),
        (FP32, {"state_dtype": "8bit", "amsgrad": True}, "with amsgrad=True"),
    ],
)  # fmt: skip
def test_what_is_refused(params, options, match):
    with pytest.raises(ValueError, match=match):
        fusedopt.FusedAdamW(params, **options)


def test_a_group_is_refused_by_name():
    with pytest.raises(ValueError, match="Invalid state_dtype value: '7bit'"):
        fusedopt.FusedAdamW([{"params": FP32, "state_dtype": "7bit"}])
    opt = fusedopt.FusedAdamW(FP32)
    with pytest.raises(ValueError, match="Invalid state_dtype value: '7bit'"):
        opt.add_param_group({"params": HALF, "state_dtype": "7bit"})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["state_dtype"] = "7bit"
    FP32[0].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="Invalid state_dtype value: '7bit'"):
        opt.step()
    assert torch.equal(FP32[0].detach(), torch.ones(3))
    opt.param_groups[0].update(state_dtype="8bit", amsgrad=True)
    with pytest.raises(RuntimeError, match="with amsgrad=True"):
        opt.step()


@every_backend
@pytest.mark.parametrize("master", ["remainder8", "dither"])
def test_a_param_that_became_fp16_is_refused(backend, master):
    params, opt = make(torch.bfloat16, master, backend=backend)
    run(params, opt, range(1))
    params[1].grad = None
    params[1].data = params[1].data.half()
    params[1].grad = torch.ones_like(params[1])
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="param 1 of group 0 is fp16"):
        opt.step()
    assert torch.equal(params[0], before)
    opt.master_weights = "remainder"
    opt.step()
    assert params[1].isfinite().all()


def test_an_assignment_is_checked_as_the_constructor_does():
    opt = fusedopt.FusedAdamW([torch.nn.Parameter(torch.ones(3))])
    for name, value in (
        ("state_dtype", {"nope": "8bit"}),
        ("master_weights", "dither"),
        ("min_8bit_size", -1),
    ):
        before = getattr(opt, name)
        with pytest.raises(ValueError, match=f"Invalid {name} value"):
            setattr(opt, name, value)
        assert getattr(opt, name) == before


def test_scales_do_not_stay_beside_fp32(cpu_backend):
    params, opt = make(state="8bit")
    run(params, opt, range(2))
    _, other = make()
    other.load_state_dict(fusedopt.to_torch(opt.state_dict()))
    for own in other.state.values():
        assert own.keys() == {"step", "exp_avg", "exp_avg_sq"}
