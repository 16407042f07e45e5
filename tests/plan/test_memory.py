"""Where memory goes: all of it before the second step, none of it during."""

import gc
import mmap
import sys
import textwrap
import tracemalloc
from itertools import pairwise

import pytest
import torch
from children import in_a_child
from torch.profiler import ProfilerActivity, profile

import fusedopt

OPTIMIZERS = {
    "adamw": (fusedopt.FusedAdamW, {"weight_decay": 0.1}),
    "amsgrad": (fusedopt.FusedAdamW, {"amsgrad": True}),
    "sgd": (fusedopt.FusedSGD, {"momentum": 0.9}),
    "plain-sgd": (fusedopt.FusedSGD, {}),
}
every_kind = pytest.mark.parametrize("kind", OPTIMIZERS)
SHAPES = [(100, 100), (10_000,), (7,), (), (300, 33)]
NUMEL = sum(torch.Size(s).numel() for s in SHAPES)


def make(kind="adamw", dtype=torch.float32, **options):
    cls, kwargs = OPTIMIZERS[kind]
    params = [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in SHAPES]
    return params, cls(params, lr=0.01, **{**kwargs, **options})


def give_grads(params, value=0.5):
    for p in params:
        p.grad = torch.full_like(p, value)


def allocated(call):
    """Bytes of every tensor allocation while `call` runs, freed again or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in events if e.nbytes() > 0]


def addresses_of(params, opt):
    """Of each parameter's states, by name."""
    entries = [(i, opt.state.get(p, {})) for i, p in enumerate(params)]
    return {(i, k): (id(v), v.data_ptr()) for i, own in entries for k, v in own.items()}


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "max_grad_value": 0.5}], ids=str)
@pytest.mark.parametrize("begin", ["step", "init_state"])
def test_no_allocation_after_the_beginning(kind, dtype, options, begin, cpu_backend):
    assert sum(allocated(lambda: torch.ones(1000))) >= 4000  # the profiler is able to tell
    params, opt = make(kind, dtype, backend="cpu", **options)
    if begin == "step":
        give_grads(params)
    getattr(opt, begin)()
    before = addresses_of(params, opt)
    assert bool(before) == (kind != "plain-sgd" or dtype != torch.float32)
    for value in (0.25, 0.125):
        give_grads(params, value)
        assert allocated(opt.step) == []
    assert addresses_of(params, opt) == before
    steps = 3 if begin == "step" else 2
    assert all(opt.state[params[i]]["step"] == steps for i, name in before if name == "step")


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fusedopt.GradScaler])
def test_no_allocation_under_a_scaler(scaler_class, cpu_backend, monkeypatch):
    """The scaler itself makes a few scalars; the step adds nothing."""
    # and what counts around it
    monkeypatch.setattr(fusedopt.scaler.attributes, "_runs_our_step", lambda _: True)
    params, opt = make(backend="cpu", max_grad_norm=1.0, amp_scaling=True)
    scaler = scaler_class("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    inner = []
    for value in (4.0, float("inf"), 2.0, 2.0):
        give_grads(params, value)
        real = type(opt).step

        def step(*args, real=real):
            inner.append(allocated(lambda: real(opt, *args)))

        opt.step = step
        scaler.step(opt)
        del opt.step
        scaler.update()
    assert inner[1:] == [[], [], []]


def test_no_allocation_where_gradients_are_staged(cpu_backend):
    """The buffers stay; what is left is the scratch of torch's transposing copy, 60 x 60 floats."""
    params, opt = make(backend="cpu", max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones(p.shape[::-1]).t() if p.dim() == 2 else torch.ones(p.shape)
    opt.step()
    assert max(allocated(opt.step), default=0) <= 60 * 60 * 4


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_init_state_moves_nothing(kind, dtype, backend):
    params, opt = make(kind, dtype, backend=backend)
    opt.init_state()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
    for p in params:
        for name, value in opt.state[p].items():
            expected = torch.ones_like(value) if name == "master_param" else torch.zeros_like(value)
            assert torch.equal(value, expected)
    opt.init_state()  # again: nothing to do
    (twin, twin_opt) = make(kind, dtype, backend=backend)
    for group, o in ((params, opt), (twin, twin_opt)):
        give_grads(group)
        o.step()
        o.init_state()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twin, strict=True))


