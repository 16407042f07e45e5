"""Lines of bash blocks in README and docs: which run here, which elsewhere and with what
difference, and which nowhere, and why. A line that is in none of these tables fails."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator

import pytest
from test_documents import COMMANDS, DOCUMENTS, ROOT

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").is_dir() or not (ROOT / ".ci").is_dir(),
    reason="the documents or what they run are not here",
)

HERE = (
    "python -m fusedopt",
    "python -m fusedopt --json",
    "python -m benchmarks roofline --params bf16 --clip --scaler ours --bandwidth 40 --numel 1e8",
    "python -m benchmarks roofline --table",
)

INSTALL = ".ci/run", 'bash -euo pipefail -c "$test_command"'
TEST = ".ci/run", "readme_command test"
CPU = "tests/bench/test_cpu_benchmark.py", "def test_quick_run_writes_rows("
KEPT = "tests/bench/test_cpu_benchmark.py", "def test_kept_gradients_of_the_readme("
TRACING = "tests/docs/test_worked_example.py", "def test_the_backend_is_asked_by_name("
GPU = "tests/bench/test_gpu_benchmark.py", "def test_dry_run_has_well_formed_rows("
SWEEP = (
    "tests/bench/test_gpu_benchmark.py",
    "def test_dry_sweep_of_the_kernels_has_rows_and_no_figures(",
)
RANKS = (
    "tests/docs/test_examples.py",
    "def test_sharded_on_two_ranks_and_resumed_on_three(",
)
APPLY = "awk '/^```$/ { on = 0 } on; /^```diff$/ { on = 1 }' docs/adding_"
# The file that runs the line, what stands there, and how what runs is different.
ELSEWHERE = {
    "pip install torch==2.13.0 -e '.[examples]' && python examples/train_digits.py": (
        ".ci/run", "readme_command main", "fewer steps"),
    "torchrun --standalone --nproc-per-node 2 examples/train_sharded.py": (*RANKS, "fewer steps"),
    "torchrun --standalone --nproc-per-node 3 examples/train_sharded.py --resume": (
        *RANKS, "fewer steps, DDP"),
    "pip install torch==2.13.0 -e '.[test]' && pytest -q -n 2": (*TEST, ""),
    "pip install torch==2.13.0": (".ci/run", "pip install -q torch==2.13.0", ""),
    "pip install -e .": (*INSTALL, "with extras"),
    "pip install torch==2.13.0 -e '.[test]'": (*INSTALL, "and pytest after it"),
    "pip install -e '.[dev]'": (".ci/run", "pip install -q '.[dev]'", "not editable"),
    "pip install -e '.[examples,bench]'": (*INSTALL, "the extra for tests, which has these"),
    "python -m venv .venv && . .venv/bin/activate": (".ci/run", "-m venv", "another folder"),
    "pytest -n 2": (*TEST, "quiet"),
    "pytest tests/step": (*TEST, "with all others"),
    ".ci/run": (".github/workflows/ci.yml", ".ci/run", ""),
    ".ci/planted": (".github/workflows/ci.yml", ".ci/planted", ""),
    ".ci/sanitize build/sanitized": (".ci/run", ".ci/sanitize", "another folder"),
    ".ci/instructions": (".ci/run", ".ci/instructions", ""),
    "FUSEDOPT_CPU=1 python setup.py -q build_ext --inplace": (
        "tests/installation/test_build.py", '"setup.py", "-q", "build_ext", "--inplace"', "a copy"),
    f"{APPLY}a_backend.md | git apply -": (*TRACING, ""),
    "FUSEDOPT_BACKEND=tracing python -m fusedopt": (*TRACING, ""),
    "pytest -q tests/step/test_skip.py -k tracing": (*TRACING, "other files of tests"),
    "pip install torch==2.13.0 -e '.[bench]' && python -m benchmarks cpu": (*CPU, "--quick"),
    "python -m benchmarks cpu": (*CPU, "--quick"),
    "python -m benchmarks cpu --quick": (*CPU, ""),
    "python -m benchmarks cpu --grads kept --cases adamw-tiny adamw-gpt-1M": (*KEPT, "one round"),
    "python -m benchmarks profile": (
        "tests/bench/test_end_to_end.py", "def test_quick_profile(", "--quick"),
    "python -m benchmarks memory": (
        "tests/bench/test_peak_memory.py", "def test_quick_memory(", "--quick"),
    "python -m benchmarks fidelity": (
        "tests/bench/test_fidelity.py", "def test_quick_fidelity(", "--quick, three steps"),
    "python -m benchmarks distributed": (
        "tests/bench/test_distributed_benchmark.py", "def test_a_quick_run_writes_rows(", "quick"),
    "bash benchmarks/gpu.sh": (*GPU, "the programs it starts, as dry runs"),
    "bash benchmarks/gpu.sh --quick": (*GPU, "the programs it starts, as dry runs"),
    "bash benchmarks/gpu.sh --dry-run": (*GPU, "the programs it starts"),
    "bash benchmarks/gpu.sh --logs DIR": (*GPU, "the programs it starts, as dry runs"),
    "bash benchmarks/gpu.sh --goals": (*GPU, "the programs it starts, as dry runs"),
    "bash benchmarks/gpu.sh --record": (*GPU, "the programs it starts, as dry runs"),
    "python -m benchmarks kernels --backends cuda triton": (*SWEEP, "a dry run"),
    "python -m benchmarks kernels --backends cuda triton --quick": (*SWEEP, "a dry run"),
    "python -m benchmarks kernels --backends cuda --rules adamw sgd --dtypes all --sizes 20:30:1": (
        *SWEEP, "a dry run of fewer"),
}  # fmt: skip
NOWHERE = {
    "pip install torch": "takes gigabytes of CUDA where nothing is installed",
    "pre-commit install": "changes the checkout's git; CI runs the hooks themselves",
    "TORCH_CUDA_ARCH_LIST=9.0 python setup.py -q build_ext --inplace": "minutes of nvcc; CI builds "
    "a wheel with another value",
    "PYTHON=/path/to/python bash benchmarks/gpu.sh": "a placeholder",
}


def lines() -> Iterator[str]:
    for path in DOCUMENTS:
        for block in COMMANDS.findall(path.read_text()):
            for line in block.splitlines():
                yield line if line.startswith("awk ") else re.split(r"\s+#", line)[0].strip()


def test_every_line_is_accounted_for() -> None:
    written, known = set(lines()) - {""}, {*HERE, *ELSEWHERE, *NOWHERE}
    assert sorted(written - known) == []
    assert sorted(known - written) == [], "no document has it any more"


def test_what_runs_them_exists() -> None:
    for file, text, _ in ELSEWHERE.values():
        assert text in (ROOT / file).read_text(), f"{text} in {file}"


@pytest.mark.parametrize("command", HERE)
def test_it_runs(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python, option, module, *words = shlex.split(command)
    assert (python, option) == ("python", "-m")
    # The installed package, before the checkout, in which the native module may be missing.
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code
    assert capsys.readouterr().out.strip()
