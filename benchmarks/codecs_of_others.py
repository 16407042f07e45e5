"""AdamW in torch operations that rounds its states as other packages store them.

Written from what their sources and papers say about the format, to compare formats under one
optimizer; no package is run, and nothing here says what its steps cost. Each codec is a function
from a state to what is read back from memory, one for exp_avg and one for exp_avg_sq.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rounded = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    label: str
    bytes_per_state: float
    exp_avg: Rounded
    exp_avg_sq: Rounded


def in_blocks(size: int, rounded: Callable[[Tensor], Tensor]) -> Rounded:
    """``rounded`` sees a block in each row; the last one is filled with zeros."""

    def of_all(x: Tensor) -> Tensor:
        n = x.numel()
        blocks = torch.zeros(-(-n // size), size)
        blocks.view(-1)[:n] = x.flatten()
        return rounded(blocks).view(-1)[:n].view_as(x)

    return of_all


def largest_of(blocks: Tensor) -> Tensor:
    """Of each block, or 1 where all is zero."""
    largest = blocks.abs().amax(dim=1, keepdim=True)
    return torch.where(largest == 0, 1.0, largest)


@cache
def dynamic_map(signed: bool) -> Tensor:
    """bitsandbytes: seven decades, each with twice the values of the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1)
        means = (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += means + ([-mean for mean in means] if signed else [])
    assert len(values) == 256
    return torch.tensor(sorted(values))


def dynamic(signed: bool) -> Rounded:
    def rounded(blocks: Tensor) -> Tensor:
        values, scale = dynamic_map(signed), largest_of(blocks)
        borders = (values[1:] + values[:-1]) / 2
        return values[torch.bucketize(blocks / scale, borders)] * scale

    return in_blocks(256, rounded)


def float8(blocks: Tensor) -> Tensor:
    """torchao: e4m3, the largest of a block at the format's largest."""
    scale = largest_of(blocks) / 448.0
    return (blocks / scale).to(torch.float8_e4m3fn).float() * scale


def softsign(blocks: Tensor) -> Tensor:
    """FlashOptim's exp_avg: int8 of 2x / (1 + |x|), an fp16 scale."""
    scale = blocks.abs().amax(dim=1, keepdim=True).half().float()
    x = torch.where(scale > 0, blocks / scale, 0.0)
    code = (127 * (2 * x / (1 + x.abs()))).round().clamp(-127, 127) / 127
    return code / (2 - code.abs()) * scale


def square_root(blocks: Tensor) -> Tensor:
    """FlashOptim's exp_avg_sq: uint8 of the square root, an fp16 scale."""
    roots = blocks.sqrt()
    scale = roots.amax(dim=1, keepdim=True).half().float()
    code = torch.where(scale > 0, 255 * roots / scale, 0.0).round().clamp(0, 255)
    return (code / 255 * scale).square()


def linear(levels: int) -> Rounded:
    def rounded(blocks: Tensor) -> Tensor:
        scale = largest_of(blocks)
        return (blocks / scale * levels).round() / levels * scale

    return in_blocks(32, rounded)


def nearest(x: Tensor) -> Tensor:
    return x.bfloat16().float()


FORMATS = {
    "bf16_nearest": Format("bf16 nearest (torch, TransformerEngine)", 2, nearest, nearest),
    "dynamic_256": Format(
        "bitsandbytes' dynamic map, 256", 1 + 4 / 256, dynamic(True), dynamic(False)
    ),
    "fp8_256": Format(
        "torchao's fp8, 256", 1 + 4 / 256, in_blocks(256, float8), in_blocks(256, float8)
    ),
    "softsign_32": Format(
        "FlashOptim's softsign and root, 32", 1 + 2 / 32, in_blocks(32, softsign),
        in_blocks(32, square_root),
    ),
    "linear_32": Format("linear, 32", 1 + 4 / 32, linear(127), linear(255)),
}  # fmt: skip


class RoundedAdamW(torch.optim.Optimizer):
    """Decode, step, encode. Clips by the norm of all gradients, if asked."""

    def __init__(
        self, params: Any, form: Format, max_grad_norm: float | None = None, **options: Any
    ) -> None:
        super().__init__(params, options)
        self.form, self.max_grad_norm, self.grad_norm = form, max_grad_norm, None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.max_grad_norm is not None:
            every = [p for group in self.param_groups for p in group["params"]]
            self.grad_norm = torch.nn.utils.clip_grad_norm_(every, self.max_grad_norm)
        for group in self.param_groups:
            for param in group["params"]:
                self.update(group, param)

    def update(self, group: dict[str, Any], param: Tensor) -> None:
        own, (beta1, beta2), grad = self.state[param], group["betas"], param.grad
        if not own:
            own.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        own["step"] += 1
        exp_avg = own["exp_avg"].lerp(grad, 1 - beta1)
        exp_avg_sq = (own["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2)
        denom = (exp_avg_sq / (1 - beta2 ** own["step"])).sqrt_().add_(group["eps"])
        update = exp_avg / (1 - beta1 ** own["step"]) / denom
        param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        own["exp_avg"] = self.form.exp_avg(exp_avg)
        own["exp_avg_sq"] = self.form.exp_avg_sq(exp_avg_sq)
        own["largest"] = max(own.get("largest", 0.0), update.abs().max().item())
