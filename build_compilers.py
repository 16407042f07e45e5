"""The compilers of the native modules: where they are, and the flags that every file gets."""

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
CUDA_NUMERIC_FLAGS = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")

CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
OLDEST_CUDA = (11, 8)  # the first with cudaLaunchKernelEx
CUDA_LIBRARIES = ("-lcudart_static", "-ldl", "-lrt", "-pthread")
CUDA_FALLBACK = "/usr/local/cuda"  # where NVIDIA's installers link the current toolkit

NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # nvcc itself reads these
# Environment variables that choose a compiler or its flags.
VARIABLES = (
    "CXX", "CXXFLAGS", "LDFLAGS", "FUSEDOPT_SANITIZE",
    "CUDACXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", *NVCC_VARIABLES,
)  # fmt: skip


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
    headers: tuple[str, ...] = ()  # flags for the C++ files beside its own
    architectures: tuple[str, ...] = ()


def _output_of(command: list[str], env: Env) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                          timeout=60, env=dict(env))  # fmt: skip
    if done.returncode != 0:
        raise OSError(f"exit status {done.returncode}")
    return done.stdout.strip()


def _split(env: Env, name: str) -> list[str]:
    try:
        return shlex.split(env.get(name, ""))
    except ValueError as error:
        raise NotBuilt(f"{name}={env[name]!r} cannot be read: {error}") from None


def _chosen(env: Env, name: str, kind: str) -> list[str]:
    """The command in the environment variable `name`; empty if there is none."""
    command = _split(env, name)
    if command and not shutil.which(command[0], path=env.get("PATH", "")):
        raise NotBuilt(f"the {kind} compiler {name}={env[name].strip()} was not found")
    return command


# ---- C++ ----------------------------------------------------------------------------------------


def _without_fast_math(words: list[str]) -> list[str]:
    return [word for word in words if word not in LINKED_FAST_MATH]


def _find_cxx_command(env: Env) -> list[str]:
    chosen = _chosen(env, "CXX", "C++")
    if chosen:
        return _without_fast_math(chosen)
    names = ("c++", "g++", "clang++")
    for name in names:
        if shutil.which(name, path=env.get("PATH", "")):
            return [name]
    looked = ", ".join(names)
    raise NotBuilt(f"no C++ compiler on PATH (looked for {looked}); install g++ or set CXX")


def identify_cxx(env: Env) -> tuple[list[str], str, str]:
    """Command, target machine and version of the C++ compiler."""
    if os.name == "nt":
        raise NotBuilt("there is no native build for Windows yet")
    command = _find_cxx_command(env)
    try:
        machine = _output_of([*command, "-dumpmachine"], env).partition("-")[0]
        version = _output_of([*command, "--version"], env).splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired) as error:
        reason = f"{shlex.join(command)} does not work as a gcc or clang compiler: {error}"
        raise NotBuilt(reason) from None
    return command, machine, version


def find_cxx(env: Env) -> Tool:
    """gcc or clang, with the flags that every C++ file gets."""
    command, machine, version = identify_cxx(env)
    optimize, sanitize = ["-O3", "-DNDEBUG"], []
    if env.get("FUSEDOPT_SANITIZE"):
        optimize = ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
        sanitize = [f"-fsanitize={env['FUSEDOPT_SANITIZE']}", "-fno-sanitize-recover=all"]
    compile_flags = [
        "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc",
        *optimize, *_split(env, "CXXFLAGS"), *NUMERIC_FLAGS, *sanitize,
    ]  # fmt: skip
    link_flags = ["-shared", *_without_fast_math(_split(env, "LDFLAGS")), *sanitize]
    if sys.platform == "darwin":
        link_flags[:1] = ["-bundle", "-undefined", "dynamic_lookup"]
    return Tool(tuple(command), version, machine, tuple(compile_flags), tuple(link_flags))


