"""The CUDA backend where there is no GPU: its reason, its module and 64-bit arithmetic."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CHUNK

from fusedopt.backends import cuda, registry as backends
from fusedopt.backends.records import chunk_table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
def test_the_reason_is_one_line_that_says_what_is_missing() -> None:
    told = backends.report()["cuda"]
    assert told["available"] is False
    assert told["reason"] == cuda.unavailable_reason()
    assert "\n" not in told["reason"]
    words = ("nvcc", "built", "driver", "device", "GPU", "torch", "_cuda")
    assert any(word in told["reason"] for word in words), told


def test_the_module_answers_without_a_gpu(tmp_path: Path) -> None:
    """Imported by itself, without torch; without a driver it raises with CUDA's own text. A plan
    asks CUDA about the device, and never looks at the tables."""
    spec = importlib.util.find_spec("fusedopt._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("the native module fusedopt._cuda is not built")
    tables = {"n_groups": 1, "n_rows": 1, "n_chunks": 1, "n_devices": 1, "own_number": 0}
    tables |= {"n_states": 2, "coded": False, "n_input_bytes": 208}
    names = ("inputs", "host_inputs", "options", "numbers", "grads", "rows", "chunks", "row_steps")
    tables |= dict.fromkeys((*names, "sums", "words", "ticket"), 16)
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_cuda', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "assert sorted(module.versions())\n"
        "try: print(module.device_count())\n"
        "except RuntimeError as error: print(error)\n"
        "for device in (0, 1):\n"
        f"    try: module.Plan(rule='adamw', tables={{'device': device, **{tables}}})\n"
        "    except RuntimeError as error: print(error)\n"
        "    else: print('accepted')\n"
    )
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, spec.origin]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, *plans = done.stdout.splitlines()
    assert count == "0" or count.startswith("fusedopt: CUDA: "), count
    for answer in plans:
        assert re.fullmatch(r"fusedopt: CUDA: \w+: cudaError\w+: .+", answer), answer
    assert len(plans) == 2


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
