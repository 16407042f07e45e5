"""The Triton variants, compiled ahead for GPUs that are not here: once for all workers."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from fusedopt.triton_kernels.variants import all_variants, compiled

NVIDIA = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (75, 80, 90, 100, 120)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64), "gfx1100": GPUTarget("hip", "gfx1100", 32)}
TARGETS = {**NVIDIA, **AMD}
VARIANTS = {variant.name: variant for variant in all_variants()}

# Every variant for one GPU of each vendor. For the others the reduce of one rule, which for all is
# the same but for the end; what finalizes, where divisions and roots are; and the updates that need
# the most registers.
IN_FULL = ("sm_90", "gfx942")
LARGEST = [
    name for name in VARIANTS if name.startswith(("reduce-adamw", "finalize", "update-adamw-3"))
]
KERNELS = [(n, target) for target in TARGETS for n in (VARIANTS if target in IN_FULL else LARGEST)]

FOLDER = Path(tempfile.gettempdir(), f"fusedopt-triton-{os.getuid()}")  # of all workers


@functools.cache
def kernel(name: str, target: str) -> Any:
    """The compiled variant. Triton's cache is in the folder; it knows when sources have changed."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{name}.{target}.lock").open("w") as lock, triton.knobs.cache.scope():
        fcntl.flock(lock, fcntl.LOCK_EX)  # until closed: others wait for what this one makes
        triton.knobs.cache.dir = str(FOLDER)
        return compiled(VARIANTS[name], TARGETS[target])
