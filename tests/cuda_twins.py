"""One optimizer served by the CUDA kernels through the shim, and its twin on the CPU backend."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from cases import CHUNK, FULL_CASES, OptimizerCase, adamw, sgd
from gpu_twins import Twins, grads_like, values_of
from torch import Tensor

CPU = torch.device("cpu")
RUN_LENGTHS = [0, 1, 7, 31, 256, 300, CHUNK + 9, 2 * CHUNK + 1, 260]

# Cases that between them run every instantiation of every kernel.
KERNEL_CASES = [
    *FULL_CASES,
    adamw("plain", {"max_grad_norm": 1.0}, lr=0.02, weight_decay=0.1),
    adamw("unmeasured", lr=0.01, eps=1e-2, weight_decay=0.1, decoupled_weight_decay=False),
    sgd("plain", {"max_grad_norm": 1.0}, lr=0.1, weight_decay=0.3),
    sgd("nesterov", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
]


class ShimTwins(Twins):
    """Both on the CPU, also where there is a GPU."""

    backend = "cuda"

    def __init__(self, rule: str, groups: Sequence[dict[str, Any]], **common: Any) -> None:
        n_params = sum(len(group["params"]) for group in groups)
        super().__init__(rule, groups, [CPU] * n_params, **common)

    @classmethod
    def of_lengths(
        cls,
        case: OptimizerCase,
        lengths: Sequence[int],
        dtype: torch.dtype = torch.float32,
        **common: Any,
    ) -> ShimTwins:
        group = {"params": values_of(lengths, dtype), **case.hyper}
        return cls(case.rule, [group], **{**case.common, **common})

    def run(self, dtype: torch.dtype | None = None, steps: int = 3) -> None:
        """Steps with gradients of `dtype`, or of the params' own, compared after each."""
        for step in range(steps):
            self.step(grads_like(self.params, step, dtype))
            self.check()

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
