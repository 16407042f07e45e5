"""Where this package lies, what was built there, and which other fusedopt it hides."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
EXT_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")


def build_config() -> dict[str, Any]:
    """The record that setup.py wrote for this Python; empty if the package was not built for it."""
    try:
        written = importlib.import_module(f"{__package__}._build_config")
    except ImportError:
        return {}
    config: dict[str, Any] = written.BUILD_CONFIG
    ours = strange(written) is None and config.get("python", EXT_SUFFIX) == EXT_SUFFIX
    return config if ours else {}


def recorded_reason(module: str) -> str | None:
    """Why setup.py left a module out, or ``None``."""
    return build_config().get("modules", {}).get(module, {}).get("reason") or None


def obstacle(module: str) -> str | None:
    """Why a module that the build did not leave out has no file, or ``None``.

    The folder is then a source tree that was not built, or was built for another Python.
    """
    files = sorted(path.name for path in PACKAGE.glob(f"{module}.*") if path.suffix != ".pyi")
    if recorded_reason(module) or any(module + end in files for end in EXTENSION_SUFFIXES):
        return None
    if files:
        lack = f"was built for another Python ({files[0]}; this one needs {module}{EXT_SUFFIX})"
    else:
        lack = "is a source tree that was not built"
    other = hidden()
    hides = f", and hides the fusedopt that is installed in {other}" if other else ""
    return f"{PACKAGE.parent} {lack}{hides}"


def strange(module: Any) -> str | None:
    """The problem with a module that came from another fusedopt's folder, or ``None``.

    If this package hides an editable installation, the latter's finder supplies missing modules.
    """
    if Path(module.__file__).parent.resolve() == PACKAGE.resolve():
        return None
    return f"{module.__file__} belongs to another fusedopt than {PACKAGE}"


def hidden() -> Path | None:
    """The folder of another fusedopt, which Python would find if it did not find this one."""
    others = [entry for entry in sys.path if Path(entry).resolve() != PACKAGE.parent.resolve()]
    for finder in sys.meta_path:
        path = others if finder is PathFinder else None  # an editable finder needs none
        spec = getattr(finder, "find_spec", lambda *_: None)(__package__, path)
        if spec is not None and spec.origin:
            folder = Path(spec.origin).parent
            if folder.resolve() != PACKAGE.resolve():
                return folder
    return None


def stale() -> list[str]:
    """Modules of a source tree that are older than one of its sources, say after ``git pull``."""
    sources = (PACKAGE.parent / "csrc").rglob("*.*")
    newest = max((path.stat().st_mtime for path in sources), default=0.0)
    files = (PACKAGE / f"{module}{EXT_SUFFIX}" for module in ("_cpu", "_cuda"))
    return [file.name for file in files if file.exists() and file.stat().st_mtime < newest]


def remedy() -> str:
    """What to do about an ``obstacle``."""
    build = f"`pip install -e {shlex.quote(str(PACKAGE.parent))}` builds it"
    if hidden() is None:
        return build
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if any(entry and Path(entry).resolve() == PACKAGE.parent.resolve() for entry in entries):
        return f"{build}; or take it off PYTHONPATH"
    return f"{build}; or start Python in another folder"
