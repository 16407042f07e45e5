"""How often Triton compiles: once for each variant, and not at all in a warm process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from children import helpers_of
from gpu_helpers import on_gpu, real

runner = on_gpu("triton")


def steps_in_a_process(cache: Path, **variables: str) -> dict[str, Any]:
    """What a process compiled that took steps of every kind, with its kernels in `cache`."""
    program = Path(__file__).with_name("triton_steps.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": helpers_of(), "TRITON_CACHE_DIR": str(cache), **variables},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_every_variant_is_compiled_once(tmp_path: Path) -> None:
    """Whatever the values, the lengths, the number of tensors and the dtypes are."""
    pytest.importorskip("triton")
    from fusedopt.triton_kernels.variants import all_variants

    reachable = [v for v in all_variants() if v.streams != "coded"]  # the process codes nothing
    names = sorted(variant.name for variant in reachable)
    cold = steps_in_a_process(tmp_path)
    if not real():  # the interpreter compiles nothing, but runs what would be compiled
        assert cold["ran"] == names
        assert cold["compiled"] == cold["cached"] == [[], []]
        return
    first, second = cold["compiled"]
    assert len(first) == len(set(first)) == len(names) == 17, first
    assert second == [], "other values, lengths or counts were compiled anew"
    assert cold["cached"] == [[], []], "a kernel was looked for twice"
    # a compiler that fails: neither kernels nor launchers need one
    warm = steps_in_a_process(tmp_path, CC="/bin/false")
    assert warm["compiled"] == [[], []]
    assert sorted(warm["cached"][0]) == sorted(first) and warm["cached"][1] == []
