"""What is compared on a CPU: a parameter list, a dtype, and pipelines in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.param_sets import Shape, equal, gpt, one_tensor


@dataclass(frozen=True)
class Comparison:
    """`pipeline` is timed between samples of `reference`; the figure is how many times faster."""

    pipeline: str
    reference: str
    target: float | None = None


@dataclass(frozen=True)
class Case:
    name: str
    label: str
    shapes: Callable[[], list[Shape]]
    dtype: torch.dtype
    comparisons: tuple[Comparison, ...]

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes())


# What is not named here is measured for information.
_TARGETS: dict[str, dict[tuple[str, str], float]] = {
    "adamw-gpt-1M": {("fusedopt_adamw", "adamw_fused"): 10.0},
    "adamw-one-1M": {("fusedopt_adamw", "adamw_fused"): 3.5},
    "adamw-gpt-10M": {("fusedopt_adamw", "adamw_fused"): 2.4},
    "adamw-one-10M": {("fusedopt_adamw", "adamw_fused"): 1.7},
    "adamw-gpt-100M": {
        ("fusedopt_adamw", "adamw_fused"): 1.7,
        ("fusedopt_adamw", "adamw_foreach"): 4.0,
        ("fusedopt_adamw", "adamw_deepspeed"): 1.7,
        ("fusedopt_adamw", "stream_huge"): 0.95,
    },
    "sgd-gpt-100M": {("fusedopt_sgd", "sgd_fused"): 1.65},
    "bf16-gpt-100M": {("fusedopt_adamw_bf16", "adamw_bf16_torch_ops"): 2.0},
    "adamw-tiny": {("fusedopt_adamw", "adamw_fused"): 25.0},
}

_AGAINST_FUSED = (
    ("fusedopt_adamw", "adamw_fused"),
    ("fusedopt_adamw_stock_scaler", "adamw_fused"),
)
_ADAMW_MANY = (
    *_AGAINST_FUSED,
    ("adamw_foreach", "adamw_fused"),
    ("adamw_deepspeed", "adamw_fused"),
    ("fusedopt_adamw", "adamw_foreach"),
    ("fusedopt_adamw", "adamw_deepspeed"),
    ("fusedopt_adamw", "stream_huge"),
    ("fusedopt_adamw", "stream_4k"),
)
_ADAMW_ONE = (*_AGAINST_FUSED, ("fusedopt_adamw", "stream_huge"))
_SGD = (("fusedopt_sgd", "sgd_fused"),)
_BF16 = (("fusedopt_adamw_bf16", "adamw_bf16_torch_ops"),)
_SIZES = {"1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}


def _case(
    name: str,
    label: str,
    shapes: Callable[[], list[Shape]],
    pairs: Sequence[tuple[str, str]],
    dtype: torch.dtype = torch.float32,
) -> Case:
    targets = _TARGETS.get(name, {})
    comparisons = tuple(Comparison(*pair, targets.get(pair)) for pair in pairs)
    return Case(name, label, shapes, dtype, comparisons)


def all_cases() -> dict[str, Case]:
    cases = [
        _case(
            "adamw-tiny", "AdamW fp32, 1,000 tensors of 8", partial(equal, 1000, 8), _AGAINST_FUSED
        )
    ]
    for size, numel in _SIZES.items():
        many, one = partial(gpt, numel), partial(one_tensor, numel)
        in_148 = f"{size} in 148 tensors"
        cases += [
            _case(f"adamw-gpt-{size}", f"AdamW fp32, {in_148}", many, _ADAMW_MANY),
            _case(f"adamw-one-{size}", f"AdamW fp32, {size} in 1 tensor", one, _ADAMW_ONE),
            _case(f"sgd-gpt-{size}", f"SGD momentum fp32, {in_148}", many, _SGD),
            _case(
                f"bf16-gpt-{size}",
                f"AdamW bf16 with fp32 masters, {in_148}",
                many,
                _BF16,
                torch.bfloat16,
            ),
        ]
    return {case.name: case for case in cases}


QUICK_CASES = ("adamw-tiny", "adamw-gpt-1M", "adamw-one-1M", "sgd-gpt-1M", "bf16-gpt-1M")
