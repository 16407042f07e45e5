"""What the memory of this GPU delivers in this run, as the denominator of every other figure.

`copy`: torch's copy of one tensor to another. `read`: a sum, one stream read. `step`: the accesses
of AdamW's update and nothing else, four streams read and three of them written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.machine import DeviceReport, Machine

NUMEL = 1 << 30  # 4 GiB a stream, many times any cache


def measure_streams(machine: Machine, report: DeviceReport) -> None:
    _measure(machine, report)
    machine.release_memory()  # 16 GiB


def _measure(machine: Machine, report: DeviceReport) -> None:
    numel = 1 << 14 if machine.dry else NUMEL
    grad, param, exp_avg, exp_avg_sq = (torch.randn(numel, device=machine.device) for _ in range(4))
    streams = {"copy": (8, lambda: param.copy_(grad)), "read": (4, lambda: torch.sum(grad))}
    note = ""
    try:
        step = _in_torch_operations if machine.dry else _in_triton()
        step(grad, param, exp_avg, exp_avg_sq)
        streams["step"] = (28, lambda: step(grad, param, exp_avg, exp_avg_sq))
    except Exception as error:  # no Triton, or no compiler for its launcher
        note = f"no `step` stream: {type(error).__name__}: {error}".splitlines()[0]
    for name, (n_bytes, call) in streams.items():
        report.add("gpu", "ms", machine.bench(call), case="bandwidth", pipeline=name, params=numel,
                   bytes_per_param=n_bytes, note=note)  # fmt: skip
        if name == "copy":
            report.ceiling_gb_s = f"{report.figures()[-1].gb_s():.5g}"


def _in_torch_operations(grad: Tensor, param: Tensor, *states: Tensor) -> None:
    """For a dry run."""
    param.add_(grad)
    for state in states:
        state.neg_()


def _in_triton() -> Callable[..., None]:
    from benchmarks.gpu import triton_streams

    return triton_streams.step