def large_pair():
    """A transposed and a plain parameter whose states are 4 MiB each, and their optimizer."""
    params = [torch.nn.Parameter(torch.ones(1024, 1024).t()), torch.nn.Parameter(torch.ones(2**20))]
    give_grads(params)
    return params, fusedopt.FusedAdamW(params, lr=0.01)


@pytest.mark.parametrize("madvise", [None, lambda *args: -1], ids=["absent", "refused"])
def test_state_without_huge_pages(madvise, monkeypatch, cpu_backend):
    """Where the system has none, smaller pages serve, with the same bits."""
    twin, twin_opt = large_pair()
    twin_opt.step()
    monkeypatch.setattr("fusedopt.plan.memory._madvise", lambda: madvise)
    params, opt = large_pair()
    opt.init_state()
    assert [opt.state[p]["exp_avg"].stride() for p in params] == [p.stride() for p in params]
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twin, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages of Linux")
def test_huge_pages_are_asked_for_before_memory_is_touched(monkeypatch, cpu_backend):
    """For every page of a state, before, and once more for those that the allocator had touched."""
    asked = []
    monkeypatch.setattr("fusedopt.plan.memory._madvise", lambda: lambda *args: asked.append(args))
    params, opt = large_pair()
    opt.init_state()
    states = [v for p in params for k, v in opt.state[p].items() if k != "step"]
    before = [(start, start + n) for start, n, advice in asked if advice == mmap.MADV_HUGEPAGE]
    after = [(start, start + n) for start, n, advice in asked if advice != mmap.MADV_HUGEPAGE]
    assert [each[2] for each in asked[: len(before)]] == [mmap.MADV_HUGEPAGE] * len(before)
    for state in states:
        start, end = state.data_ptr(), state.data_ptr() + state.nbytes
        (around,) = [run for run in before if run[0] <= start and end <= run[1]]
        assert all(edge % mmap.PAGESIZE == 0 for edge in around)
    for start, end in after:
        assert start % 2**21 == end % 2**21 == 0
        assert any(run[0] <= start < end <= run[1] for run in before)
    assert sum(end - start for start, end in after) >= 4 * 2**21


def test_running_out_of_memory_is_a_runtime_error(monkeypatch, cpu_backend):
    """As in torch, which is what handlers of it catch; the next attempt finds all as it was."""

    def no_memory(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    params, opt = large_pair()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "resize_", no_memory)
        for call in (opt.init_state, opt.step):
            with pytest.raises(RuntimeError, match="not enough memory"):
                call()
            assert not opt.state and all(torch.equal(p, torch.ones_like(p)) for p in params)
    opt.step()
    assert all(float(opt.state[p]["step"]) == 1 for p in params)


STATES = {"adamw": 2, "amsgrad": 3, "sgd": 1, "plain-sgd": 0}


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("master_weights", [None, False])
@pytest.mark.filterwarnings("ignore::fusedopt.FusedOptFallbackWarning")
def test_memory_footprint_is_exact(kind, dtype, master_weights):
    params, opt = make(kind, dtype, master_weights=master_weights)
    size = dtype.itemsize
    before = opt.memory_footprint()
    assert (before["param"], before["grad"], before["total"]) == (
        NUMEL * size,
        0,
        sum(v for k, v in before.items() if k != "total"),
    )
    give_grads(params)
    opt.step()
    sizes = opt.memory_footprint()
    wide = 8 if dtype == torch.float64 else 4
    names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    names = ["momentum_buffer"] if "sgd" in kind else names
    expected = {"param": NUMEL * size, "grad": NUMEL * size}
    expected |= dict.fromkeys(names[: STATES[kind]], NUMEL * wide)
    if STATES[kind]:
        expected["step"] = 4 * len(SHAPES)
    if dtype == torch.float16 and master_weights is None:
        expected["master_param"] = NUMEL * 4
    plan = sizes.pop("plan")
    total = sizes.pop("total")
    assert sizes == expected
    assert total == sum(expected.values()) + plan
    assert all(type(v) is int for v in (*sizes.values(), plan, total))
    assert 0 <= plan < 4096 + 256 * len(SHAPES)


