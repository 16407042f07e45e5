"""A package that Python finds first and nobody built: that is said, with what helps."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fusedopt
from fusedopt import __main__, installation
from fusedopt.backends import cpu as native, modules, registry as backends

STEP = """
import torch, fusedopt
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
fusedopt.FusedAdamW([p]).step()
"""
INSTALLED = Path(fusedopt.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NOT_BUILT = "is a source tree that was not built"
ELSEWHERE = "or start Python in another folder"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A clone, as far as Python goes."""
    root = tmp_path / "my clone"
    ignored = shutil.ignore_patterns("*.so", "_build_config.py", "__pycache__")
    shutil.copytree(installation.PACKAGE, root / "fusedopt", ignore=ignored)
    return root


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDOPT_", "PYTHON"))}
    kept["PYTHONPATH"] = str(INSTALLED.parent)  # is installed, whatever the tests run
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=kept, capture_output=True, text=True
    )


def assert_said(text: str, tree: Path, lack: str, remedy: str = ELSEWHERE) -> None:
    hides = f"and hides the fusedopt that is installed in {INSTALLED}"
    assert f"{tree} {lack}, {hides}" in text
    assert f"`pip install -e {shlex.quote(str(tree))}` builds it; {remedy}" in text
    assert "compiler" not in text


def test_a_clone_that_nobody_built_is_told_by_the_warning(tree: Path) -> None:
    done = python("-c", STEP, cwd=tree)
    assert done.returncode == 0, done.stderr
    assert_said(done.stderr, tree, NOT_BUILT)
    assert done.stderr.startswith("<string>:5: FusedOptFallbackWarning: ")


def test_a_clone_that_nobody_built_is_told_by_the_report(tree: Path) -> None:
    done = python("-m", "fusedopt", cwd=tree)
    assert done.returncode == 1
    assert_said(done.stderr, tree, NOT_BUILT)
    assert "commit unknown" in done.stdout
    assert "self-test ok" in done.stdout
    assert done.stderr.count("is a source tree") == 1


class Clone:
    """The package of this process, as if it lay in another folder."""

    def __init__(self, tree: Path, patch: pytest.MonkeyPatch) -> None:
        self.tree, self.patch = tree, patch
        patch.setattr(installation, "PACKAGE", tree / "fusedopt")

    def record(self, **config: Any) -> None:
        """Of setup.py's, in _build_config.py."""
        name = "fusedopt._build_config"
        written = ModuleType(name)
        written.__file__ = str(self.tree / "fusedopt/_build_config.py")
        vars(written)["BUILD_CONFIG"] = config
        self.patch.setitem(sys.modules, name, written)

    def report(self) -> tuple[str, bool]:
        """What the report warns of, and whether something is broken."""
        module, reason = modules.load.__wrapped__("_cpu")
        assert module is None
        self.patch.setattr(native, "_reason", reason)
        report = {"backends": backends.report(), "openmp_libraries": [], "devices": {}}
        ((warning, is_broken),) = __main__.problems(report)
        return warning, is_broken


@pytest.fixture
def clone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    return Clone(tree, monkeypatch)


def test_on_pythonpath(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{clone.tree}{os.pathsep}{INSTALLED.parent}"
    monkeypatch.setenv("PYTHONPATH", path)
    warning, is_broken = clone.report()
    assert_said(warning, clone.tree, NOT_BUILT, "or take it off PYTHONPATH")
    assert is_broken


def test_built_by_another_python(clone: Clone) -> None:
    """Its record says nothing: it may have had no compiler."""
    clone.record(python=".cpython-36m.so", modules={"_cpu": {"reason": "none"}})
    warning, is_broken = clone.report()
    assert_said(warning, clone.tree, NOT_BUILT)
    assert is_broken
    (clone.tree / "fusedopt/_cpu.cpython-36m.so").touch()
    warning, is_broken = clone.report()
    lack = f"was built for another Python (_cpu.cpython-36m.so; this one needs _cpu{SUFFIX})"
    assert_said(warning, clone.tree, lack)
    assert is_broken


def test_a_module_that_was_built_and_is_broken(tree: Path) -> None:
    (tree / f"fusedopt/_cpu{SUFFIX}").write_text("no module")
    done = python("-m", "fusedopt", cwd=tree)
    assert done.returncode == 1
    assert "is not available (" in done.stderr
    assert "put that right and reinstall fusedopt" in done.stderr
    assert "source tree" not in done.stderr


def test_a_module_that_was_left_out_is_no_fault(clone: Clone) -> None:
    reason = "FUSEDOPT_CPU=0 was set when fusedopt was built"
    clone.record(modules={"_cpu": {"built": False, "reason": reason}})
    warning, is_broken = clone.report()
    assert not is_broken
    assert f"({reason}). For the CPU backend reinstall fusedopt without FUSEDOPT_CPU=0" in warning


def test_a_module_older_than_its_sources(clone: Clone) -> None:
    module, source = clone.tree / f"fusedopt/_cpu{SUFFIX}", clone.tree / "csrc/cpu/kernels.cpp"
    source.parent.mkdir(parents=True)
    for path, time in ((module, 2000), (source, 1000)):
        path.touch()
        os.utime(path, (time, time))
    assert installation.stale() == []
    os.utime(source, (3000, 3000))
    report = {"backends": {"cpu": {"available": True}}, "openmp_libraries": [], "devices": {}}
    ((warning, is_broken),) = __main__.problems(report)
    assert f"{module.name} is older than the sources in csrc/; `pip install -e " in warning
    assert not is_broken


def test_nothing_is_hidden_by_an_installed_package() -> None:
    if native.unavailable_reason() is not None:
        pytest.skip("it has no native module")
    assert installation.obstacle("_cpu") is None
    assert INSTALLED == installation.PACKAGE


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
