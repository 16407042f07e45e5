"""`python -m benchmarks.gpu.environment`: the machine, its tools and what Python can import.

Ends with status 2 where there is no NVIDIA GPU. `--arch` prints the GPU's architecture alone, as
TORCH_CUDA_ARCH_LIST takes it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys

import torch

from benchmarks.gpu.machine import nvidia_smi, versions

TOOLS = ("nvcc", "g++", "cmake", "ninja", "ncu", "compute-sanitizer", "nvidia-smi")
NEEDED = ("numpy", "setuptools", "pybind11")
FOR_TESTS = ("pytest", "hypothesis", "xdist", "expecttest", "sklearn", "matplotlib", "tqdm")
RIVALS = ("transformer_engine", "apex", "flashoptim", "bitsandbytes", "deepspeed")


def present(names: tuple[str, ...], missing_word: str = "MISSING") -> str:
    found = [name for name in names if importlib.util.find_spec(name) is not None]
    missing = [name for name in names if name not in found]
    text = ", ".join(f"{name} {_version(name)}".strip() for name in found) or "none"
    return text + (f"; {missing_word} {', '.join(missing)}" if missing else "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # the distribution has another name
        return ""


def nvcc_version() -> str:
    path = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except OSError:
        return "not found"
    return next((line for line in done.stdout.splitlines() if "release" in line), "unknown")


def tables_of_torch() -> str:
    """torch's fused and foreach kernels take more tensors a launch since 2.12, with CUDA 13."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    large = version >= (2, 12) and (torch.version.cuda or "0").split(".")[0] >= "13"
    return "32 KB of kernel parameters" if large else "4 KB of kernel parameters"


def report() -> list[tuple[str, str]]:
    rows = [("python", f"{platform.python_version()} at {sys.executable}")]
    rows += [("platform", platform.platform()), ("cpus", str(os.cpu_count()))]
    rows += [("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")]
    rows += [("torch's multi-tensor tables", tables_of_torch())]
    rows += [("triton", str(versions()["triton"])), ("nvcc", nvcc_version())]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        rows += [("gpu", f"{properties.name}, sm_{properties.major}{properties.minor}")]
        rows += [("gpu memory", f"{properties.total_memory / 2**30:.0f} GiB")]
        rows += [("processors", str(properties.multi_processor_count))]
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
        rows += [(fields, nvidia_smi(fields) or "nvidia-smi does not answer")]
    else:
        rows += [("gpu", "none: torch.cuda.is_available() is False")]
    rows += [("tools", ", ".join(tool for tool in TOOLS if shutil.which(tool)) or "none")]
    rows += [("tools not on PATH", ", ".join(t for t in TOOLS if not shutil.which(t)) or "none")]
    rows += [("needed", present(NEEDED)), ("for the tests", present(FOR_TESTS))]
    return [*rows, ("compared where present", present(RIVALS, "not here:"))]


def main() -> int:
    if sys.argv[1:] == ["--arch"]:
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        print(f"{major}.{minor}")
        return 0
    rows = report()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    return 0 if torch.cuda.is_available() else 2


if __name__ == "__main__":
    sys.exit(main())
