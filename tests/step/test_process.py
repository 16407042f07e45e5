"""What is set for a whole process or thread: default dtype and device, modes, threads."""

import os
import sys
import textwrap

import pytest
import torch
from children import in_a_child
from protocol_helpers import (
    build,
    every_kind,
    fallback_is_expected,
    give_grads,
    make_params,
    make_scaler,
    on_every_backend,
    step_all,
)

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

MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@every_kind
@pytest.mark.parametrize("mode", MODES)
def test_stepped_under_another_mode(kind, mode):
    params, plain = make_params(), make_params()
    opts = [build(True, kind, p, max_grad_norm=0.5) for p in (params, plain)]
    for step in range(3):
        give_grads(params, step)
        with MODES[mode]():
            opts[0].step()
        step_all([(plain, opts[1])], step)
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


# Inference mode


def construct(opt, params):
    return type(opt)(opt.param_groups, max_grad_norm=1.0)


def scaled_step(opt, params):
    scaler = make_scaler("ours", init_scale=1.0)
    scaler.step(opt)
    scaler.update()


IN_INFERENCE_MODE = {
    "construct": construct,
    "init_state": lambda opt, params: opt.init_state(),
    "step": lambda opt, params: opt.step(),
    "scaled_step": scaled_step,
    "load": lambda opt, params: opt.load_state_dict(opt.state_dict()),
}


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", IN_INFERENCE_MODE)
def test_what_is_made_in_inference_mode(kind, dtype, how):
    results = []
    for mode in (False, True):
        params = make_params(dtype)
        params[0].data = params[0].data[:, ::2]  # staged
        opt = build(True, kind, params, max_grad_norm=1.0)
        give_grads(params, 0)
        opt.step()
        with torch.inference_mode(mode):
            opt = IN_INFERENCE_MODE[how](opt, params) or opt
        opt.register_step_pre_hook(lambda *_: None)
        give_grads(params, 1)
        scaled_step(opt, params)
        results.append([*params, *(v for p in params for v in opt.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Threads

THREADS = """
    import os, numpy, torch, fusedopt
    for threads in (1, 3):
        torch.set_num_threads(threads)
        param = torch.nn.Parameter(torch.from_numpy(numpy.ones(200_000, numpy.float32)))
        param.grad = torch.from_numpy(numpy.ones(200_000, numpy.float32))  # torch has no pool yet
        opt = fusedopt.FusedSGD([param], backend="cpu")  # nor has a reduction made one
        before = len(os.listdir("/proc/self/task"))
        opt.step()
        print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["cpu"])
def test_as_many_threads_work_as_torch_uses(cpu_backend, backend, tmp_path, monkeypatch):
    for name in [n for n in os.environ if n.startswith(("OMP_", "GOMP_"))]:
        monkeypatch.delenv(name)
    done = in_a_child(textwrap.dedent(THREADS), tmp_path)
    assert done.stdout == "0\n2\n", done.stderr
