"""docs/adding_an_optimizer.md and docs/adding_a_backend.md: their diffs apply and do what they say.

The diff of Lion brings rows for the tests of every rule. Here they run on a copy of the checkout
that has been built with it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_stand_in import ENV, needs_compiler

ROOT = Path(__file__).parents[2]
OPTIMIZER = ROOT / "docs" / "adding_an_optimizer.md"
BACKEND = ROOT / "docs" / "adding_a_backend.md"
SOURCES = (
    "csrc",
    "docs",
    "fusedopt",
    "tests",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)
BUILD = ("build_native.py", "build_compilers.py", "build_cuda.py")
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "_build_config.py")

# Of the tests that take every rule: accuracy, the roundings to the bit, skips, masters, Triton.
LION = (
    "tests/step/test_update.py::test_dtype_pairs",
    "tests/step/test_update.py::test_every_length_in_one_list[cpu-float32-lion-all]",
    "tests/step/test_agreement.py::test_update_is_the_contract",
    "tests/step/test_agreement.py::test_repeatable",
    "tests/step/test_skip.py::test_first_step_skipped",
    "tests/state/test_master.py::test_master_follows_external_writes",
    "tests/triton_backend/test_triton_interpreter.py::test_options",
    "tests/triton_backend/test_triton_rules.py",
)
TRACING = ("tests/step/test_skip.py::test_a_skip_counts_for_no_param",)

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "csrc").is_dir() or not OPTIMIZER.is_file(), reason="the sources are not here"
    ),
    pytest.mark.skipif(
        not all(map(shutil.which, ("bash", "awk", "git"))),
        reason="the page's own command needs them",
    ),
]


def diff(document: Path) -> str:
    blocks = re.findall(r"^```diff\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return "".join(blocks)


def patched(document: Path, folder: Path) -> Path:
    """A copy of the checkout with the document's diff applied."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in (*SOURCES, *BUILD):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=IGNORED)
        else:
            shutil.copy(ROOT / name, copy)
    (command,) = re.findall(r"^awk .* \| git apply -$", document.read_text(), re.MULTILINE)
    env = {**ENV, "GIT_CEILING_DIRECTORIES": str(folder)}  # or git looks for a repository around
    done = subprocess.run(
        ["bash", "-c", command], cwd=copy, env=env, text=True, capture_output=True
    )
    assert done.returncode == 0, f"the diff in {document.name} is stale:\n{done.stderr}"
    return copy


def run(copy: Path, *words: str, **env: str) -> str:
    """Standard output of Python on the copy, which comes first on its path."""
    inherited = {k: v for k, v in ENV.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env={**inherited, "PYTHONPATH": str(copy), **env},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("document", [OPTIMIZER, BACKEND], ids=lambda path: path.stem)
def test_nothing_of_it_is_shipped(document: Path) -> None:
    """Each file a diff makes is missing here; else the page would describe what exists."""
    made = re.findall(
        r"^new file mode.*\n--- /dev/null\n\+\+\+ b/(.*)$", diff(document), re.MULTILINE
    )
    assert made and not any((ROOT / name).exists() for name in made)


@needs_compiler
@pytest.mark.slow
def test_lion_keeps_every_promise(tmp_path: Path) -> None:
    copy = patched(OPTIMIZER, tmp_path)
    run(copy, "setup.py", "-q", "build_ext", "--inplace", FUSEDOPT_CPU="1", FUSEDOPT_CUDA="0")
    where = run(copy, "-c", "import fusedopt._cpu; print(fusedopt._cpu.__file__)")
    assert Path(where.strip()).is_relative_to(copy)
    told = run_tests(copy, "lion or Lion", *LION, FUSEDOPT_REQUIRE_CPU="1")
    assert int(told.rpartition(" passed")[0].split()[-1]) > 100, told


def test_the_backend_is_asked_by_name(tmp_path: Path) -> None:
    copy = patched(BACKEND, tmp_path)
    run_tests(copy, "tracing", *TRACING)
    counted = "import fusedopt.__main__, fusedopt.backends.tracing as t; fusedopt.__main__.main()"
    told = run(copy, "-c", f"{counted}; print(sorted(t.calls))", FUSEDOPT_BACKEND="tracing")
    assert "tracing, self-test ok" in told
    assert "['finalize', 'plan', 'reduce', 'update']" in told


def run_tests(copy: Path, expression: str, *tests: str, **env: str) -> str:
    """Run the copy's own tests that the expression picks."""
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", expression, *tests)
    told = run(copy, *words, **env)
    assert " passed" in told, told
    return told
