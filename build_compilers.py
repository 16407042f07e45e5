"""The compilers: where they are, and the flags of all that they compile."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Env = Mapping[str, str]

# The numeric contract: every rounding stands in the source, so that each instruction set and
# compiler gives the same bits. After CXXFLAGS, so that no -ffast-math from there survives.
# errno and traps are about side effects of the maths, not its values.
NUMERIC_FLAGS = ("-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
CUDA_NUMERIC_FLAGS = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
# Taken out of all variables, because no later flag undoes all that they do: g++ links code that
# switches denormals off in the whole process.
FAST_MATH = {"-Ofast", "-ffast-math", "-funsafe-math-optimizations"}
FAST_MATH |= {"-use_fast_math", "--use_fast_math"}
CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
CUDA_FALLBACK = "/usr/local/cuda"  # where NVIDIA's installers link the current toolkit

NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
SETTINGS = {  # environment variables that choose a compiler or its flags
    "cxx": ("CXX", "CXXFLAGS", "LDFLAGS", "FUSEDOPT_SANITIZE"),
    "nvcc": ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", *NVCC_VARIABLES),
}
VARIABLES = (*SETTINGS["cxx"], *SETTINGS["nvcc"])

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


@dataclass(frozen=True)
class Tool:
    """A compiler: its command line up to the flags of a unit, and what linking with it takes."""

    command: list[str]
    version: str
    machine: str  # the target's name begins with it, say x86_64
    compile_flags: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)
    openmp: bool = False
    architectures: list[str] = field(default_factory=list)


def run(words: list[str], env: Env, **options: Any) -> tuple[int, str]:
    """Exit status and output of a command; nvcc is not to put its variables' flags behind ours."""
    env = {name: value for name, value in env.items() if name not in NVCC_VARIABLES}
    done = subprocess.run(words, capture_output=True, text=True, errors="replace",
                          env={**env, "LC_ALL": "C"}, **options)  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def failure(what: str, said: str, where: str = "") -> NotBuilt:
    """What a compiler said when it failed, in one line."""
    lines = said.splitlines()
    lacking = [line for line in lines if RESOURCES.search(line)]
    first = [*lacking, *filter(ERRORS.search, lines), "no message"][0]
    return (Refused if lacking else NotBuilt)(f"{what}: {first.strip()}{where}")


def ask(command: list[str], word: str, pattern: str, kind: str, env: Env) -> list[str]:
    """What a compiler says to `word`, as far as it matches the pattern of its kind."""
    name = shlex.join(command)
    try:
        status, said = run([*command, word], env, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{name} does not work: {error}") from None
    if status:
        raise NotBuilt(f"{name} does not work: `{word}` ends with exit status {status}")
    found = re.findall(pattern, said, re.MULTILINE)
    if not found:
        line = said.partition("\n")[0][:60] or "nothing"
        raise NotBuilt(f"{name} is not {kind}: to `{word}` it says {line}")
    return found


def split(env: Env, *names: str) -> list[str]:
    """The words in environment variables, without those that no later flag undoes."""
    words = []
    for name in names:
        try:
            words += shlex.split(env.get(name, ""))
        except ValueError as error:
            raise Refused(f"{name}={env[name]!r} cannot be read: {error}") from None
    return [word for word in words if word not in FAST_MATH]


def command_of(env: Env, variable: str, kind: str, names: Sequence[str], path: str) -> list[str]:
    """The compiler in the environment variable, else the first of `names` on `path`, else none."""
    command = split(env, variable)
    if command and not shutil.which(command[0], path=env.get("PATH", "")):
        text = f"{variable}={env[variable].strip()}"
        raise Refused(f"the {kind} compiler {text} was not found; correct or unset it")
    found = (shutil.which(name, path=path) for name in names)
    return command or list(filter(None, found))[:1]


def number(env: Env, name: str, least: int) -> str:
    """The number in the environment variable `name`; empty if there is none."""
    text = env.get(name, "").strip()
    if text and (not re.fullmatch("[0-9]+", text) or int(text) < least):
        raise Refused(f"{name}={env[name]!r} is not a number from {least} up; correct or unset it")
    return text


# ---- C++ ----------------------------------------------------------------------------------------


def find_cxx(env: Env) -> Tool:
    """gcc or clang, with the flags that every C++ file gets."""
    names = ("c++", "g++", "clang++")
    command = command_of(env, "CXX", "C++", names, env.get("PATH", ""))
    if not command:
        looked = ", ".join(names)
        raise LeftOut(f"no C++ compiler on PATH (looked for {looked}); install g++ or set CXX")
    try:
        machine = ask(command, "-dumpmachine", r"^(\w+)-[-\w.]+$", "gcc or clang", env)[0]
        version = ask(command, "--version", r"^.+$", "gcc or clang", env)[0]
    except NotBuilt as problem:
        given = env.get("CXX", "").strip()
        raise (Refused(f"CXX={given}: {problem}") if given else problem) from None
    optimize, sanitize = ["-O3", "-DNDEBUG"], []
    if env.get("FUSEDOPT_SANITIZE"):
        optimize = ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
        sanitize = [f"-fsanitize={env['FUSEDOPT_SANITIZE']}", "-fno-sanitize-recover=all"]
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc",
             *optimize, *split(env, "CXXFLAGS"), *NUMERIC_FLAGS, *sanitize]  # fmt: skip
    apple = sys.platform == "darwin"
    kind = ["-bundle", "-undefined", "dynamic_lookup"] if apple else ["-shared"]
    return Tool(command, version, machine, flags, [*kind, *split(env, "LDFLAGS"), *sanitize])