def with_openmp(tool: Tool, env: Env) -> Tool:
    """The same with OpenMP where there is one, else with its `simd` directives alone."""
    flags = [*_split(env, "CXXFLAGS"), *_split(env, "LDFLAGS"), "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
        words = [*tool.command, *flags, str(probe), "-o", f"{probe}.so"]
        openmp = subprocess.run(words, capture_output=True, env=dict(env)).returncode == 0
    return replace(
        tool,
        openmp=openmp,
        compile_flags=(*tool.compile_flags, "-fopenmp" if openmp else "-fopenmp-simd"),
        link_flags=(*tool.link_flags, *(["-fopenmp"] if openmp else [])),
    )


# ---- CUDA ---------------------------------------------------------------------------------------


def _find_nvcc_command(env: Env) -> list[str]:
    chosen = _chosen(env, "CUDACXX", "CUDA")
    if chosen:
        return chosen
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            command = shutil.which(str(Path(env[name], "bin", "nvcc")))
            if not command:
                raise NotBuilt(f"no nvcc in {name}={env[name]}: a CUDA runtime without a compiler")
            return [command]
    found = shutil.which("nvcc", path=env.get("PATH", ""))
    found = found or shutil.which(str(Path(CUDA_FALLBACK, "bin", "nvcc")))
    if not found:
        raise NotBuilt(
            f"no CUDA compiler: nvcc is neither on PATH nor in {CUDA_FALLBACK}; "
            "install the CUDA toolkit or set CUDA_HOME"
        )
    return [found]


def identify_nvcc(env: Env) -> tuple[list[str], str]:
    """Command and release of the CUDA compiler, say 13.0."""
    if env.get("FUSEDOPT_SANITIZE"):
        raise NotBuilt("FUSEDOPT_SANITIZE is set: a sanitized build is for code that runs on CPUs")
    command = _find_nvcc_command(env)
    try:
        said = _output_of([*command, "--version"], env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{shlex.join(command)} does not work: {error}") from None
    found = re.search(r"\brelease (\d+\.\d+)", said)
    if not found:
        raise NotBuilt(f"{shlex.join(command)} does not tell its release: is it nvcc?")
    return command, found[1]


def without_nvcc_variables(env: Env) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in NVCC_VARIABLES}


def _known_architectures(command: list[str], env: Env) -> set[str]:
    """What this nvcc makes machine code for: {"75", "80", ...}."""
    try:
        return set(re.findall(r"\bsm_(\d+)", _output_of([*command, "--list-gpu-code"], env)))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{shlex.join(command)} --list-gpu-code: {error}") from None


def architectures(asked: str, known: set[str], release: str) -> list[str]:
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
        if not parts:
            raise NotBuilt(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: {word!r} is not understood; use numbers, such as "
                "'7.5;8.0;9.0+PTX'"
            )
        number = parts[1] + parts[2]
        if number not in known:
            raise NotBuilt(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: nvcc {release} makes no code for {word}"
            )
        code.append(f"sm_{number}{parts[3]}")
        ptx += [f"compute_{number}{parts[3]}"] if parts[4] else []
    return list(dict.fromkeys(code + ptx))


def _gencode(name: str) -> str:
    return f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}"


def _toolkit_folders(command: list[str], env: Env) -> tuple[list[str], list[str]]:
    """Where headers and libraries are, as nvcc tells its host compiler: its own path may be that of
    a wrapper."""
    words = [*command, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(words, capture_output=True, text=True, env=dict(env)).stderr

    def folders(variable: str, option: str) -> list[str]:
        line = re.search(rf"^#\$ {variable}=(.*)$", told, re.MULTILINE)
        flags = shlex.split(line[1]) if line else []
        found = [Path(flag[len(option) :]) for flag in flags if flag.startswith(option)]
        # the compiler searches /usr/include by itself, and last; stubs is for a missing driver
        return [str(p) for p in found if p.resolve() != Path("/usr/include") and p.name != "stubs"]

    return folders("INCLUDES", "-I"), folders("LIBRARIES", "-L")


def _host_flags(cxx: Tool) -> list[str]:
    """The C++ compiler's flags, which nvcc passes on: to its preprocessors too."""
    escaped = (flag.replace("\\", "\\\\").replace(",", "\\,") for flag in cxx.compile_flags)
    return [f if f.startswith("-std=") else f"-Xcompiler={f}" for f in escaped]


def find_nvcc(env: Env, cxx: Tool) -> Tool:
    """nvcc, with `cxx` as its host compiler."""
    command, release = identify_nvcc(env)
    version = tuple(map(int, release.split(".")))
    if version < OLDEST_CUDA:
        oldest = ".".join(map(str, OLDEST_CUDA))
        raise NotBuilt(f"nvcc {release} is too old: the kernels need CUDA {oldest} or newer")
    # Put on the command line, where our flags come after them and where ninja sees them change;
    # --use_fast_math also does what no later flag undoes.
    user = [flag for name in NVCC_VARIABLES for flag in _split(env, name)]
    user = [flag for flag in user if flag.lstrip("-") != "use_fast_math"]
    env = without_nvcc_variables(env)
    names = architectures(
        env.get("TORCH_CUDA_ARCH_LIST", ""), _known_architectures(command, env), release
    )
    host = [word for word in cxx.command if not word.startswith("-")][-1]  # not ccache before it
    # LZ4: the default since 13.0, Zstandard, is unreadable for drivers before 550
    compress = ["-Xfatbin=-compress-all", *(["-compress-mode=speed"] if version >= (12, 8) else [])]
    threads = env.get("NVCC_THREADS") or env.get("MAX_JOBS") or "0"  # 0: all cores
    compile_flags = [
        *user, f"-ccbin={host}", *_host_flags(cxx), *CUDA_NUMERIC_FLAGS, *compress,
        f"--threads={threads}", *map(_gencode, names),
    ]  # fmt: skip
    includes, libraries = _toolkit_folders([*command, f"-ccbin={host}"], env)
    return Tool(
        command=tuple(command),
        version=f"nvcc {release} with {cxx.version}",
        machine=cxx.machine,
        compile_flags=tuple(compile_flags),
        link_flags=(*(f"-L{folder}" for folder in libraries), *CUDA_LIBRARIES),
        headers=tuple(word for folder in includes for word in ("-isystem", folder)),
        architectures=tuple(names),
    )
