"""What may differ from one Triton to the next: compiler, launcher and interpreter, each a little.

.ci/triton_versions runs this file with every release that is supported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FULL_CASES, OptimizerCase, adamw, case_id

pytest.importorskip("triton")

import rounding
import triton
import triton_interpreter
from triton_compile import NVIDIA, TARGETS, VARIANTS, kernel
from triton_twins import TritonTwins

from fusedopt.backends.triton import OLDEST, is_supported

TESTS = Path(__file__).parent
WANTED = os.environ.get("FUSEDOPT_TEST_TRITON")  # the release that has to be the one tested
LIBRARIES = {"cuda": "libcuda.so.1", "hip": "libamdhip64.so"}

RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
# Before, Triton itself made a root of its reciprocal, unscaled: off by an ulp below 2**-110, and
# for AMD to say what of a denormal.
ROOTS_ON_AMD = (3, 7)
WITH_ROOTS = [name for name in VARIANTS if name.startswith("update-adamw")]

interpreter = pytest.fixture(triton_interpreter.fixture)


def test_it_is_the_release_that_was_asked_for():
    assert is_supported(triton.__version__), (triton.__version__, OLDEST)
    assert WANTED in (None, triton.__version__)


# ---- compiler -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_compiles(name, target):
    compiled = kernel(name, target)
    assert compiled.metadata.enable_fp_fusion is False
    assert compiled.metadata.target == TARGETS[target]
    if target in NVIDIA:
        ptx = compiled.asm["ptx"]
        assert not rounding.unfaithful(ptx) and not rounding.fused(name, ptx)
        return
    text = compiled.asm["amdgcn"]
    assert not rounding.fused_for_amd(text)
    root = ["v_rsq_f32"] if RELEASE < ROOTS_ON_AMD and name in WITH_ROOTS else []
    assert rounding.unfaithful_for_amd(text) == root


# ---- launcher -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LIBRARIES)
def fake_driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library in the place of the GPU's driver, for Triton to launch with."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler, which Triton needs for its launcher")
    library: Path = tmp_path_factory.mktemp(request.param) / LIBRARIES[request.param]
    command = [*compiler.split(), "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    if request.param == "hip":
        headers = Path(triton.__file__).parent / "backends/amd/include"
        command += ["-DHIP", "-isystem", str(headers)]
    subprocess.run([*command, str(TESTS / "fake_driver.c"), "-o", str(library)], check=True)
    return library


def test_launches_arrive_as_they_were_meant(fake_driver):
    backend = {name: backend for backend, name in LIBRARIES.items()}[fake_driver.name]
    command = [sys.executable, str(TESTS / "fake_launches.py"), backend, str(fake_driver)]
    env = os.environ | {"TRITON_CACHE_DIR": str(fake_driver.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout)
    assert [launch["name"] for launch in launched] == list(VARIANTS)
    warp_size = {"cuda": 32, "hip": 64}[backend]
    for launch in launched:
        threads = 128 if launch["name"].startswith("update") else warp_size
        assert launch == {
            "name": launch["name"],
            "launches": 1,
            "is_elf": True,
            "grid": [7, 1, 1],
            "block": [threads, 1, 1],
            "stream": 0xABC0,
            "wrong": [],
        }


# ---- interpreter --------------------------------------------------------------------------------

AMSGRAD = adamw("amsgrad", {"max_grad_norm": 1.0}, lr=0.02, weight_decay=0.1, amsgrad=True)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", [*FULL_CASES, AMSGRAD], ids=case_id)
def test_the_bits_of_the_cpu_backend(cpu_backend, interpreter, case: OptimizerCase, dtype):
    twins = TritonTwins.of_lengths(case, [5, 0, 700, 2050], dtype)
    twins.run(steps=2)
    assert {name.partition("-")[0] for name, _ in interpreter.launched} == {"reduce", "update"}
