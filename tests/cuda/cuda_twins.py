"""One optimizer served by the CUDA kernels through the shim, and its twin on the CPU backend."""

from __future__ import annotations

import copy
from typing import Any

import torch
from cases import CHUNK
from gpu_twins import HostTwins
from torch import Tensor

CPU = torch.device("cpu")
RUN_LENGTHS = [0, 1, 7, 31, 256, 300, CHUNK + 9, 2 * CHUNK + 1, 260]


class ShimTwins(HostTwins):
    backend = "cuda"

    def snapshot(self) -> dict[str, Any]:
        """By value, everything a failed step must leave alone."""
        state = [dict(self.opt.state.get(p, {})) for p in self.params]
        params = [p.detach() for p in self.params]
        grads = [p.grad for p in self.params]
        return copy.deepcopy({"params": params, "state": state, "grads": grads})


def flat(snapshot: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of a nest of dicts and lists, by path."""
    if isinstance(snapshot, Tensor):
        return {path: snapshot}
    if isinstance(snapshot, dict):
        items = list(snapshot.items())
    elif isinstance(snapshot, list):
        items = list(enumerate(snapshot))
    else:
        return {}
    return {k: v for key, value in items for k, v in flat(value, f"{path}.{key}").items()}
