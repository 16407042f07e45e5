"""What the memory of this GPU delivers in this run, as the denominator of every other figure.

`copy`: torch's copy of one tensor to another. `read`: a sum, one stream read. `step`: the accesses
of AdamW's update and nothing else, four streams read and three of them written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.timing import Spread, spread

NUMEL = 1 << 30  # 4 GiB a stream, many times any cache
ROUNDS = 20
WARMUP = 3

Stream = tuple[int, Callable[[], object]]  # bytes moved, and what moves them


def measure_streams(machine: Machine) -> tuple[dict[str, Spread], str]:
    """GB/s of each stream, and a note on what was left out."""
    numel = 1 << 14 if machine.dry else NUMEL
    arrays = [torch.randn(numel, device=machine.device) for _ in range(4)]
    streams, note = _streams(arrays, machine.dry)
    speeds: dict[str, list[float]] = {name: [] for name in streams}
    for round_index in range(WARMUP + (2 if machine.dry else ROUNDS)):
        for name, (n_bytes, call) in streams.items():
            (ms,) = machine.event_ms([call], hold_ms=0.2)
            if round_index >= WARMUP:
                speeds[name].append(n_bytes / ms / 1e6)
    del arrays, streams, call
    machine.release_memory()
    return {name: spread(values) for name, values in speeds.items()}, note


def _streams(arrays: list[torch.Tensor], dry: bool) -> tuple[dict[str, Stream], str]:
    first, second, third, fourth = arrays
    n_bytes = 4 * first.numel()
    streams: dict[str, Stream] = {
        "copy": (2 * n_bytes, lambda: second.copy_(first)),
        "read": (n_bytes, lambda: torch.sum(first)),
    }
    if dry:
        sweeps = lambda: [second.add_(first), third.neg_(), fourth.neg_()]  # noqa: E731
        return {**streams, "step": (7 * n_bytes, sweeps)}, "sums and sweeps in torch operations"
    try:
        from benchmarks.gpu import triton_streams as kernels

        kernels.step(first, second, third, fourth)
        kernels.read(first)
    except Exception as error:  # no Triton, or no compiler for its launcher
        return streams, f"no `step` stream: {type(error).__name__}: {error}".splitlines()[0]
    streams["step"] = (7 * n_bytes, lambda: kernels.step(first, second, third, fourth))
    streams["read_triton"] = (n_bytes, lambda: kernels.read(first))
    return streams, ""
