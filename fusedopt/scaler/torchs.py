"""Which of torch's GradScalers calls an optimizer, and what it knows of other ranks."""

from __future__ import annotations

import sys

from torch.amp.grad_scaler import GradScaler

from ..callers import running


def scaler_in_step() -> GradScaler | None:
    """The scaler whose ``step`` has called us; torch's contract does not name it."""
    scaler: GradScaler | None = running(GradScaler.step)
    return scaler


def asks_all_ranks(scaler: GradScaler | None) -> bool:
    """Whether it is FSDP1's, whose ``unscale_`` adds up the flags of all ranks. So it calls the
    step on all ranks or on none, and has no wrong scale."""
    fsdp = sys.modules.get("torch.distributed.fsdp.sharded_grad_scaler")
    return fsdp is not None and isinstance(scaler, fsdp.ShardedGradScaler)
