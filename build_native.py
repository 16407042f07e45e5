"""Build the native modules with ninja. setup.py says which there are, and calls this.

A module for which there is no compiler, or only one that fails, is left out with a reason. It is an
error where the switch says that the module must be there (FUSEDOPT_CPU=1), where an environment
variable is wrong, and where the disk is full. CONTRIBUTING.md lists the variables.
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
    NUMERIC_FLAGS,
    SETTINGS,
    VARIABLES,
    Env,
    LeftOut,
    NotBuilt,
    Refused,
    Tool,
    failure,
    find_cxx,
    identify_cxx,
    number_in,
    with_openmp,
)
from build_cuda import (
    CUDA_ARCHITECTURES,
    CUDA_NUMERIC_FLAGS,
    find_nvcc,
    identify_nvcc,
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

    @property
    def tool(self) -> str:
        """The compiler that its kernels are for."""
        return next((unit.tool for unit in self.units if unit.tool != "cxx"), "cxx")


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
        raise Refused("ninja was not found; pip install ninja, or leave out --no-build-isolation")
    return found


def _python_includes() -> list[str]:
    if importlib.util.find_spec("pybind11") is None:
        raise Refused(
            "pybind11 was not found; pip install pybind11, or leave out --no-build-isolation"
        )
    import pybind11

    headers = sysconfig.get_paths()["include"]
    if not Path(headers, "Python.h").exists():
        raise NotBuilt(
            f"there is no Python.h in {headers}; install this Python's headers "
            "(python3-dev or python3-devel)"
        )
    return ["-isystem", pybind11.get_include(), "-isystem", headers]


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
    return number_in(env, "MAX_JOBS", 1) or str(cores)


def _run_ninja(module: Module, folder: Path, root: Path, env: Env) -> None:
    # from the root, so that sources are named csrc/... in messages and in __FILE__
    words = [_find_ninja(env), "-j", _jobs(env), "-f", str(folder / "build.ninja")]
    log = folder / f"{module.name}.log"
    env = {**without_nvcc_variables(env), "LC_ALL": "C"}
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", cwd=root, env=env)  # fmt: skip
    log.write_text(done.stdout)
    if done.returncode != 0:
        print("\n".join(done.stdout.splitlines()[-20:]), file=sys.stderr)
        problem = failure("compiling failed", done.stdout)
        raise type(problem)(f"{problem} (all of it is in {log})")


IMPORT = """import importlib.util, sys
spec = importlib.util.spec_from_file_location(*sys.argv[1:])
spec.loader.exec_module(importlib.util.module_from_spec(spec))"""
# Names of the C++ library, as the compiler writes them.
STANDARD_LIBRARY = re.compile(
    r"undefined symbol: (_Z(N?K?S|T[VI]N10__cxxabiv1|n[wa]|d[al])|__(cxa|gxx)_)"
)


def _import(name: str, library: Path, env: Env) -> None:
    """Import what was built, in a Python of its own, before anybody gets it."""
    if env.get("FUSEDOPT_SANITIZE"):
        return  # the sanitizers' runtimes would have to be preloaded; .ci/sanitize imports it so
    words = [sys.executable, "-I", "-S", "-c", IMPORT, name, str(library.resolve())]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=dict(env))
    if done.returncode == 0:
        return
    said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    if STANDARD_LIBRARY.search(said):
        said += "; the C++ library is missing: CXX has to name a C++ compiler, such as g++"
    raise NotBuilt(f"it was compiled and cannot be imported: {said}")


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

    Raises SystemExit where the switch says that the module must be there, and where a setting or
    the disk is to blame. `target` is what this build made or is gone: never what an earlier one
    left.
    """
    want = env.get(module.switch) or "auto"
    if want not in ("0", "1", "auto"):
        raise SystemExit(f"fusedopt: {module.switch}={want!r}: use 0, 1 or auto")
    record = Record()
    try:
        target.unlink(missing_ok=True)
        if want == "0":
            raise LeftOut(f"{module.switch}=0 was set when fusedopt was built")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            _build(module, folder, env, root, record)
            _import(module.name, folder / f"{module.name}.so", env)
            shutil.copyfile(folder / f"{module.name}.so", target)
        record.built = True
    except (NotBuilt, OSError) as problem:
        with contextlib.suppress(OSError):
            target.unlink()  # half a copy
        record.reason = str(problem)
        if want == "1":
            text = f"{module.switch}=1, but {module.name} was not built: {problem}"
            raise SystemExit(f"fusedopt: {text}") from None
        _fail_where_asked_for(module, problem, env)
        print(f"fusedopt: installing without {module.name}: {problem}", file=sys.stderr)
    return record


def _fail_where_asked_for(module: Module, problem: NotBuilt | OSError, env: Env) -> None:
    """Do without the module only where no setting of the user's and no lack of space is to blame.

    Raises SystemExit otherwise.
    """
    names = SETTINGS[module.tool] if not isinstance(problem, (LeftOut, Refused, OSError)) else ()
    settings = ", ".join(f"{name}={env[name]!r}" for name in names if env.get(name))
    if settings or isinstance(problem, (Refused, OSError)):
        blame = f"; correct or unset {settings}" if settings else ""
        raise SystemExit(
            f"fusedopt: {module.name} was not built: {problem}{blame}; "
            f"{module.switch}=0 installs without it"
        ) from None


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
