"""What may differ from one Triton to the next: compiler, launcher and interpreter, each a little.

.ci/triton_versions runs this file with every release that is supported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import amdgcn
import pytest
import torch
from cases import FULL_CASES, OptimizerCase, parametrize

pytest.importorskip("triton")

import triton
import triton_interpreter
from triton_compile import AMD, FOLDER, KERNELS, NVIDIA, TARGETS, VARIANTS, kernel
from triton_twins import TritonTwins

from fusedopt.backends.triton import OLDEST, is_supported
from fusedopt.triton_kernels.variants import Variant

TESTS = Path(__file__).parent
WANTED = os.environ.get("FUSEDOPT_TEST_TRITON")  # the release that has to be the one tested
LIBRARIES = {"cuda": "libcuda.so.1", "hip": "libamdhip64.so"}

RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
# Before, Triton itself made a root of its reciprocal, unscaled: off by an ulp below 2**-110, and
# for AMD to say what of a denormal.
ROOTS_ON_AMD = (3, 7)
# Older releases are tried with some of the GPUs.
TARGETS_TRIED = TARGETS if RELEASE >= (3, 8) else ["sm_75", "sm_90", "gfx942"]

interpreter = pytest.fixture(triton_interpreter.fixture)


def test_it_is_the_release_that_was_asked_for():
    assert is_supported(triton.__version__), (triton.__version__, OLDEST)
    assert WANTED in (None, triton.__version__)


# ---- compiler: does what it makes round as the kernels say? -------------------------------------

ARITHMETIC = ("add", "sub", "mul", "fma", "div", "sqrt")


def float_opcodes(ptx: str) -> Counter[str]:
    """Arithmetic on floating-point numbers: not moves, comparisons, changes of sign."""
    found = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]*\.b?f(?:16|32|64)\w*)\s", ptx, re.M)
    silent = ("mov.", "ld.", "st.", "setp.", "selp.", "neg.", "abs.", "min.", "max.", "cvt.")
    found = [opcode for opcode in found if not opcode.startswith(silent)]
    found += [opcode for opcode in found if opcode.endswith("x2")]  # one of them is two
    return Counter(opcode.removesuffix("x2") for opcode in found)


def unfaithful(ptx: str) -> list[str]:
    """Instructions that round otherwise than once to the nearest, or may be made to."""
    approximate = re.findall(r"\S*\.(?:approx|ftz|full)\S*", ptx)
    faithful = {f"{name}.rn.{kind}" for name in ARITHMETIC for kind in ("f32", "f64")}
    return approximate + sorted(set(float_opcodes(ptx)) - faithful)


def fused(name: str, ptx: str) -> bool:
    """By the compiler: in fp64, and in finalize, the kernels themselves fuse nothing."""
    found = float_opcodes(ptx)
    return bool(found["fma.rn.f64"] or (name.startswith("finalize") and found["fma.rn.f32"]))


def opcodes(text: str) -> Counter[str]:
    """Of AMD, without their encodings."""
    code = [i for block in amdgcn.parse_code(text) for i in block.code]
    return Counter(re.sub(r"_(e32|e64|sdwa|dpp)$", "", i.opcode) for i in code)


def unfaithful_for_amd(text: str) -> list[str]:
    """What is set up or computed otherwise than it has to be."""
    wrong = []
    modes = amdgcn.parse_modes(text)
    for kind in ("32", "16_64"):
        if modes[f"float_denorm_mode_{kind}"] != 3:
            wrong.append(f"denormals of {kind} are flushed")
        if modes[f"float_round_mode_{kind}"] != 0:
            wrong.append(f"{kind} are not rounded to the nearest, ties to even")
    found = opcodes(text)
    for kind in ("f32", "f64"):
        # a reciprocal only ever begins a division
        steps = [found[f"v_{step}_{kind}"] for step in ("rcp", "div_fmas", "div_fixup")]
        if len({*steps, found[f"v_div_scale_{kind}"] / 2}) != 1:
            wrong.append(f"a division of {kind} is not refined")
    # the first of a root of fp64, of which the rest mends special values
    roots = found["v_sqrt_f32"] + found["v_rsq_f64"]
    if found["v_cmp_class_f32"] + found["v_cmp_class_f64"] < roots:
        wrong.append("a root is not refined")
    never = r"s_setreg|s_denorm|v_rsq_f32|v_sqrt_f64|v_rcp_iflag"
    return wrong + [opcode for opcode in found if re.match(never, opcode)]


def fused_for_amd(text: str) -> bool:
    """By the compiler, in fp64: more than divisions and roots consist of."""
    found = opcodes(text)
    fused = sum(n for opcode, n in found.items() if re.match(r"v_fma(c|mk|ak)?_f64", opcode))
    return fused != 5 * found["v_div_fixup_f64"] + 7 * found["v_rsq_f64"]


def each(targets: Collection[str]) -> pytest.MarkDecorator:
    found = [(n, t) for n, t in KERNELS if t in targets and t in TARGETS_TRIED]
    return pytest.mark.parametrize(("name", "target"), found)


@each(NVIDIA)
def test_ptx_rounds_once_to_the_nearest(name, target):
    compiled = kernel(name, target)
    assert compiled.metadata.target == TARGETS[target]
    assert compiled.metadata.enable_fp_fusion is False  # and so --fmad=false for ptxas
    assert not unfaithful(compiled.asm["ptx"])
    assert not fused(name, compiled.asm["ptx"])


@each(AMD)
def test_amdgcn_keeps_denormals_and_divides_in_full(name, target):
    compiled = kernel(name, target)
    assert compiled.metadata.target == TARGETS[target]
    text = compiled.asm["amdgcn"]
    assert not fused_for_amd(text)
    has_root = RELEASE < ROOTS_ON_AMD and name.startswith("update-adamw")
    assert unfaithful_for_amd(text) == (["v_rsq_f32"] if has_root else [])


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_fusion_would_be_seen(target, monkeypatch):
    options = {"num_warps": 1, "enable_fp_fusion": True}
    monkeypatch.setattr(Variant, "options", lambda self, target: options)
    asm = kernel.__wrapped__("finalize-adamw", target).asm
    if target in NVIDIA:
        assert unfaithful(asm["ptx"])
        assert fused("finalize-adamw", asm["ptx"])
    else:
        assert fused_for_amd(asm["amdgcn"])


# ---- launcher -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", LIBRARIES)
def test_launches_arrive_as_they_were_meant(tmp_path, backend):
    """With a library in the place of the GPU's driver."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler, which Triton needs for its launcher")
    library = tmp_path / LIBRARIES[backend]
    command = [*compiler.split(), "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    if backend == "hip":
        headers = Path(triton.__file__).parent / "backends/amd/include"
        command += ["-DHIP", "-isystem", str(headers)]
    subprocess.run([*command, str(TESTS / "fake_driver.c"), "-o", str(library)], check=True)
    command = [sys.executable, str(TESTS / "fake_launches.py"), backend, str(library)]
    env = os.environ | {"TRITON_CACHE_DIR": str(FOLDER)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(VARIANTS)


# ---- interpreter --------------------------------------------------------------------------------


@parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize("case", FULL_CASES)
def test_the_bits_of_the_cpu_backend(cpu_backend, interpreter, case, dtype):
    twins = TritonTwins.of_lengths(case, [5, 0, 2050], dtype)
    twins.run(steps=2)
    assert {name.partition("-")[0] for name, _ in interpreter.launched} == {"reduce", "update"}


@parametrize("case", FULL_CASES)
def test_the_bits_of_coded_streams(cpu_backend, interpreter, case):
    hyper = {name: value for name, value in case.hyper.items() if name != "amsgrad"}
    case = OptimizerCase(case.name, case.rule, hyper, case.common)
    options = {"state_dtype": "8bit", "min_8bit_size": 9, "master_weights": "remainder8"}
    twins = TritonTwins.of_lengths(case, [5, 0, 650], torch.bfloat16, **options)
    twins.run(steps=2)
    assert interpreter.launched[-1][0].endswith("coded")
