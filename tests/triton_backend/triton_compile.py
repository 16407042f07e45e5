"""The Triton variants, compiled ahead for GPUs that are not here: once for all workers."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from fusedopt.triton_kernels.variants import all_variants, compiled

NVIDIA = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (75, 80, 90, 100, 120)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64), "gfx1100": GPUTarget("hip", "gfx1100", 32)}
TARGETS = {**NVIDIA, **AMD}
VARIANTS = {variant.name: variant for variant in all_variants()}

FOLDER = Path(tempfile.gettempdir(), f"fusedopt-triton-{os.getuid()}")  # of all workers


@contextlib.contextmanager
def alone(name: str, target: str) -> Iterator[None]:
    """Other workers wait, to find in the folder what this one makes."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{name}.{target}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until closed
        yield


@contextlib.contextmanager
def cached() -> Iterator[None]:
    """Triton's cache is in the folder. It knows when the sources have changed."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(FOLDER)
        yield


@functools.cache
def kernel(name: str, target: str) -> Any:
    """The compiled variant."""
    with alone(name, target), cached():
        return compiled(VARIANTS[name], TARGETS[target])
