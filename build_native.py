"""Build a native module with ninja. setup.py says which there are, and calls this.

A module for which there is no compiler, or only one that fails, is left out with a reason. It is an
error where the switch says that the module must be there (FUSEDOPT_CPU=1), where an environment
variable is wrong, and where the disk is full. docs/building.md lists the variables.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import build_compilers as compilers
from build_compilers import Env, LeftOut, NotBuilt, Refused, Tool, find_cxx, find_nvcc, with_openmp

with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

# A rule for each object, with the whole command: ninja compiles again what has another command
# than last time. The depfile names the headers.
RULE = """rule compile{0}
  command = {1} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
build {2}: compile{0} {3}
"""
LINK = "rule link\n  command = {} $in -o $out {}\nbuild {}: link {}\n"
IMPORT = """import importlib.util, sys
spec = importlib.util.spec_from_file_location(*sys.argv[1:])
spec.loader.exec_module(importlib.util.module_from_spec(spec))"""
# Names of the C++ library, as the compiler writes them.
LIBRARY = r"undefined symbol: (_Z(N?K?S|T[VI]N10__cxxabiv1|n[wa]|d[al])|__(cxa|gxx)_)"


@dataclass(frozen=True)
class Unit:
    """One object file: a source, and the flags that only it gets."""

    source: str
    simd: str = ""  # the instruction set this copy is for
    flags: tuple[str, ...] = ()
    machine: str = ""  # built only where the compiler targets this one; empty: everywhere

    @property
    def object_name(self) -> str:
        return self.source.replace("/", ".") + (f".{self.simd}" if self.simd else "") + ".o"


@dataclass(frozen=True)
class Module:
    name: str
    switch: str  # environment variable: 1 must be built, 0 must not, auto (default) if it can
    tool: str  # that compiles and links it: cxx or nvcc
    units: tuple[Unit, ...]

    def units_for(self, machine: str) -> list[Unit]:
        return [unit for unit in self.units if unit.machine in ("", machine)]


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


def build_key(modules: Sequence[Module], env: Env) -> str:
    """A name for everything that decides what is built, for the build directory.

    Builds of different kinds, say a sanitized one, then never mix, nor undo each other's objects.
    """
    names = (*compilers.VARIABLES, *(module.switch for module in modules))
    facts = [sysconfig.get_config_var("EXT_SUFFIX"), *map(env.get, names)]
    for find in (find_cxx, compilers.identify_nvcc):
        try:
            facts.append(find(env))
        except NotBuilt as problem:
            facts.append(str(problem))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:10]


def build(module: Module, target: Path, folder: Path, env: Env, root: Path = Path()) -> Record:
    """Build `module` into the file `target`, with everything on the way there in `folder`.

    Raises SystemExit where the switch says that the module must be there, and where a setting or
    the machine is to blame. `target` is what this build made or is gone: never what an earlier one
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
        if sys.platform == "win32":
            raise LeftOut("there is no native build for Windows yet")
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two ninjas at once write the same objects
            library = _compile(module, folder, env, root, record)
            _import(module.name, library, env)
            shutil.copyfile(library, target)
        record.built = True
    except (NotBuilt, OSError) as problem:
        with contextlib.suppress(OSError):
            target.unlink()  # half a copy
        record.reason = str(problem)
        text = f"{module.name} was not built: {problem}"
        if want == "1":
            raise SystemExit(f"fusedopt: {module.switch}=1, but {text}") from None
        refused = isinstance(problem, (Refused, OSError))
        given = [f"{n}={env[n]!r}" for n in compilers.SETTINGS[module.tool] if env.get(n)]
        if given and not refused and not isinstance(problem, LeftOut):
            text, refused = f"{text}; correct or unset {', '.join(given)}", True
        if refused:
            raise SystemExit(f"fusedopt: {text}; {module.switch}=0 installs without it") from None
        print(f"fusedopt: installing without {module.name}: {problem}", file=sys.stderr)
    return record


def _compile(module: Module, folder: Path, env: Env, root: Path, record: Record) -> Path:
    tool = find_cxx(env)
    if module.tool == "nvcc":
        tool = find_nvcc(env, tool)
    else:
        tool = with_openmp(tool, env)
        if not tool.openmp:
            text = f"{module.name} uses one thread: no OpenMP in {tool.version}"
            print(f"fusedopt: {text}", file=sys.stderr)
    record.compiler, record.openmp, record.flags = tool.version, tool.openmp, tool.compile_flags
    record.simd = [unit.simd for unit in module.units_for(tool.machine) if unit.simd]
    record.architectures = tool.architectures
    (folder / "build.ninja").write_text(ninja_text(module, tool, folder))
    ninja = shutil.which("ninja", path=env.get("PATH", ""))
    if importlib.util.find_spec("ninja") or not ninja:
        ninja = str(Path(_required("ninja").BIN_DIR, "ninja"))  # "" for: on PATH
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    jobs = compilers.number(env, "MAX_JOBS", 1) or str(cores)
    # from the root, so that sources are named csrc/... in messages and in __FILE__
    words = [ninja, "-j", jobs, "-f", str(folder / "build.ninja")]
    status, said = compilers.run(words, env, cwd=root)
    log = folder / f"{module.name}.log"
    log.write_text(said)
    if status:
        print("\n".join(said.splitlines()[-20:]), file=sys.stderr)
        raise compilers.failure("compiling failed", said, f" (all of it is in {log})")
    return folder / f"{module.name}.so"


def ninja_text(module: Module, tool: Tool, folder: Path) -> str:
    units = module.units_for(tool.machine)
    have = [f"-DFUSEDOPT_HAVE_{unit.simd.upper()}" for unit in units if unit.simd]
    text, objects = f"builddir = {_path(folder)}\n", []
    for index, unit in enumerate(units):
        words = [*tool.command, *tool.compile_flags, *unit.flags]
        words += [f"-DFUSEDOPT_SIMD={unit.simd}"] if unit.simd else have
        words += _python_headers()
        objects.append(_path(folder / unit.object_name))
        text += RULE.format(index, _shell(words), objects[-1], _path(unit.source))
    library, link_flags = _path(folder / f"{module.name}.so"), _shell(tool.link_flags)
    return text + LINK.format(_shell(tool.command), link_flags, library, " ".join(objects))


def _path(path: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _shell(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _required(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        remedy = f"pip install {name}, or leave out --no-build-isolation"
        raise Refused(f"{name} was not found; {remedy}")
    return importlib.import_module(name)


def _python_headers() -> list[str]:
    pybind11, headers = _required("pybind11"), sysconfig.get_paths()["include"]
    if not Path(headers, "Python.h").exists():
        remedy = "install this Python's headers (python3-dev or python3-devel)"
        raise NotBuilt(f"there is no Python.h in {headers}; {remedy}")
    return ["-isystem", pybind11.get_include(), "-isystem", headers]


def _import(name: str, library: Path, env: Env) -> None:
    """Import what was built, in a Python of its own, before anybody gets it."""
    if env.get("FUSEDOPT_SANITIZE"):
        return  # the sanitizers' runtimes would have to be preloaded; .ci/sanitize imports it so
    words = [sys.executable, "-I", "-S", "-c", IMPORT, name, str(library.resolve())]
    status, said = compilers.run(words, env)
    if status:
        said = (said.strip() or f"exit status {status}").splitlines()[-1]
        if re.search(LIBRARY, said):
            said += "; the C++ library is missing: CXX has to name a C++ compiler, such as g++"
        raise NotBuilt(f"it was compiled and cannot be imported: {said}")
