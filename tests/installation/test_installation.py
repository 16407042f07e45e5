"""A package that Python finds first and nobody built: that is said, with what helps."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fusedopt
from fusedopt import __main__, installation
from fusedopt.backends import cpu as native, registry as backends

STEP = """
import torch, fusedopt
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
fusedopt.FusedAdamW([p]).step()
"""
OTHER_PYTHON = "_cpu.cpython-36m-x86_64-linux-gnu.so"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A clone, as far as Python goes."""
    root = tmp_path / "my clone"
    ignored = shutil.ignore_patterns("*.so", "_build_config.py", "__pycache__")
    shutil.copytree(installation.PACKAGE, root / "fusedopt", ignore=ignored)
    return root


def python(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDOPT_", "PYTHON"))}
    kept["PYTHONPATH"] = str(
        installation.PACKAGE.parent
    )  # so it is installed, whatever the tests run
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=kept | env, capture_output=True, text=True
    )


def assert_said(text: str, tree: Path, lack: str) -> None:
    assert (
        f"{tree} {lack}, and hides the fusedopt that is installed in {installation.PACKAGE}" in text
    )
    assert f"`pip install -e {shlex.quote(str(tree))}` builds it; or " in text
    assert "compiler" not in text


def test_a_clone_that_nobody_built_is_told_by_the_warning(tree: Path) -> None:
    done = python("-c", STEP, cwd=tree)
    assert done.returncode == 0, done.stderr
    assert_said(done.stderr, tree, "is a source tree that was not built")
    assert "or start Python in another folder" in done.stderr
    assert done.stderr.startswith("<string>:5: FusedOptFallbackWarning: ")


def test_a_clone_that_nobody_built_is_told_by_the_report(tree: Path) -> None:
    done = python("-m", "fusedopt", cwd=tree)
    assert done.returncode == 1
    assert_said(done.stderr, tree, "is a source tree that was not built")
    assert "commit unknown" in done.stdout
    assert "self-test ok" in done.stdout
    assert done.stderr.count("is a source tree") == 1
    done = python("-m", "fusedopt", "--json", cwd=tree)
    assert done.returncode == 1
    (warning,) = json.loads(done.stdout)["warnings"]
    assert_said(warning, tree, "is a source tree that was not built")
    assert python("-m", "fusedopt", cwd=tree, FUSEDOPT_BACKEND="reference").returncode == 1


def test_on_pythonpath(tree: Path, tmp_path: Path) -> None:
    path = f"{tree}{os.pathsep}{installation.PACKAGE.parent}"
    done = python("-m", "fusedopt", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 1
    assert_said(done.stderr, tree, "is a source tree that was not built")
    assert "or take it off PYTHONPATH" in done.stderr
    assert "another folder" not in done.stderr


def test_with_modules_of_another_python(tree: Path) -> None:
    (tree / "fusedopt" / OTHER_PYTHON).touch()
    (tree / "fusedopt/_build_config.py").write_text(
        "BUILD_CONFIG = {'python': '.cpython-36m-x86_64-linux-gnu.so', 'modules': {}}\n"
    )
    done = python("-m", "fusedopt", cwd=tree)
    assert done.returncode == 1
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    lack = f"was built for another Python ({OTHER_PYTHON}; this one needs _cpu{suffix})"
    assert_said(done.stderr, tree, lack)


def test_a_record_of_another_python_says_nothing(tree: Path) -> None:
    """Say, the other one had no compiler."""
    (tree / "fusedopt/_build_config.py").write_text(
        "BUILD_CONFIG = {'python': '.cpython-36m.so', 'modules': {'_cpu': {'reason': 'none'}}}\n"
    )
    done = python("-m", "fusedopt", cwd=tree)
    assert done.returncode == 1
    assert_said(done.stderr, tree, "is a source tree that was not built")


def test_a_module_that_was_built_and_is_broken(tree: Path) -> None:
    (tree / f"fusedopt/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("no module")
    done = python("-m", "fusedopt", cwd=tree)
    assert done.returncode == 1
    assert "is not available (" in done.stderr
    assert "put that right and reinstall fusedopt" in done.stderr
    assert "source tree" not in done.stderr


def test_a_module_that_was_left_out_is_no_fault(tree: Path) -> None:
    reason = "FUSEDOPT_CPU=0 was set when fusedopt was built"
    config = {"modules": {"_cpu": {"built": False, "reason": reason, "compiler": "", "simd": []}}}
    (tree / "fusedopt/_build_config.py").write_text(f"BUILD_CONFIG = {config}\n")
    done = python("-m", "fusedopt", cwd=tree)
    assert done.returncode == 0, done.stderr
    assert (
        f"({reason}). For the CPU backend reinstall fusedopt without FUSEDOPT_CPU=0" in done.stderr
    )


def test_a_module_older_than_its_sources(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "PACKAGE", tree / "fusedopt")
    module = tree / f"fusedopt/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    source = tree / "csrc/cpu/kernels.cpp"
    source.parent.mkdir(parents=True)
    for path, time in ((module, 2000), (source, 1000)):
        path.touch()
        os.utime(path, (time, time))
    assert installation.stale() == []
    os.utime(source, (3000, 3000))
    assert installation.stale() == [module.name]
    report = {"backends": {"cpu": {"available": True}}, "openmp_libraries": [], "devices": {}}
    ((warning, is_broken),) = __main__.problems(report)
    assert f"{module.name} is older than the sources in csrc/; `pip install -e " in warning
    assert not is_broken


def test_nothing_is_hidden_by_an_installed_package() -> None:
    if native.unavailable_reason() is not None:
        pytest.skip("it has no native module")
    assert installation.obstacle("_cpu") is None
    assert Path(fusedopt.__file__).parent == installation.PACKAGE


@pytest.mark.parametrize(
    "reason",
    [
        "FUSEDOPT_SIMD='x' is not in this build or not on this CPU; use avx2",
        "other; reinstall fusedopt",
    ],
)
def test_a_reason_with_a_remedy_gets_no_other(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: reason)
    assert backends._remedy("cpu") == ""
