"""Build the native modules with ninja. setup.py says which there are, and calls this.

A module that cannot be built is left out with a reason, never an error, unless its switch says
that it must be there (FUSEDOPT_CPU=1). CONTRIBUTING.md lists the environment variables.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build_compilers import (
    CUDA_ARCHITECTURES,
    CUDA_NUMERIC_FLAGS,
    NUMERIC_FLAGS,
    VARIABLES,
    Env,
    NotBuilt,
    Tool,
    find_cxx,
    find_nvcc,
    identify_cxx,
    identify_nvcc,
    with_openmp,
    without_nvcc_variables,
)

if sys.platform != "win32":
    import fcntl

TOOLS = {"nvcc": find_nvcc}  # each with the C++ compiler beside it


@dataclass(frozen=True)
class Unit:
    """One object file: a source, and the flags that only it gets."""

    source: str
    simd: str = ""  # the instruction set this copy is for
    flags: tuple[str, ...] = ()
    machine: str = ""  # built only where the compiler targets this one; empty: everywhere
    python: bool = False  # includes Python.h or pybind11
    tool: str = "cxx"  # or a key of TOOLS

    @property
    def object_name(self) -> str:
        return self.source.replace("/", ".") + (f".{self.simd}" if self.simd else "") + ".o"


@dataclass(frozen=True)
class Module:
    name: str
    switch: str  # environment variable: 1 must be built, 0 must not, auto (default) if it can
    units: tuple[Unit, ...]
    openmp: bool = False


@dataclass
class Record:
    """What _build_config.py says about a module."""

    built: bool = False
    reason: str = ""
    compiler: str = ""
    flags: list[str] = field(default_factory=list)
    simd: list[str] = field(default_factory=list)
    openmp: bool = False
    architectures: list[str] = field(default_factory=list)


# ---- ninja --------------------------------------------------------------------------------------


def _find_ninja(env: Env) -> str:
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    found = shutil.which("ninja", path=env.get("PATH", ""))
    if not found:
        raise NotBuilt("ninja was not found; pip install ninja")
    return found


def _python_includes() -> list[str]:
    if importlib.util.find_spec("pybind11") is None:
        raise NotBuilt("pybind11 was not found; pip install pybind11")
    import pybind11

    return ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _command_line(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_text(name: str, units: Sequence[Unit], tools: Mapping[str, Tool], folder: Path) -> str:
    """build.ninja for the module `name`.

    A rule per object carries the whole command: ninja rebuilds what has another command than last
    time, and the depfile names the headers, so neither a new flag nor a new header is missed.
    """
    have = [f"-DFUSEDOPT_HAVE_{u.simd.upper()}" for u in units if u.simd]
    lines = [f"builddir = {_escape(str(folder))}"]
    objects = []
    for index, unit in enumerate(units):
        tool = tools[unit.tool]
        simd = [f"-DFUSEDOPT_SIMD={unit.simd}"] if unit.simd else have
        words = [*tool.command, *tool.compile_flags, *simd, *unit.flags]
        words += _python_includes() if unit.python else []
        if unit.tool == "cxx":
            words += [flag for other in tools.values() for flag in other.headers]
        objects.append(_escape(str(folder / unit.object_name)))
        lines += [
            f"rule compile{index}",
            f"  command = {_command_line(words)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = {unit.object_name}",
            f"build {objects[-1]}: compile{index} {_escape(unit.source)}",
        ]
    link_flags = [flag for tool in tools.values() for flag in tool.link_flags]
    lines += [
        "rule link",
        f"  command = {_command_line([*tools['cxx'].command])} $in -o $out "
        + _command_line(link_flags),
        f"build {_escape(str(folder / name))}.so: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def _jobs(env: Env) -> str:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    jobs = env.get("MAX_JOBS") or str(cores)
    if not jobs.isdecimal() or jobs == "0":
        raise NotBuilt(f"MAX_JOBS={jobs!r} is not a positive number")
    return jobs


def _run_ninja(module: Module, folder: Path, root: Path, env: Env) -> None:
    # from the root, so that sources are named csrc/... in messages and in __FILE__
    words = [_find_ninja(env), "-j", _jobs(env), "-f", str(folder / "build.ninja")]
    log = folder / f"{module.name}.log"
    with log.open("w") as out:
        env = {**without_nvcc_variables(env), "LC_ALL": "C"}
        status = subprocess.run(words, stdout=out, stderr=out, cwd=root, env=env).returncode
    if status == 0:
        return
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-20:]), file=sys.stderr)
    signs = re.compile(r"\b(error|fatal) *:|undefined reference|cannot find -l")
    first = next((line for line in lines if signs.search(line)), "no message")
    raise NotBuilt(f"compiling failed: {first.strip()} (all of it is in {log})")


# ---- what setup.py calls ------------------------------------------------------------------------


def build_key(modules: Sequence[Module], env: Env) -> str:
    """A name for everything that decides what is built, for the build directory.

    Builds of different kinds, say a sanitized one, then never mix, nor undo each other's objects.
    """
    facts: list[Any] = [sysconfig.get_config_var("EXT_SUFFIX"), repr(modules)]
    facts += [NUMERIC_FLAGS, CUDA_NUMERIC_FLAGS, CUDA_ARCHITECTURES]
    facts += [env.get(name, "") for name in (*VARIABLES, *(m.switch for m in modules))]
    for identify in (identify_cxx, identify_nvcc):
        try:
            facts.append(identify(env))
        except NotBuilt as problem:
            facts.append(str(problem))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:10]


def build(module: Module, target: Path, folder: Path, env: Env, root: Path = Path()) -> Record:
    """Build `module` into the file `target`, with everything on the way there in `folder`.

    Raises SystemExit where the switch says that the module must be there. `target` is what this
    build made or is gone: never what an earlier one left.
    """
    target.unlink(missing_ok=True)
    want = env.get(module.switch) or "auto"
    if want not in ("0", "1", "auto"):
        raise SystemExit(f"fusedopt: {module.switch}={want!r}: use 0, 1 or auto")
    record = Record()
    try:
        if want == "0":
            raise NotBuilt(f"{module.switch}=0 was set when fusedopt was built")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            _build(module, folder, env, root, record)
            shutil.copyfile(folder / f"{module.name}.so", target)
        record.built = True
    except (NotBuilt, OSError) as problem:
        record.reason = str(problem)
        if want == "1":
            text = f"{module.switch}=1, but {module.name} was not built: {problem}"
            raise SystemExit(f"fusedopt: {text}") from None
        print(f"fusedopt: installing without {module.name}: {problem}", file=sys.stderr)
    return record


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for another build in `folder` to end: two ninjas at once write the same objects."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed
        yield


def units_for(module: Module, machine: str) -> list[Unit]:
    return [unit for unit in module.units if unit.machine in ("", machine)]


def _build(module: Module, folder: Path, env: Env, root: Path, record: Record) -> None:
    cxx = find_cxx(env)
    if module.openmp:
        cxx = with_openmp(cxx, env)
        if not cxx.openmp:
            print(f"fusedopt: {module.name} uses one thread: no OpenMP in {cxx.version}",
                  file=sys.stderr)  # fmt: skip
    used = {unit.tool for unit in module.units} - {"cxx"}
    tools = {"cxx": cxx} | {name: TOOLS[name](env, cxx) for name in sorted(used)}
    units = units_for(module, cxx.machine)
    main = [*tools.values()][-1]
    record.compiler, record.openmp = main.version, cxx.openmp
    record.architectures = list(main.architectures)
    record.simd = [u.simd for u in units if u.simd]
    record.flags = list(main.compile_flags)
    (folder / "build.ninja").write_text(ninja_text(module.name, units, tools, folder))
    _run_ninja(module, folder, root, env)