def with_openmp(tool: Tool, env: Env) -> Tool:
    """The same with OpenMP where there is one, else with its `simd` directives alone."""
    with tempfile.TemporaryDirectory() as folder:
        probe, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        probe.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
        words = [*tool.command, *tool.compile_flags, *tool.link_flags, "-fopenmp", str(probe)]
        _, said = run([*words, "-o", str(library)], env)
        openmp = library.exists()
    if not openmp and RESOURCES.search(said):
        raise failure("the compiler was asked for OpenMP", said)
    flags = [*tool.compile_flags, "-fopenmp" if openmp else "-fopenmp-simd"]
    link_flags = [*tool.link_flags, *(["-fopenmp"] if openmp else [])]
    return replace(tool, openmp=openmp, compile_flags=flags, link_flags=link_flags)


# ---- CUDA ---------------------------------------------------------------------------------------


def identify_nvcc(env: Env) -> tuple[list[str], str]:
    """Command and release of the CUDA compiler, say 13.0."""
    if env.get("FUSEDOPT_SANITIZE"):
        raise LeftOut("FUSEDOPT_SANITIZE is set: a sanitized build is for code that runs on CPUs")
    home = next((name for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)), "")
    path = f"{env[home]}/bin" if home else f"{env.get('PATH', '')}{os.pathsep}{CUDA_FALLBACK}/bin"
    command = command_of(env, "CUDACXX", "CUDA", ["nvcc"], path)
    if not command and home:
        lack = "a CUDA runtime without a compiler, or no toolkit"
        raise Refused(f"no nvcc in {home}={env[home]}: {lack}; correct or unset {home}")
    if not command:
        lack = f"nvcc is neither on PATH nor in {CUDA_FALLBACK}"
        raise LeftOut(f"no CUDA compiler: {lack}; install the CUDA toolkit or set CUDA_HOME")
    return command, ask(command, "--version", r"\brelease (\d+\.\d+)", "nvcc", env)[0]


def architectures(asked: str, known: Collection[str], release: str) -> list[str]:
    """`sm_` and `compute_` names to build for, from the text of TORCH_CUDA_ARCH_LIST."""
    words = asked.replace(";", " ").split()
    if not words:
        numbers = [number for number in CUDA_ARCHITECTURES if number in known]
        if not numbers:
            wanted = ", ".join(CUDA_ARCHITECTURES)
            raise NotBuilt(f"nvcc {release} makes code for none of the architectures {wanted}")
        return [*(f"sm_{number}" for number in numbers), f"compute_{numbers[-1]}"]
    code, ptx = [], []
    for word in words:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if not parts or parts[1] + parts[2] not in known:
            wrong = f"nvcc {release} makes no code for {word}; leave it out"
            misread = f"{word!r} is not understood; use numbers, such as '7.5;8.0;9.0+PTX'"
            text = wrong if parts else misread
            raise Refused(f"TORCH_CUDA_ARCH_LIST={asked!r}: {text}, or unset it")
        code.append(f"sm_{parts[1]}{parts[2]}{parts[3]}")
        ptx += [code[-1].replace("sm", "compute")] if parts[4] else []
    return list(dict.fromkeys(code + ptx))


def find_nvcc(env: Env, cxx: Tool) -> Tool:
    """nvcc, with `cxx` as its host compiler; it compiles the C++ files and links, too, because it
    knows where the toolkit's headers and libraries are."""
    command, release = identify_nvcc(env)
    major_minor = tuple(map(int, release.split(".")))
    if major_minor < (11, 8):  # the first with cudaLaunchKernelEx
        raise NotBuilt(f"nvcc {release} is too old: the kernels need CUDA 11.8 or newer")
    known = ask(command, "--list-gpu-code", r"\bsm_(\d+)", "nvcc", env)
    names = architectures(env.get("TORCH_CUDA_ARCH_LIST", ""), known, release)
    host = [word for word in cxx.command if not word.startswith("-")][-1]  # not ccache before it
    # LZ4: the default since 13.0, Zstandard, is unreadable for drivers before 550
    lz4 = ["-compress-mode=speed"] if major_minor >= (12, 8) else []
    threads = number(env, "NVCC_THREADS", 0) or number(env, "MAX_JOBS", 1) or "0"  # 0: all cores
    both = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in names]
    both.append(f"-ccbin={host}")
    flags = [*split(env, *NVCC_VARIABLES), *for_host(cxx.compile_flags), *CUDA_NUMERIC_FLAGS,
             "-Xfatbin=-compress-all", *lz4, f"--threads={threads}", *both]  # fmt: skip
    link_flags = [*both, "-shared", "-cudart=static", *for_host(cxx.link_flags)]
    version = f"nvcc {release} with {cxx.version}"
    return Tool(command, version, cxx.machine, flags, link_flags, architectures=names)


def for_host(flags: Sequence[str]) -> list[str]:
    """Flags that nvcc passes on to the C++ compiler, its preprocessors too."""
    escaped = (flag.replace("\\", "\\\\").replace(",", "\\,") for flag in flags)
    return [flag if flag.startswith("-std=") else f"-Xcompiler={flag}" for flag in escaped]
