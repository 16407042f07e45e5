"""What is compared on a CPU: a parameter list, a dtype, and pipelines in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.param_sets import LISTS, Shape
from benchmarks.registry import KINDS


@dataclass(frozen=True)
class Comparison:
    """The figure is how many times faster `pipeline` is than `reference`, timed in turns."""

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


Pairs = Sequence[tuple[str, str]]

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
    ("fusedopt_adamw_amp_scaling", "adamw_fused"),
)
_ROOF = ("adamw_fused", "stream_huge")  # no step can be further ahead of torch than a stream is
_ADAMW_MANY = (
    *_AGAINST_FUSED,
    ("adamw_foreach", "adamw_fused"),
    ("adamw_deepspeed", "adamw_fused"),
    ("fusedopt_adamw", "adamw_foreach"),
    ("fusedopt_adamw", "adamw_deepspeed"),
    ("fusedopt_adamw", "stream_huge"),
    ("fusedopt_adamw", "stream_4k"),
    _ROOF,
)
_ADAMW_ONE = (*_AGAINST_FUSED, ("fusedopt_adamw", "stream_huge"), _ROOF)
_MODEL = (
    ("fusedopt_adamw", "adamw_fused"),
    ("fusedopt_adamw", "adamw_foreach"),
    ("fusedopt_adamw", "stream_huge"),
)
_SWEEP = (*_MODEL, ("fusedopt_adamw", "adamw_deepspeed"))
_PACKAGES = (("fusedopt_adamw", "adamw_optimi"), ("fusedopt_adamw", "adamw_torchao"))
_SGD = (("fusedopt_sgd", "sgd_fused"),)
_SGD_MODEL = (*_SGD, ("fusedopt_sgd", "sgd_foreach"))
_BF16 = (("fusedopt_adamw_bf16", "adamw_bf16_torch_ops"),)
_BF16_PACKAGES = tuple(
    ("fusedopt_adamw_bf16", package)
    for package in ("optimi_adamw", "bitsandbytes_adamw8bit", "torchao_adamw8bit")
)

# The parameter list and the pairs. AdamW with 100M in one tensor is not among them: torch's norm of
# an fp32 tensor as long as that is off by 1 % on the CPU, so its step is another one.
_CASES: tuple[tuple[str, Pairs], ...] = (
    ("tiny-1000x8", _AGAINST_FUSED),
    ("gpt-300k", _SWEEP),
    ("gpt-1M", _ADAMW_MANY),
    ("one-1M", _ADAMW_ONE),
    ("gpt-1M", _SGD),
    ("gpt-1M", _BF16),
    ("gpt-3M", _SWEEP),
    ("ragged", _MODEL),
    ("gpt-10M", (*_ADAMW_MANY, *_PACKAGES)),
    ("one-10M", _ADAMW_ONE),
    ("gpt-10M", _SGD),
    ("gpt-10M", (*_BF16, *_BF16_PACKAGES)),
    ("gpt-30M", _SWEEP),
    ("resnet50", _MODEL),
    ("resnet50", _SGD_MODEL),
    ("gpt-100M", _ADAMW_MANY),
    ("gpt-100M", (*_SGD, ("fusedopt_sgd", "sgd_foreach"), ("sgd_fused", "stream_huge"))),
    ("gpt-100M", (*_BF16, ("adamw_bf16_torch_ops", "stream_huge"))),
    ("gpt2-124M", _MODEL),
    ("gpt2-124M", _BF16),
)
QUICK_CASES = ("adamw-tiny", "adamw-gpt-1M", "adamw-one-1M", "sgd-gpt-1M", "bf16-gpt-1M")

# By the start of a case's name.
RULES = {
    "adamw": "AdamW fp32",
    "sgd": "SGD momentum fp32",
    "fp16": "AdamW fp16 with fp32 masters",
    "bf16": "AdamW bf16 with fp32 masters",
}
_HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def make_case(params: str, pairs: Pairs, dtype: torch.dtype | None = None) -> Case:
    """Named after what its first pipeline does and the list of its parameters."""
    first = pairs[0][0]
    dtype = dtype or KINDS[first].dtypes[0]
    rule = _HALF.get(dtype, "sgd" if "sgd" in first else "adamw")
    name = f"{rule}-{params.removesuffix('-1000x8')}"
    shapes = LISTS[params]
    label = f"{RULES[rule]}, {params} ({size(shapes())})"
    targets = _TARGETS.get(name, {})
    comparisons = tuple(Comparison(*pair, targets.get(pair)) for pair in pairs)
    return Case(name, label, shapes, dtype, comparisons)


def size(shapes: Sequence[Shape]) -> str:
    numel = sum(math.prod(shape) for shape in shapes)
    many = f"{numel / 1e6:.3g}M" if numel >= 1_000_000 else f"{numel:,}"
    return f"{many} in {len(shapes):,} tensor{'s' if len(shapes) > 1 else ''}"


def all_cases() -> dict[str, Case]:
    cases = [make_case(params, pairs) for params, pairs in _CASES]
    return {case.name: case for case in cases}
