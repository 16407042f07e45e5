"""What is set for a whole process or thread: default dtype and device, modes, torch.compile."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from protocol_helpers import (
    SCALERS,
    build,
    every_kind,
    fallback_is_expected,
    give_grads,
    make_params,
    make_scaler,
    on_every_backend,
    step_all,
    twins,
)
from torch.optim import lr_scheduler

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# Defaults


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_changes_nothing(kind, dtype):
    starts = [p.detach().clone() for p in make_params()]
    grads = []
    for step in range(4):
        give_grads(holders := make_params(), step)
        grads.append([p.grad for p in holders])
    grads[1][0][0, 0] = float("inf")

    def train():
        params = [torch.nn.Parameter(v.clone()) for v in starts]
        opt = build(True, kind, params, max_grad_norm=0.5, skip_nonfinite=True)
        seen = [opt.clip_coef, opt.found_inf, opt.skipped_steps]
        # or the kernels would write fp32 into memory made for something narrower
        assert [v.dtype for v in seen] == [torch.float32, torch.float32, torch.int64]
        opt.init_state()
        for step in range(4):
            if step == 3:
                opt.max_grad_norm, opt.skip_nonfinite = None, False
            for p, g in zip(params, grads[step], strict=True):
                p.grad = g.clone()
            opt.step()
            seen += [opt.grad_norm, opt.clip_coef, opt.found_inf, opt.skipped_steps]
        return [*params, *(v for p in params for v in opt.state[p].values()), *seen]

    expected = train()
    torch.set_default_dtype(dtype)
    try:
        results = train()
    finally:
        torch.set_default_dtype(torch.float32)
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        if a is not None and b is not None:
            assert a.dtype == b.dtype, i
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a is b


@every_kind
@pytest.mark.parametrize("when", ["construction", "first-step", "later-step", "all"])
def test_default_device_changes_nothing(kind, when):
    """The default device is where new tensors go; a step on CPU parameters has none to put there.

    "meta" stands in for the "cuda" of torch.set_default_device, whose memory the CPU cannot read.
    """
    params, plain = make_params(), make_params()
    plain_opt = build(True, kind, plain, max_grad_norm=0.5)

    def under(moment):
        return torch.device("meta" if when in (moment, "all") else "cpu")

    with under("construction"):
        opt = build(True, kind, params, max_grad_norm=0.5)
    for step in range(3):
        give_grads(params, step)
        give_grads(plain, step)
        with under("later-step" if step else "first-step"):
            opt.step()
        plain_opt.step()
        assert torch.equal(opt.grad_norm, plain_opt.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


# Modes


@every_kind
@pytest.mark.parametrize("mode", ["no_grad", "inference", "autocast"])
def test_stepped_under_another_mode(kind, mode):
    modes = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    params, plain = make_params(), make_params()
    opts = [build(True, kind, p, max_grad_norm=0.5) for p in (params, plain)]
    for step in range(3):
        for p in (params, plain):
            give_grads(p, step)
        with modes[mode]():
            opts[0].step()
        opts[1].step()
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


@every_kind
def test_swapped_module_parameters(kind):
    """torch's other way of converting a module: the tensors behind the parameters are swapped."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = torch.nn.Linear(9, 5)
        params = list(model.parameters())
        opt = build(True, kind, params)
        step_all([(params, opt)], 0)
        model.to(torch.bfloat16)
        assert model.weight is params[0] and params[0].dtype == torch.bfloat16
        before = [p.detach().clone() for p in params]
        step_all([(params, opt)], 1)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, opt.state[p]["master_param"].bfloat16())
        assert not torch.equal(p, old)
        assert float(opt.state[p]["step"]) == 2


# torch.compile


@every_kind
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compiled_function_with_a_step(kind, compiler):
    torch._dynamo.reset()
    (params, opt), (plain, plain_opt) = twins(kind)[0], twins(kind)[0]

    @torch.compile(backend=compiler)
    def compiled():
        opt.step()
        opt.zero_grad(set_to_none=False)

    for step in range(4):
        give_grads(params, step)
        compiled()
        step_all([(plain, plain_opt)], step)
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
    assert not params[0].grad.any()
    assert float(opt.state[params[0]]["step"]) == 4


