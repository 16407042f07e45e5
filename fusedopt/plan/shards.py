"""Shards without a mesh that tells which ranks have the rest: FSDP1's and ZeRO's."""

from __future__ import annotations

import sys

import torch

from ..callers import running
from ..options import Options
from ..rules.declaration import Group
from .checks import is_served
from .exchange import REPLICATED


def has_fsdp1_shards(groups: list[Group]) -> bool:
    """Whether a step updates parameters of FSDP1, except replicas (``replicated=True``)."""
    return any(
        getattr(param, "_fsdp_flattened", False) and not group.get(REPLICATED)
        for group in groups
        for param in group["params"]
        if is_served(param)
    )


def made_by_zero() -> bool:
    """Whether torch's ZeroRedundancyOptimizer is making an optimizer for this rank's share."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return False
    zero = running(module.ZeroRedundancyOptimizer._init_local_optimizer)
    return zero is not None and torch.distributed.get_world_size(zero.process_group) > 1


def refuse_own_norm(options: Options, fsdp1: bool) -> None:
    """Raise where each rank would go by its own shards, FSDP1's or ZeRO's, in clipping or skipping.

    Raises:
        RuntimeError: always.
    """
    asked = (
        "skip_nonfinite=True"
        if options.max_grad_norm is None
        else f"max_grad_norm={options.max_grad_norm}"
    )
    if fsdp1:
        raise RuntimeError(
            f"{asked} cannot be honoured for FSDP1 shards: each rank sees only its part of the "
            "gradients; say which ranks share them: `optimizer.norm_group = model.process_group`, "
            "or, with NO_SHARD, that all hold the same: "
            "`optimizer.param_groups[0]['replicated'] = True`"
        )
    raise RuntimeError(
        f"{asked} cannot be honoured for one rank's share of a ZeroRedundancyOptimizer; say "
        "which ranks have the rest: `optimizer.optim.norm_group = optimizer.process_group`"
    )
