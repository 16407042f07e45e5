"""docs/adding_an_optimizer.md quotes the sources, and the diff in docs/adding_a_backend.md applies
and does what the page says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_stand_in import ENV

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
BUILD = ("build_native.py", "build_compilers.py")
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "_build_config.py")

ASKED = """
import fusedopt.__main__, fusedopt.backends.tracing as t, pytest, sys
fusedopt.__main__.main([])
print(sorted(t.calls))
words = ("-q", "-p", "no:cacheprovider", "-k", "tracing")
sys.exit(pytest.main([*words, "tests/step/test_skip.py::test_a_skip_counts_for_no_param"]))
"""

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "csrc").is_dir() or not OPTIMIZER.is_file(), reason="the sources are not here"
    ),
    pytest.mark.skipif(
        not all(map(shutil.which, ("bash", "awk", "git"))),
        reason="the page's own command needs them",
    ),
]


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


def test_every_quotation_stands_in_its_file() -> None:
    text = OPTIMIZER.read_text()
    quoted = re.findall(r"^`(\S+)`\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(quoted) == text.count("\n```") // 2 > 5
    for name, code in quoted:
        assert code in (ROOT / name).read_text(), f"{name} is not what the page says:\n{code}"


def test_a_rule_is_seven_places() -> None:
    """Those that the page's table lists; no other product code, and no model, names Lion."""
    table = re.findall(r"^\| `(\S+)` \| ", OPTIMIZER.read_text(), re.MULTILINE)
    folders = ("csrc", "fusedopt", "tests/models")
    files = [path for name in folders for path in (ROOT / name).rglob("*.[hcp]*")]
    named = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".pyi")
        and re.search(r"\blion|Lion", path.read_text())
    }
    assert named == set(table) and len(named) == 7


def test_the_backend_is_asked_by_name(tmp_path: Path) -> None:
    told = run(patched(BACKEND, tmp_path), "-c", ASKED, FUSEDOPT_BACKEND="tracing")
    assert "tracing, self-test ok" in told
    assert "['begin', 'plan', 'reduce', 'update']" in told
    assert " passed" in told
