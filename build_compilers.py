"""The C++ compiler of the native modules: where it is, and the flags that every file gets."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

Env = Mapping[str, str]

# The numeric contract: every rounding stands in the source, so that each instruction set and
# compiler gives the same bits. After CXXFLAGS, so that no -ffast-math from there survives.
# errno and traps are about side effects of the maths, not its values.
NUMERIC_FLAGS = ("-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# At the link they would add code that switches denormals off for the whole process at import.
LINKED_FAST_MATH = {"-Ofast", "-ffast-math", "-funsafe-math-optimizations"}

NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # nvcc itself reads these
# Environment variables that choose a compiler or its flags.
SETTINGS = {
    "cxx": ("CXX", "CXXFLAGS", "LDFLAGS", "FUSEDOPT_SANITIZE"),
    "nvcc": ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", *NVCC_VARIABLES),
}
VARIABLES = tuple(name for names in SETTINGS.values() for name in names)

ERRORS = re.compile(r"\b(error|fatal) *:|undefined reference|cannot find -l")
# The machine's fault, and not the compiler's: it says nothing about what can be built here.
RESOURCES = re.compile(
    "No space left on device|Disk quota exceeded|Read-only file system|Permission denied"
    "|Input/output error|Cannot allocate memory|out of memory|Killed"
)


class NotBuilt(Exception):
    """Why a module cannot be built, in one line."""


class LeftOut(NotBuilt):
    """It was not asked for, or there is no compiler."""


class Refused(NotBuilt):
    """A setting is wrong, or the machine is out of something: no reason to do without."""


def failure(what: str, said: str) -> NotBuilt:
    """What a compiler said when it failed, in one line."""
    lines = said.splitlines()
    lacking = next((line for line in lines if RESOURCES.search(line)), "")
    first = lacking or next((line for line in lines if ERRORS.search(line)), "no message")
    return (Refused if lacking else NotBuilt)(f"{what}: {first.strip()}")


@dataclass(frozen=True)
class Tool:
    """A compiler: its command line up to the flags of a unit, and what linking with it takes."""

    command: tuple[str, ...]
    version: str
    machine: str  # the target's name begins with it, say x86_64
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    openmp: bool = False
    headers: tuple[str, ...] = ()  # flags for the C++ files beside its own
    architectures: tuple[str, ...] = ()


def output_of(command: list[str], env: Env) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                          timeout=60, env=dict(env))  # fmt: skip
    if done.returncode != 0:
        raise OSError(f"`{command[-1]}` ends with exit status {done.returncode}")
    return done.stdout.strip()


def split(env: Env, name: str) -> list[str]:
    try:
        return shlex.split(env.get(name, ""))
    except ValueError as error:
        raise Refused(f"{name}={env[name]!r} cannot be read: {error}") from None


def chosen_command(env: Env, name: str, kind: str) -> list[str]:
    """The command in the environment variable `name`; empty if there is none."""
    command = split(env, name)
    if command and not shutil.which(command[0], path=env.get("PATH", "")):
        raise Refused(
            f"the {kind} compiler {name}={env[name].strip()} was not found; correct or unset it"
        )
    return command


def number_in(env: Env, name: str, least: int) -> str:
    """The number in the environment variable `name`; empty if there is none."""
    text = env.get(name, "").strip()
    if text and (not re.fullmatch(r"[0-9]+", text) or int(text) < least):
        raise Refused(f"{name}={env[name]!r} is not a number from {least} up; correct or unset it")
    return text


# ---- C++ ----------------------------------------------------------------------------------------


def _without_fast_math(words: list[str]) -> list[str]:
    return [word for word in words if word not in LINKED_FAST_MATH]


def _find_cxx_command(env: Env) -> list[str]:
    chosen = chosen_command(env, "CXX", "C++")
    if chosen:
        return _without_fast_math(chosen)
    names = ("c++", "g++", "clang++")
    for name in names:
        if shutil.which(name, path=env.get("PATH", "")):
            return [name]
    looked = ", ".join(names)
    raise LeftOut(f"no C++ compiler on PATH (looked for {looked}); install g++ or set CXX")


def identify_cxx(env: Env) -> tuple[list[str], str, str]:
    """Command, target machine and version of the C++ compiler."""
    if os.name == "nt":
        raise LeftOut("there is no native build for Windows yet")
    command = _find_cxx_command(env)
    try:
        target = output_of([*command, "-dumpmachine"], env)
        version = output_of([*command, "--version"], env).partition("\n")[0]
        if not version or not re.fullmatch(r"\w+(-[\w.]+)+", target):
            raise OSError(f"`-dumpmachine` says {target[:60]!r} and `--version` {version[:60]!r}")
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"{shlex.join(command)} does not work as a gcc or clang compiler: {error}"
        chosen = env.get("CXX", "").strip()
        raise (Refused(f"CXX={chosen}: {reason}") if chosen else NotBuilt(reason)) from None
    return command, target.partition("-")[0], version


def find_cxx(env: Env) -> Tool:
    """gcc or clang, with the flags that every C++ file gets."""
    command, machine, version = identify_cxx(env)
    optimize, sanitize = ["-O3", "-DNDEBUG"], []
    if env.get("FUSEDOPT_SANITIZE"):
        optimize = ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
        sanitize = [f"-fsanitize={env['FUSEDOPT_SANITIZE']}", "-fno-sanitize-recover=all"]
    compile_flags = [
        "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc",
        *optimize, *split(env, "CXXFLAGS"), *NUMERIC_FLAGS, *sanitize,
    ]  # fmt: skip
    link_flags = ["-shared", *_without_fast_math(split(env, "LDFLAGS")), *sanitize]
    if sys.platform == "darwin":
        link_flags[:1] = ["-bundle", "-undefined", "dynamic_lookup"]
    return Tool(tuple(command), version, machine, tuple(compile_flags), tuple(link_flags))


def _complaint(tool: Tool, text: str, flag: str, env: Env) -> str | None:
    """What the compiler says of `text`, or None if it makes a library of it."""
    flags = [*split(env, "CXXFLAGS"), *split(env, "LDFLAGS"), flag, "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        probe, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        probe.write_text(text)
        words = [*tool.command, *flags, str(probe), "-o", str(library)]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace",
                              env={**env, "LC_ALL": "C"})  # fmt: skip
        made = done.returncode == 0 and library.exists()
    return None if made else done.stdout + done.stderr


def with_openmp(tool: Tool, env: Env) -> Tool:
    """The same with OpenMP where there is one, else with its `simd` directives alone.

    Raises NotBuilt where the compiler makes nothing without it either.
    """
    text = "#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"
    openmp = _complaint(tool, text, "-fopenmp", env) is None
    complaint = None if openmp else _complaint(tool, "int probe() { return 0; }\n", "-O1", env)
    if complaint is not None:
        raise failure(f"{shlex.join(tool.command)} compiles nothing", complaint)
    return replace(
        tool,
        openmp=openmp,
        compile_flags=(*tool.compile_flags, "-fopenmp" if openmp else "-fopenmp-simd"),
        link_flags=(*tool.link_flags, *(["-fopenmp"] if openmp else [])),
    )
