"""Build the native modules with ninja. setup.py says which there are, and calls this.

A module that cannot be built is left out with a reason, never an error, unless its switch says
that it must be there (FUSEDOPT_CPU=1). CONTRIBUTING.md lists the environment variables.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Env = Mapping[str, str]


@dataclass(frozen=True)
class Unit:
    """One object file: a source, and the flags that only it gets."""

    source: str
    simd: str = ""  # the instruction set this copy is for
    flags: tuple[str, ...] = ()
    machine: str = ""  # built only where the compiler targets this one; empty: everywhere
    python: bool = False  # includes Python.h or pybind11
    tool: str = "cxx"  # key of TOOLS

    @property
    def object_name(self) -> str:
        return self.source.replace("/", ".") + (f".{self.simd}" if self.simd else "") + ".o"


@dataclass(frozen=True)
class Module:
    name: str
    switch: str  # environment variable: 1 must be built, 0 must not, auto (default) if it can
    units: tuple[Unit, ...]


# The numeric contract: every rounding stands in the source, so that each instruction set and
# compiler gives the same bits. After CXXFLAGS, so that no -ffast-math from there survives.
# errno and traps are about side effects of the maths, not its values.
NUMERIC_FLAGS = ("-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


class NotBuilt(Exception):
    """Why a module cannot be built, in one line."""


@dataclass(frozen=True)
class Tool:
    """A compiler: its command line up to the flags of a unit, and what linking with it takes."""

    command: tuple[str, ...]
    version: str
    machine: str  # the target's name begins with it, say x86_64
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
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


def wanted(module: Module, env: Env) -> str:
    value = env.get(module.switch, "auto") or "auto"
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"fusedopt: {module.switch}={value!r}: use 0, 1 or auto")
    return value


# ---- compilers ----------------------------------------------------------------------------------


def _output_of(command: list[str], env: Env) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                          timeout=60, env=dict(env))  # fmt: skip
    if done.returncode != 0:
        raise OSError(f"exit status {done.returncode}")
    return done.stdout.strip()


def _find_command(env: Env) -> list[str]:
    path, chosen = env.get("PATH", ""), env.get("CXX", "").strip()
    if chosen:
        command = _split(env, "CXX")
        if not shutil.which(command[0], path=path):
            raise NotBuilt(f"the C++ compiler CXX={chosen} was not found")
        return command
    names = ("c++", "g++", "clang++")
    for name in names:
        if shutil.which(name, path=path):
            return [name]
    looked = ", ".join(names)
    raise NotBuilt(f"no C++ compiler on PATH (looked for {looked}); install g++ or set CXX")


def _split(env: Env, name: str) -> list[str]:
    try:
        return shlex.split(env.get(name, ""))
    except ValueError as error:
        raise NotBuilt(f"{name}={env[name]!r} cannot be read: {error}") from None


def _identify_cxx(env: Env) -> tuple[list[str], str, str]:
    """Command, target machine and version of the C++ compiler."""
    if os.name == "nt":
        raise NotBuilt("there is no native build for Windows yet")
    command = _find_command(env)
    try:
        machine = _output_of([*command, "-dumpmachine"], env).partition("-")[0]
        version = _output_of([*command, "--version"], env).splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired) as error:
        reason = f"{shlex.join(command)} does not work as a gcc or clang compiler: {error}"
        raise NotBuilt(reason) from None
    return command, machine, version


def _has_openmp(command: list[str], flags: list[str], env: Env) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
        words = [*command, *flags, "-fopenmp", "-shared", "-fPIC", str(probe), "-o", f"{probe}.so"]
        return subprocess.run(words, capture_output=True, env=dict(env)).returncode == 0


def find_cxx(env: Env) -> Tool:
    """gcc or clang, with the flags that every C++ file gets."""
    command, machine, version = _identify_cxx(env)
    user, user_link = _split(env, "CXXFLAGS"), _split(env, "LDFLAGS")
    openmp = _has_openmp(command, [*user, *user_link], env)
    optimize, sanitize = ["-O3", "-DNDEBUG"], []
    if env.get("FUSEDOPT_SANITIZE"):
        optimize = ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
        sanitize = [f"-fsanitize={env['FUSEDOPT_SANITIZE']}", "-fno-sanitize-recover=all"]
    compile_flags = [
        "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc",
        *optimize, *user, *NUMERIC_FLAGS, *sanitize, "-fopenmp" if openmp else "-fopenmp-simd",
    ]  # fmt: skip
    link_flags = ["-shared", *user_link, *sanitize, *(["-fopenmp"] if openmp else [])]
    if sys.platform == "darwin":
        link_flags[:1] = ["-bundle", "-undefined", "dynamic_lookup"]
    return Tool(tuple(command), version, machine, tuple(compile_flags), tuple(link_flags), openmp)


TOOLS = {"cxx": find_cxx}


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
        status = subprocess.run(words, stdout=out, stderr=out, cwd=root,
                                env={**env, "LC_ALL": "C"}).returncode  # fmt: skip
    if status == 0:
        return
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-20:]), file=sys.stderr)
    signs = ("error:", "undefined reference")
    first = next((line for line in lines if any(sign in line for sign in signs)), "no message")
    raise NotBuilt(f"compiling failed: {first.strip()} (all of it is in {log})")


# ---- what setup.py calls ------------------------------------------------------------------------


def build_key(modules: Sequence[Module], env: Env) -> str:
    """A name for everything that decides what is built, for the build directory.

    Builds of different kinds, say a sanitized one, then never mix, nor undo each other's objects.
    """
    facts: list[Any] = [sysconfig.get_config_var("EXT_SUFFIX"), repr(modules), NUMERIC_FLAGS]
    names = ("CXX", "CXXFLAGS", "LDFLAGS", "FUSEDOPT_SANITIZE", *(m.switch for m in modules))
    facts += [env.get(name, "") for name in names]
    try:
        facts += _identify_cxx(env)
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
        _build(module, folder, env, root, record)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / f"{module.name}.so", target)
        record.built = True
    except (NotBuilt, OSError) as problem:
        record.reason = str(problem)
        if want == "1":
            text = f"{module.switch}=1, but {module.name} was not built: {problem}"
            raise SystemExit(f"fusedopt: {text}") from None
        print(f"fusedopt: installing without {module.name}: {problem}", file=sys.stderr)
    return record


def units_for(module: Module, machine: str) -> list[Unit]:
    return [unit for unit in module.units if unit.machine in ("", machine)]


def _build(module: Module, folder: Path, env: Env, root: Path, record: Record) -> None:
    tools = {name: TOOLS[name](env) for name in {"cxx": 0} | {u.tool: 0 for u in module.units}}
    cxx = tools["cxx"]
    units = units_for(module, cxx.machine)
    record.compiler, record.openmp = cxx.version, cxx.openmp
    record.simd = [u.simd for u in units if u.simd]
    record.flags = list(cxx.compile_flags)
    if not cxx.openmp:
        print(f"fusedopt: {module.name} uses one thread: no OpenMP in {cxx.version}",
              file=sys.stderr)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_text(module.name, units, tools, folder))
    _run_ninja(module, folder, root, env)
