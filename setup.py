"""Everything about the package stands in pyproject.toml; here is only the native build.

`_cpu` and `_cuda` are left out, with one line saying why, where they cannot be built: the package
then works without them. What was built is recorded in the generated fusedopt/_build_config.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path
from pprint import pformat

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # not there in an isolated build

import build_native  # noqa: E402
from build_native import Module, Unit  # noqa: E402

PACKAGE = "fusedopt"
X86_64 = "x86_64"
# A loop of seven instructions is a third slower where it begins in one cache line and ends in the
# next.
LOOPS_ON_LINES = "-falign-loops=64"
AVX2 = ("-mavx2", "-mfma", "-mf16c", LOOPS_ON_LINES)
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
          "-mprefer-vector-width=512", LOOPS_ON_LINES)  # fmt: skip
CPU = (
    Unit("csrc/cpu/bindings.cpp"),  # first, because it takes longest
    Unit("csrc/cpu/kernels.cpp", "generic"),
    Unit("csrc/cpu/kernels.cpp", "avx2", AVX2, X86_64),
    Unit("csrc/cpu/kernels.cpp", "avx512", AVX512, X86_64),
    Unit("csrc/cpu/dispatch.cpp"),
    Unit("csrc/watch/watch.cpp"),
)
CUDA = (
    Unit("csrc/cuda/kernels.cu"),
    Unit("csrc/cuda/exact.cu"),
    Unit("csrc/cuda/bindings.cpp"),
)
MODULES = (
    Module("_cpu", "FUSEDOPT_CPU", "cxx", CPU),
    Module("_cuda", "FUSEDOPT_CUDA", "nvcc", CUDA),
)
BUILD_BASE = Path("build", build_native.build_key(MODULES, os.environ))


def git_commit() -> str:
    """The commit of this checkout, with a + where files differ from it; empty if unknown."""
    git = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]  # none of a folder above
    describe = ["describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError):
        return subprocess.run([*git, *describe], capture_output=True, text=True).stdout.strip()
    return ""


class BuildPython(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            # a file deleted since the last build must not be shipped
            shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    def run(self) -> None:
        package = ROOT / PACKAGE if self.inplace else Path(self.build_lib, PACKAGE)
        package.mkdir(parents=True, exist_ok=True)
        records = {}
        for module in MODULES:
            target = package / Path(self.get_ext_filename(f"{PACKAGE}.{module.name}")).name
            folder = BUILD_BASE / module.name
            records[module.name] = build_native.build(module, target, folder, os.environ, ROOT)
        self.extensions = [e for e in self.extensions if records[e.name.partition(".")[2]].built]
        config = {
            "version": self.distribution.get_version(),
            "commit": git_commit(),
            "python": sysconfig.get_config_var("EXT_SUFFIX"),
            "modules": {name: asdict(record) for name, record in records.items()},
        }
        (package / "_build_config.py").write_text(
            '"""How this installation was built; written by setup.py."""\n\n'
            "from typing import Any\n\n"
            f"BUILD_CONFIG: dict[str, Any] = {pformat(config, width=96, sort_dicts=False)}\n"
        )


class Wheel(bdist_wheel):
    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build" and not self.get_finalized_command("build_ext").extensions:
            # only Python inside: tag the wheel py3-none-any
            self.distribution.ext_modules = []
            self.root_is_pure = True


setup(
    ext_modules=[Extension(f"{PACKAGE}.{module.name}", sources=[]) for module in MODULES],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"build": {"build_base": str(BUILD_BASE)}},
)