def test_memory_footprint_counts_staging(cpu_backend):
    params, opt = make(backend="cpu")
    give_grads(params)
    opt.step()
    plain = opt.memory_footprint()["plan"]
    params[0].grad = torch.ones(100, 100).t()
    opt.step()
    assert opt.memory_footprint()["plan"] - plain == 4 * 100 * 100


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_python_objects_do_not_pile_up(kind, cpu_backend):
    """Free lists fill up for a while; a leak of one small object a step is in every stretch."""
    params, opt = make(kind, backend="cpu", max_grad_norm=1.0)
    give_grads(params)

    def steps(n):
        for _ in range(n):
            opt.step()
            _ = (opt.grad_norm, opt.clip_coef, opt.found_inf, opt.skipped_steps)

    tracemalloc.start()
    try:
        steps(100)
        found = []
        for _ in range(4):
            gc.collect()
            found.append((tracemalloc.get_traced_memory()[0], len(gc.get_objects())))
            steps(300)
    finally:
        tracemalloc.stop()
    n_bytes, objects = (
        min(after - before for before, after in pairwise(each)) for each in zip(*found, strict=True)
    )
    assert n_bytes < 300 * 32
    assert objects < 50


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_no_reference_cycle_is_left_by_a_step(kind, backend):
    """The collector has nothing to find, so memory falls when the last name does."""
    params, opt = make(kind, backend=backend, max_grad_norm=1.0)
    give_grads(params)
    opt.step()
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            opt.step()
        assert gc.collect() == 0
    finally:
        gc.enable()


# In a process of its own: what the operating system sees

PEAK = """
    import gc, torch, fusedopt
    torch.set_num_threads(2)

    def status(field):
        with open("/proc/self/status") as lines:
            return next(int(l.split()[1]) for l in lines if l.startswith(field)) * 1024

    def peak_and_growth(call):
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        before = status("VmRSS")
        call()
        return status("VmHWM") - before, status("VmRSS") - before

    def measure(name, make, dtype, numel, steps):
        params = [torch.nn.Parameter(torch.ones(numel // 20, dtype=dtype)) for _ in range(20)]
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        opt = make(params)
        for _ in range(2):
            opt.step()
        gc.collect()
        n_bytes = sum(p.numel() * p.element_size() for p in params)
        peak = min(peak_and_growth(opt.step)[0] for _ in range(3))
        many = lambda: [opt.step() for _ in range(steps)]
        print(name, n_bytes, peak, min(peak_and_growth(many)[1] for _ in range(2)))

    def adamw(params):
        return fusedopt.FusedAdamW(params, max_grad_norm=1.0, backend="cpu")

    def sgd(params):
        return fusedopt.FusedSGD(params, momentum=0.9, max_grad_norm=1.0, backend="cpu")

    def stock(params):
        return torch.optim.AdamW(params, foreach=True)

    measure("adamw-fp32", adamw, torch.float32, 10_000_000, 4)
    measure("adamw-bf16", adamw, torch.bfloat16, 20_000_000, 4)
    measure("sgd-fp32", sgd, torch.float32, 10_000_000, 4)
    measure("torch", stock, torch.float32, 2_000_000, 1)
    measure("small", adamw, torch.bfloat16, 20_000, 1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_extra_memory_of_a_step(cpu_backend, tmp_path):
    """Under 0.1 % of the parameters' bytes, and nothing stays over many steps."""
    # What is freed goes back to the system at once, or a peak might lie where an earlier one was.
    done = in_a_child(textwrap.dedent(PEAK), tmp_path, MALLOC_MMAP_THRESHOLD_="65536")
    if "PermissionError" in done.stderr:
        pytest.skip("/proc/self/clear_refs is not writable here")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    measured = {name: tuple(map(int, values)) for name, *values in lines}
    for case in ("adamw-fp32", "adamw-bf16", "sgd-fp32"):
        n_bytes, peak, growth = measured[case]
        assert n_bytes == 40_000_000
        assert peak < n_bytes / 1000, case
        assert growth < n_bytes / 1000, case
    n_bytes, peak, _ = measured["torch"]
    assert peak > n_bytes / 10, "foreach needs a copy of the parameters, which was not seen"
    _, _, growth = measured["small"]
    assert growth < 1000 * 64, "some hundred bytes a step"
