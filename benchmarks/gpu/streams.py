"""What the memory of this GPU delivers in this run, as the denominator of every other figure.

`copy`: torch's copy of one tensor to another. `read`: a sum, one stream read. `step`: the accesses
of AdamW's update and nothing else, four streams read and three of them written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.machine import DeviceReport, Machine

NUMEL = 1 << 30  # 4 GiB a stream, many times any cache

Stream = tuple[int, Callable[[], object]]  # bytes moved for each element, and what moves them


def measure_streams(machine: Machine, report: DeviceReport) -> None:
    numel = 1 << 14 if machine.dry else NUMEL
    arrays = [torch.randn(numel, device=machine.device) for _ in range(4)]
    streams, note = _streams(arrays, machine.dry)
    for name, (n_bytes, call) in streams.items():
        report.add("gpu", "ms", machine.bench(call), case="bandwidth", pipeline=name, params=numel,
                   bytes_per_param=n_bytes, note=note)  # fmt: skip
        if name == "copy":
            report.ceiling_gb_s = f"{report.figures()[-1].gb_s():.5g}"
    del arrays, streams, call
    machine.release_memory()


def _streams(arrays: list[torch.Tensor], dry: bool) -> tuple[dict[str, Stream], str]:
    first, second, third, fourth = arrays
    streams: dict[str, Stream] = {
        "copy": (8, lambda: second.copy_(first)),
        "read": (4, lambda: torch.sum(first)),
    }
    if dry:
        sweeps = lambda: [second.add_(first), third.neg_(), fourth.neg_()]  # noqa: E731
        return {**streams, "step": (28, sweeps)}, "sums and sweeps in torch operations"
    try:
        from benchmarks.gpu import triton_streams as kernels

        kernels.step(first, second, third, fourth)
        kernels.read(first)
    except Exception as error:  # no Triton, or no compiler for its launcher
        return streams, f"no `step` stream: {type(error).__name__}: {error}".splitlines()[0]
    streams["step"] = (28, lambda: kernels.step(first, second, third, fourth))
    streams["read_triton"] = (4, lambda: kernels.read(first))
    return streams, ""
