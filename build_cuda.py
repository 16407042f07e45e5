"""nvcc: where it is, for which GPUs it compiles, and the flags that the kernels get."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from build_compilers import (
    NVCC_VARIABLES,
    Env,
    LeftOut,
    NotBuilt,
    Refused,
    Tool,
    chosen_command,
    number_in,
    output_of,
    split,
)

CUDA_NUMERIC_FLAGS = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
OLDEST_CUDA = (11, 8)  # the first with cudaLaunchKernelEx
CUDA_LIBRARIES = ("-lcudart_static", "-ldl", "-lrt", "-pthread")
CUDA_FALLBACK = "/usr/local/cuda"  # where NVIDIA's installers link the current toolkit


def _find_nvcc_command(env: Env) -> list[str]:
    chosen = chosen_command(env, "CUDACXX", "CUDA")
    if chosen:
        return chosen
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            command = shutil.which(str(Path(env[name], "bin", "nvcc")))
            if not command:
                raise Refused(
                    f"no nvcc in {name}={env[name]}: a CUDA runtime without a compiler, or no "
                    f"toolkit; correct or unset {name}"
                )
            return [command]
    found = shutil.which("nvcc", path=env.get("PATH", ""))
    found = found or shutil.which(str(Path(CUDA_FALLBACK, "bin", "nvcc")))
    if not found:
        raise LeftOut(
            f"no CUDA compiler: nvcc is neither on PATH nor in {CUDA_FALLBACK}; "
            "install the CUDA toolkit or set CUDA_HOME"
        )
    return [found]


def identify_nvcc(env: Env) -> tuple[list[str], str]:
    """Command and release of the CUDA compiler, say 13.0."""
    if env.get("FUSEDOPT_SANITIZE"):
        raise LeftOut("FUSEDOPT_SANITIZE is set: a sanitized build is for code that runs on CPUs")
    command = _find_nvcc_command(env)
    try:
        said = output_of([*command, "--version"], env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{shlex.join(command)} does not work: {error}") from None
    found = re.search(r"\brelease (\d+\.\d+)", said)
    if not found:
        raise _not_nvcc(command, "--version", said)
    return command, found[1]


def _not_nvcc(command: list[str], option: str, said: str) -> NotBuilt:
    said = said.partition("\n")[0][:60] or "nothing"
    return NotBuilt(f"{shlex.join(command)} is not nvcc: to `{option}` it says {said}")


def without_nvcc_variables(env: Env) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in NVCC_VARIABLES}


def _known_architectures(command: list[str], env: Env) -> set[str]:
    """What this nvcc makes machine code for: {"75", "80", ...}."""
    try:
        said = output_of([*command, "--list-gpu-code"], env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{shlex.join(command)} does not work: {error}") from None
    known = set(re.findall(r"\bsm_(\d+)", said))
    if not known:
        raise _not_nvcc(command, "--list-gpu-code", said)
    return known


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
            raise Refused(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: {word!r} is not understood; use numbers, such as "
                "'7.5;8.0;9.0+PTX', or unset it"
            )
        number = parts[1] + parts[2]
        if number not in known:
            raise Refused(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: nvcc {release} makes no code for {word}; leave "
                "it out, or unset the variable"
            )
        code.append(f"sm_{number}{parts[3]}")
        ptx += [f"compute_{number}{parts[3]}"] if parts[4] else []
    return list(dict.fromkeys(code + ptx))


def _gencode(name: str) -> str:
    return f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}"


def _toolkit_folders(command: list[str], host: str, env: Env) -> tuple[list[str], list[str]]:
    """Where headers and libraries are, as nvcc tells its host compiler: its own path may be that of
    a wrapper."""
    words = [*command, f"-ccbin={host}", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(words, capture_output=True, text=True, env=dict(env)).stderr
    if not re.search(r"^#\$ ", told, re.MULTILINE):
        raise _not_nvcc(command, "--dryrun", told)

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
    user = [flag for name in NVCC_VARIABLES for flag in split(env, name)]
    user = [flag for flag in user if flag.lstrip("-") != "use_fast_math"]
    env = without_nvcc_variables(env)
    names = architectures(
        env.get("TORCH_CUDA_ARCH_LIST", ""), _known_architectures(command, env), release
    )
    host = [word for word in cxx.command if not word.startswith("-")][-1]  # not ccache before it
    # LZ4: the default since 13.0, Zstandard, is unreadable for drivers before 550
    compress = ["-Xfatbin=-compress-all", *(["-compress-mode=speed"] if version >= (12, 8) else [])]
    threads = (
        number_in(env, "NVCC_THREADS", 0) or number_in(env, "MAX_JOBS", 1) or "0"
    )  # 0: all cores
    compile_flags = [
        *user, f"-ccbin={host}", *_host_flags(cxx), *CUDA_NUMERIC_FLAGS, *compress,
        f"--threads={threads}", *map(_gencode, names),
    ]  # fmt: skip
    includes, libraries = _toolkit_folders(command, host, env)
    return Tool(
        command=tuple(command),
        version=f"nvcc {release} with {cxx.version}",
        machine=cxx.machine,
        compile_flags=tuple(compile_flags),
        link_flags=(*(f"-L{folder}" for folder in libraries), *CUDA_LIBRARIES),
        headers=tuple(word for folder in includes for word in ("-isystem", folder)),
        architectures=tuple(names),
    )
