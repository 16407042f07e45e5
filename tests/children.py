"""Code in a process of its own, and the folders in which it finds the helpers of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def in_a_child(code: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDOPT_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=cwd, env={**kept, **environ}, capture_output=True, text=True, timeout=120
    )


def helpers_of(*subjects: str) -> str:
    """A PYTHONPATH: tests/, the folders of these subjects, and what is on it already."""
    folders = [TESTS, *(TESTS / subject for subject in subjects)]
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
