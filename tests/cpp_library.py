"""A few lines of C++ over the headers in csrc, compiled as the kernels are, loaded by ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
NUMERIC_FLAGS = ["-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def compiled(text: str) -> ctypes.CDLL:
    """``text`` as a library; skips the test where there is no compiler, or there are no sources."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler or not CSRC.is_dir():
        pytest.skip("no C++ compiler, or no sources")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "library.cpp"), Path(folder, "library.so")
        source.write_text(text)
        flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-I", str(CSRC), *NUMERIC_FLAGS]
        command = [*compiler.split(), *flags, str(source), "-o", str(library), "-lm"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))
