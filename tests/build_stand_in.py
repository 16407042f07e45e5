"""What the tests of the build build: a module of one source, or all of setup.py without sources.

And with what: a CUDA toolkit whose nvcc hands the source to the C++ compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


build_compilers = _load("build_compilers")
build_native = _load("build_native")
SHAPING = (*build_compilers.VARIABLES, "MAX_JOBS", "NVCC_THREADS")
ENV = {k: v for k, v in os.environ.items() if k not in SHAPING and not k.startswith("FUSEDOPT_")}


def problem_of(find, *arguments) -> str:
    """Why a compiler is not found."""
    try:
        find(*arguments)
    except build_compilers.NotBuilt as problem:
        return str(problem)
    return ""


NO_COMPILER = problem_of(build_compilers.find_cxx, ENV)
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)


SOURCE = """
#include "value.h"
#ifdef __FAST_MATH__
#error fast-math came through
#endif
#ifndef EXTRA
#define EXTRA 0
#endif
extern "C" __attribute__((visibility("default"))) int value() { return VALUE + EXTRA; }
"""


INIT = """
#include <Python.h>
static PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{0}", nullptr, -1,
    nullptr, nullptr, nullptr, nullptr, nullptr}};
PyMODINIT_FUNC PyInit_{0}() {{ return PyModule_Create(&module); }}
"""


class StandIn:
    """A module of one source and one header; each build goes into a file of its own name."""

    def __init__(self, root: Path, suffix: str = ".cpp", source: str = SOURCE):
        self.root, self.folder = root, root / "out put"
        self.numbers = itertools.count()
        self.source = f"stand_in{suffix}"
        units = (build_native.Unit(f"csrc/{self.source}"), build_native.Unit("csrc/init.cpp"))
        tool = "nvcc" if suffix == ".cu" else "cxx"
        self.module = build_native.Module("_stand_in", "FUSEDOPT_STAND_IN", tool, units)
        self.write("init.cpp", INIT.format("_stand_in"))
        self.write(self.source, source)
        self.write("value.h", "#define VALUE 1\n")

    def write(self, name: str, text: str):
        path = self.root / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build(self, target: Path | None = None, **env: str):
        # another name every time: dlopen gives the old library for a path it knows
        self.target = target or self.root / f"built{next(self.numbers)}.so"
        return build_native.build(self.module, self.target, self.folder, ENV | env, self.root)

    def value(self) -> int:
        return ctypes.CDLL(str(self.target)).value()

    @property
    def object_time(self) -> int:
        return (self.folder / f"csrc.{self.source}.o").stat().st_mtime_ns


def script(path: Path, text: str) -> Path:
    """A program in a folder that may have to be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def first_on_path(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder}{os.pathsep}{ENV['PATH']}"}


# What the build asks nvcc for, and compiling and linking by the C++ compiler. argv is logged.
NVCC = """\
#!{python}
import json, os, subprocess, sys
words = sys.argv[1:]
with open({folder!r} + "/log", "a") as log:
    log.write(json.dumps([words, sorted(k for k in os.environ if k.startswith("NVCC_"))]) + "\\n")
if "--version" in words:
    sys.exit(print("Cuda compilation tools, release {release}, V{release}.0"))
if "--list-gpu-code" in words:
    sys.exit(print("\\n".join(f"sm_{{n}}" for n in {codes!r})))
if {fails!r}:
    open(words[words.index("-o") + 1], "w").write("half an object")
    sys.exit({fails!r})
passed = ["-x", "c++"] if "-c" in words else ["-shared"]
for word in words:
    if word.startswith("-Xcompiler="):
        passed.append(word.partition("=")[2].replace("\\\\,", ","))
    elif word in ("-MMD", "-MF", "-c", "-o", "-isystem") or not word.startswith("-"):
        passed.append(word)
sys.exit(subprocess.call(["c++", *passed]))
"""


class Toolkit:
    """A folder laid out as a CUDA toolkit, with the nvcc above."""

    def __init__(self, root, release="12.8", codes=("50", "75", "80", "90"), fails=""):
        self.root, self.log = root, root / "log"  # argv of each call, and NVCC_ variables it saw
        values = {"release": release, "codes": codes, "fails": fails}
        script(root / "bin/nvcc", NVCC.format(python=sys.executable, folder=str(root), **values))
        self.on_path = first_on_path(root / "bin")

    def called(self, word: str) -> list[str]:
        """argv of the last call with this word."""
        calls = [json.loads(line)[0] for line in self.log.read_text().splitlines()]
        return [words for words in calls if word in words][-1]


def table():
    """The modules of setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        patch.setattr("sys.path", [*sys.path])  # setup.py puts the checkout first
        patch.chdir(ROOT)
        return runpy.run_path(str(ROOT / "setup.py"))["MODULES"]


class Project:
    """This project with stand-ins for its sources."""

    def __init__(self, root: Path, modules):
        self.root = root
        for name in (
            "setup.py", "build_native.py", "build_compilers.py", "pyproject.toml", "LICENSE",
        ):  # fmt: skip
            shutil.copy(ROOT / name, root)
        (root / "README.md").touch()
        (root / "fusedopt").mkdir()
        init = '__version__ = "0.1.0"\nimport torch_is_absent\n'
        (root / "fusedopt/__init__.py").write_text(init)
        self.sources = [root / unit.source for module in modules for unit in module.units]
        for source in self.sources:
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text("")
        for module in modules:
            (root / f"csrc/{module.name[1:]}/bindings.cpp").write_text(INIT.format(module.name))

    def run(self, *words: str, **env: str):
        words = (sys.executable, *words)
        env = ENV | {"FUSEDOPT_CUDA": "0"} | env
        return subprocess.run(words, cwd=self.root, env=env, capture_output=True, text=True)

    def wheel(self, **env: str) -> tuple[str, list[str], dict]:
        """Build a wheel: its tags, the names inside, what it records about each module."""
        shutil.rmtree(self.root / "dist", ignore_errors=True)
        done = self.run("setup.py", "-q", "bdist_wheel", **env)
        assert done.returncode == 0, done.stderr
        (path,) = (self.root / "dist").iterdir()
        with zipfile.ZipFile(path) as wheel:
            config: dict = {}
            exec(wheel.read("fusedopt/_build_config.py"), config)
            names = wheel.namelist()
        return path.stem.split("-", 2)[2], names, config["BUILD_CONFIG"]["modules"]

    @property
    def native_in_tree(self) -> list[str]:
        return [path.name for path in (self.root / "fusedopt").glob("_cpu*")]
