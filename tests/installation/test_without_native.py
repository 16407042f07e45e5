"""An installation without the native CPU module: the backends of GPUs work, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import cuda_shim
import pytest
import torch
import triton_interpreter
from cases import transposed
from children import helpers_of, in_a_child
from conftest import require_cpu_backend
from harness import make_param, randn
from tolerances import assert_same_bits
from torch import Tensor

import fusedopt
from fusedopt.backends import modules
from fusedopt.backends.watch import PythonWatch

SHAPES = [(5, 3), (300,), (), (0,), (2, 3, 4)]


@contextlib.contextmanager
def kernels(backend: str) -> Iterator[None]:
    """Those of a GPU's backend, on the CPU."""
    if backend == "triton":
        pytest.importorskip("triton")
        with triton_interpreter.installed():
            yield
        return
    try:
        cuda_shim.load()
    except cuda_shim.NoShim as reason:
        pytest.skip(str(reason))
    with cuda_shim.installed():
        yield


def trained(backend: str) -> tuple[type, dict[str, Tensor]]:
    """The watch's type, and all tensors after steps with a reason each to look twice."""
    params = [make_param(randn(shape, seed)) for seed, shape in enumerate(SHAPES)]
    params.append(make_param(randn((4, 6), 9, torch.bfloat16)[:, ::2]))  # is staged
    opt = fusedopt.FusedAdamW(params[:2], lr=0.1, max_grad_norm=1.0, backend=backend)
    opt.add_param_group({"params": params[2:], "lr": 0.05})
    plans = []
    for step in range(4):
        for seed, param in enumerate(params):
            param.grad = randn(param.shape, 10 * step + seed, param.dtype)
        if step == 1:
            params[0].grad = transposed(params[0].grad)
            params[1].grad = None
        if step == 2:
            params[2].data = params[2].data.clone()
        opt.step()
        plans.append(opt._shared.plan)
    assert plans[0] is plans[1] is not plans[2] is plans[3]
    tensors = {f"param {i}": param.detach() for i, param in enumerate(params)}
    for i, param in enumerate(params):
        tensors |= {f"{name} of param {i}": value for name, value in opt.state[param].items()}
    assert opt.grad_norm is not None
    return type(opt._shared.plan._watch), {**tensors, "grad_norm": opt.grad_norm}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_same_bits(value, theirs[name], name)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_steps_with_the_watch_in_python(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_cpu_backend()
    with kernels(backend):
        natively, expected = trained(backend)
        monkeypatch.setattr(modules, "load", lambda name: (None, "no C++ compiler"))
        in_python, tensors = trained(backend)
    assert natively is not PythonWatch and in_python is PythonWatch
    assert_same(tensors, expected)


def test_triton_in_a_process_that_has_no_native_module(tmp_path: Path) -> None:
    """Nothing on the way to a step imports it."""
    code = (
        "import sys\n"
        "sys.modules['fusedopt._cpu'] = None  # cannot be imported\n"
        "import test_without_native, torch\n"
        "from fusedopt.backends import registry as backends\n"
        "assert not backends.report()['cpu']['available']\n"
        "with test_without_native.kernels('triton'):\n"
        "    watch, tensors = test_without_native.trained('triton')\n"
        "assert watch is test_without_native.PythonWatch\n"
        "torch.save(tensors, 'tensors.pt')\n"
    )
    with kernels("triton"):
        _, expected = trained("triton")
    done = in_a_child(code, tmp_path, PYTHONPATH=helpers_of("installation"))
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(tmp_path / "tensors.pt"), expected)
