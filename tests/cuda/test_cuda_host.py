"""The CUDA backend where there is no GPU: imports, reasons, refusals, and 64-bit arithmetic."""

from __future__ import annotations

import importlib.util
import itertools
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

from fusedopt.backends import cuda, registry as backends
from fusedopt.backends.records import chunk_table

not_built = importlib.util.find_spec("fusedopt._cuda") is None
built = pytest.mark.skipif(not_built, reason="the native module fusedopt._cuda is not built")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
def test_the_reason_is_one_line_that_says_what_is_missing() -> None:
    told = backends.report()["cuda"]
    assert told["available"] is False
    assert told["reason"] == cuda.unavailable_reason()
    assert "\n" not in told["reason"]
    words = ("nvcc", "built", "driver", "device", "GPU", "torch", "_cuda")
    assert any(word in told["reason"] for word in words), told


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


# Tensors and plans beyond 2^31

HUGE = [
    [2**31 + 1, 0, 5],
    [3, 2**33 + 7, CHUNK],
    [2**31 - CHUNK] * 5,
    [10**9] * 3 + [0] * 3 + [10**9],
    [2**34 + 1],
]


@pytest.mark.parametrize("numels", HUGE, ids=str)
def test_chunks_of_huge_tensors(numels: list[int]) -> None:
    """Nothing wraps around; a chunk's index is 32 bits wide, so tensors may have 2^44 elements."""
    table = chunk_table(numels)
    row, index, *_ = table.view(torch.int32).view(-1, 4).long().unbind(1)  # csrc/records.h
    counts = [-(-n // CHUNK) for n in numels]
    assert torch.equal(row, torch.repeat_interleave(torch.tensor(counts)))
    assert torch.equal(index, torch.cat([torch.arange(count) for count in counts]))
    before = torch.tensor([0, *itertools.accumulate(numels)])
    assert torch.equal(table[:, 1], before[row] + index * CHUNK)
