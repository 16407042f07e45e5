"""One optimizer served by the interpreted Triton kernels, and its twin on the CPU backend."""

from __future__ import annotations

import torch
from cases import CHUNK, OptimizerCase, around
from gpu_twins import HostTwins
from harness import randn
from torch import Tensor
from triton_interpreter import BLOCK

CPU = torch.device("cpu")

# Around a row of lanes, the wide step of reduce, and the blocks and the tail steps of update.
LENGTHS = sorted({0, 1, 2, 3, *around(BLOCK // 4, 512, 768, BLOCK, BLOCK + 256), 2 * BLOCK + 700})
LONG_LENGTHS = around(CHUNK)
MEASURE = OptimizerCase("measure", "sgd", {"lr": 0.125}, {"max_grad_norm": 2.0})


class TritonTwins(HostTwins):
    backend = "triton"

    def check(self) -> None:
        """The words of the norm, too, where one device has them all."""
        super().check()
        plan = self.opt._shared.plan  # none before the first step that torch's scaler lets through
        parts = () if plan is None else plan.parts
        if len(parts) == 1:
            ours = parts[0].tensors["words"].view(torch.int64)
            assert ours.tolist() == self.twin._shared.plan._tables["words"].tolist()
            for table in ("sums", "ticket"):
                assert not parts[0].tensors[table].any(), f"{table}: not ready for the next step"

    def tensors(self) -> list[Tensor]:
        """All that the kernels of ours may touch."""
        plan = self.opt._shared.plan
        own = [self.opt._shared.scalars, *self.params]
        own += [p.grad for p in self.params if p.grad is not None]
        own += [t for p in self.params for t in self.opt.state.get(p, {}).values()]
        own += [row.dense for row in plan.rows] + list(plan._staged_grads.values())
        own += [number for part in plan.parts for number in part._kept if number is not None]
        return own + [t for part in plan.parts for t in (part.scalars, *part.tensors.values())]


def shifted(values: Tensor, offset: int) -> Tensor:
    """A view that begins `offset` elements into a larger buffer, and ends before its end."""
    buffer = torch.full((values.numel() + 32,), 77.0, dtype=values.dtype)
    return buffer[offset : offset + values.numel()].copy_(values)


def unlike(n: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Magnitudes that differ from lane to lane and from row to row of lanes: their order shows."""
    powers = torch.arange(n) * 7 % 11 - 5.0
    return (randn(n, seed, torch.float32) * 2.0**powers * scale).to(dtype)
