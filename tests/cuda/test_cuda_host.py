"""The CUDA backend where there is no GPU: imports, reasons, refusals, and 64-bit arithmetic."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CHUNK
from children import in_a_child
from harness import make_param, randn

import fusedopt
from fusedopt.backends import cuda, registry as backends

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
not_built = importlib.util.find_spec("fusedopt._cuda") is None
built = pytest.mark.skipif(not_built, reason="the native module fusedopt._cuda is not built")


def param_with_grad(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    param = make_param(randn(5, 1, dtype))
    param.grad = torch.ones(5, dtype=dtype)
    return param


# Where it cannot serve


@no_gpu
def test_the_reason_is_one_line_that_says_what_is_missing() -> None:
    reason = cuda.unavailable_reason()
    assert reason and "\n" not in reason, reason
    words = ("nvcc", "built", "driver", "device", "GPU", "torch", "_cuda")
    assert any(word in reason for word in words), reason


@no_gpu
def test_the_report_has_the_reason() -> None:
    told = backends.report()["cuda"]
    assert told["available"] is False
    assert told["reason"] == cuda.unavailable_reason()


def test_import_and_cpu_step_without_a_gpu(tmp_path: Path) -> None:
    """Nothing of CUDA is touched by an import or by a step on the CPU."""
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, fusedopt, fusedopt.backends.cuda as cuda\n"
        "p = torch.nn.Parameter(torch.ones(9)); p.grad = torch.ones(9)\n"
        "opt = fusedopt.FusedAdamW([p], max_grad_norm=1.0, backend='cpu' if CPU else 'reference')\n"
        "opt.step()\n"
        "import json\n"
        "print(json.dumps([opt.backend, cuda.unavailable_reason(), torch.cuda.is_initialized()]))\n"
    )
    has_cpu = importlib.util.find_spec("fusedopt._cpu") is not None
    done = in_a_child(f"CPU = {has_cpu}\n{code}", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    backend, reason, initialized = json.loads(done.stdout)
    assert backend == {"cpu": "cpu" if has_cpu else "reference"}
    assert reason and not initialized


def module_in_a_child(code: str, cwd: Path) -> str:
    """Last line that ``code`` prints about ``module``, imported by itself: no torch, no device."""
    load = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_cuda', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
    )
    spec = importlib.util.find_spec("fusedopt._cuda")
    assert spec is not None and spec.origin is not None
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", load + code, spec.origin]
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@built
def test_the_module_answers_without_a_gpu(tmp_path: Path) -> None:
    """Imported by itself, without torch; without a driver it raises with CUDA's own text."""
    code = (
        "print(sorted(module.versions()))\n"
        "try: print(module.device_count())\n"
        "except RuntimeError as error: print(error)\n"
    )
    answer = module_in_a_child(code, tmp_path)
    assert answer == "0" or answer.startswith("fusedopt: CUDA: "), answer


@built
@pytest.mark.parametrize("device", [0, 1])
def test_a_plan_without_a_gpu_is_refused_in_cudas_words(tmp_path: Path, device: int) -> None:
    """The constructor asks CUDA about the device, and never looks at the tables."""
    numbers = {"device": device, "n_groups": 1, "n_rows": 1, "n_chunks": 1, "n_devices": 1}
    numbers |= {"own_number": 0, "n_states": 2, "half_states": False, "n_input_bytes": 208}
    names = ("inputs", "host_inputs", "options", "numbers", "grads", "rows", "chunks", "row_steps")
    tables = {**numbers, **dict.fromkeys((*names, "sums", "words", "ticket"), 16)}
    code = (
        f"try: module.Plan(rule='adamw', tables={tables})\n"
        "except RuntimeError as error: print(error)\n"
        "else: print('accepted')\n"
    )
    answer = module_in_a_child(code, tmp_path)
    assert re.fullmatch(r"fusedopt: CUDA: \w+: cudaError\w+: .+", answer), answer


# Asked for by name


def refusal(param: torch.nn.Parameter, backend: str | None) -> str:
    before = param.detach().clone()
    opt = fusedopt.FusedAdamW([param], backend=backend)
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    assert torch.equal(param, before) and not opt.state, "a refused step changed something"
    return str(caught.value)


def assert_names_backend_reason_remedy(message: str) -> None:
    assert "'cuda'" in message, message
    assert "backend=" in message or "FUSEDOPT_BACKEND" in message, f"no remedy: {message}"
    reason = cuda.unavailable_reason()
    assert (reason and reason in message) or " cpu" in message, f"no reason: {message}"


def test_cuda_by_argument_for_a_cpu_tensor() -> None:
    assert_names_backend_reason_remedy(refusal(param_with_grad(), "cuda"))


def test_cuda_by_environment_for_a_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_BACKEND", "cuda")
    assert_names_backend_reason_remedy(refusal(param_with_grad(), None))


def test_the_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_BACKEND", "cuda")
    opt = fusedopt.FusedAdamW([param_with_grad()], backend="reference")
    opt.step()
    assert opt.backend == {"cpu": "reference"}


def test_a_name_that_is_none_lists_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'gpu'.*\bcuda\b"):
        fusedopt.FusedAdamW([param_with_grad()], backend="gpu")


def test_float64_is_refused_by_name() -> None:
    message = refusal(param_with_grad(torch.float64), "cuda")
    assert_names_backend_reason_remedy(message)


def test_auto_never_takes_cuda_for_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    opt = fusedopt.FusedAdamW([param_with_grad()])
    opt.step()
    assert opt.backend["cpu"] in ("cpu", "reference")


# Tensors and plans beyond 2^31


def chunk_fields(numels: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, index and position of every chunk, as the kernels read them (csrc/records.h)."""
    from fusedopt.backends.records import chunk_table

    table = chunk_table(numels)
    pairs = table.view(torch.int32).view(-1, 4)
    return pairs[:, 0].long(), pairs[:, 1].long(), table.view(-1, 2)[:, 1]


HUGE = [
    [2**31],
    [2**31 - 1, 1],
    [2**31 + 1, 0, 5],
    [3, 2**33 + 7, CHUNK],
    [2**31 - CHUNK] * 5,
    [10**9] * 3 + [0] * 3 + [10**9],
]


@pytest.mark.parametrize("numels", HUGE, ids=str)
def test_chunks_of_huge_tensors(numels: list[int]) -> None:
    """Every element of every row is in exactly one chunk, and nothing wraps around."""
    row, index, position = chunk_fields(numels)
    lengths = torch.tensor(numels)
    assert bool((row[1:] >= row[:-1]).all()) and bool((index >= 0).all())
    begin = index * CHUNK
    size = torch.minimum(lengths[row] - begin, torch.tensor(CHUNK))
    assert bool((size > 0).all()), "a chunk without elements"
    covered = torch.zeros_like(lengths).index_add_(0, row, size)
    assert covered.tolist() == numels
    for k, n in enumerate(numels):
        own = index[row == k]
        assert torch.equal(own, torch.arange(-(-n // CHUNK))), f"row {k}"
    assert torch.equal(position, torch.cumsum(size, 0) - size), "elements before each chunk"
    assert int(position[-1]) + int(size[-1]) == sum(numels)


def test_the_largest_index_of_a_chunk_fits() -> None:
    """A chunk's index is 32 bits wide: tensors may have 2^44 elements."""
    assert (2**31 - 1) * CHUNK > 2**43
    row, index, _ = chunk_fields([2**34 + 1])
    assert int(index[-1]) == 2**34 // CHUNK and int(row[-1]) == 0