@every_kind
def test_compiled_training_step(kind):
    torch._dynamo.reset()
    results = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        opt = build(True, kind, list(model.parameters()), max_grad_norm=0.1)
        scheduler = lr_scheduler.LinearLR(opt, 0.1, 1.0, 5)

        def train(x, model=model, opt=opt):
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        run = torch.compile(train, backend="eager") if compile_it else train
        gen = torch.Generator().manual_seed(1)
        for _ in range(6):
            run(torch.randn(16, 4, generator=gen))
            scheduler.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("scaler_name", SCALERS)
@every_kind
def test_compiled_function_with_a_scaler(kind, scaler_name, options):
    """An overflow in a compiled step is skipped and the scale backs off, as without compiling."""
    torch._dynamo.reset()
    results = []
    for compile_it in (False, True):
        params = make_params()
        opt = build(True, kind, params, amp_scaling=True, **options)
        scaler = make_scaler(scaler_name)

        def step(opt=opt, scaler=scaler):
            scaler.step(opt)
            scaler.update()

        run = torch.compile(step, backend="eager") if compile_it else step
        scales = []
        for i, bad in enumerate((None, float("inf"), None, float("nan"), None)):
            give_grads(params, i, scaler.get_scale(), bad)
            run()
            scales.append(scaler.get_scale())
        assert len(set(scales)) == 3 and opt.skipped_steps == 2
        results.append((scales, params))
    (scales, params), (scales_compiled, params_compiled) = results
    assert scales == scales_compiled
    assert all(torch.equal(a, b) for a, b in zip(params, params_compiled, strict=True))


@pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="2.11's Dynamo raises where any attribute of an optimizer is set, torch's own, too",
)
@every_kind
def test_what_a_compiled_function_sets(kind):
    """The optimizer itself, its options and the scaler's attributes: all written, not traced."""
    torch._dynamo.reset()
    results = []
    for compile_it in (False, True):
        params = make_params()
        give_grads(params, 0, scale=8.0)

        def train(params=params):
            opt = build(True, kind, params)
            opt.max_grad_norm = 0.25
            opt.grad_scale = torch.tensor(8.0)
            opt.step()
            del opt.grad_scale
            return opt

        opt = torch.compile(train, backend="eager")() if compile_it else train()
        assert opt.max_grad_norm == 0.25 and opt.clip_coef < 1.0
        results.append((params, opt.grad_norm))
    (params, norm), (params_compiled, norm_compiled) = results
    assert torch.equal(norm, norm_compiled)
    assert all(torch.equal(a, b) for a, b in zip(params, params_compiled, strict=True))


# Inference mode


def construct(opt, kind, params):
    return build(True, kind, params, max_grad_norm=1.0)


def init_state(opt, kind, params):
    opt.init_state()


def step(opt, kind, params):
    opt.step()


def scaled_step(opt, kind, params):
    scaler = make_scaler("ours", init_scale=1.0)
    scaler.step(opt)
    scaler.update()


def load(opt, kind, params):
    opt.load_state_dict(opt.state_dict())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", [construct, init_state, step, scaled_step, load])
def test_what_is_made_in_inference_mode(kind, dtype, how):
    def train(mode):
        params = make_params(dtype)
        params[0].data = params[0].data[:, ::2]  # staged
        opt = build(True, kind, params, max_grad_norm=1.0)
        give_grads(params, 0)
        opt.step()
        with torch.inference_mode(mode):
            opt = how(opt, kind, params) or opt
        opt.register_step_pre_hook(lambda *_: None)
        give_grads(params, 1)
        scaled_step(opt, kind, params)
        return [*params, *(v for p in params for v in opt.state[p].values())]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


# Threads

THREADS = """
    import os, sys, numpy, torch, fusedopt
    torch.set_num_threads(int(sys.argv[1]))
    param = torch.nn.Parameter(torch.from_numpy(numpy.ones(200_000, numpy.float32)))
    param.grad = torch.from_numpy(numpy.ones(200_000, numpy.float32))  # torch has no pool yet
    opt = fusedopt.FusedSGD([param], max_grad_norm=1.0, backend="cpu")
    before = len(os.listdir("/proc/self/task"))
    opt.step()
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_threads_work_as_torch_uses(threads, cpu_backend, tmp_path):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "FUSED"))}
    command = [sys.executable, "-c", textwrap.dedent(THREADS), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert done.stdout == f"{threads - 1}\n", done.stderr
