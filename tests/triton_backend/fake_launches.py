"""`python fake_launches.py cuda|hip LIBRARY`: launch every variant as the Triton backend does.

The library is of fake_driver.c, and Triton's own launcher takes it for the GPU's driver. In a
process of its own, since nothing in it could use a GPU any more. Fails where something else arrives
than was meant; prints the names of the variants.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import sys
from pathlib import Path

ARGUMENTS = 32


class Noted(ctypes.Structure):
    """struct Launch."""

    _fields_ = (
        ("launches", ctypes.c_int64),
        ("module_starts_with", ctypes.c_int64),
        ("grid", ctypes.c_int64 * 3),
        ("block", ctypes.c_int64 * 3),
        ("stream", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * ARGUMENTS),
        ("arguments", ctypes.c_uint64 * ARGUMENTS),
    )


def main(backend: str, library: str) -> None:
    os.environ["TRITON_LIBCUDA_PATH"] = str(Path(library).parent)
    os.environ["TRITON_LIBHIP_PATH"] = library
    noted = Noted.in_dll(ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL), "noted")
    import torch
    from triton.backends import backends
    from triton.runtime import driver

    from fusedopt.backends.triton import TritonDriver
    from fusedopt.triton_kernels.variants import COUNTS, all_variants

    # as much of torch with a GPU as stands between the backend and the launcher
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    torch.cuda.device = lambda _: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    driver.set_active(backends[{"cuda": "nvidia", "hip": "amd"}[backend]].driver())
    ours, device = TritonDriver(), torch.device("cuda", 0)
    for variant in all_variants():
        names = [name for name in variant.kernel.arg_names if name not in variant.constants]
        # so large that a narrower or a signed type would show, as far as there is one
        values = {
            name: 2**31 - 1 - i if name in COUNTS else 2**63 - 1 - i for i, name in enumerate(names)
        }
        sizes = [4 if name in COUNTS else 8 for name in names]
        noted.sizes[: len(sizes) + 1] = [*sizes, 0]
        launch = ours.launcher(device, dataclasses.astuple(variant), values)
        before = noted.launches
        launch(7, 0xABC0)
        assert noted.launches == before + 1
        assert noted.module_starts_with == int.from_bytes(b"\x7fELF", "little")
        threads = 128 if variant.verb == "update" else {"cuda": 32, "hip": 64}[backend]
        found = [*noted.grid, *noted.block, noted.stream]
        assert found == [7, 1, 1, threads, 1, 1, 0xABC0], (variant, found)
        wrong = [name for i, name in enumerate(names) if noted.arguments[i] != values[name]]
        assert not wrong, (variant, wrong)
        print(variant.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
