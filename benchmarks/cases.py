"""What is compared, on a CPU and on a GPU: a parameter list, a dtype, and pipelines in pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.param_sets import LISTS, Shape, gpt, gpt2, llama_3_2_1b, ragged, resnet50
from benchmarks.registry import KINDS


@dataclass(frozen=True)
class Comparison:
    """The figure is how many times faster `pipeline` is than `reference`, timed in turns."""

    pipeline: str
    reference: str


@dataclass(frozen=True)
class Case:
    name: str
    label: str
    shapes: Callable[[], list[Shape]]
    dtype: torch.dtype
    comparisons: tuple[Comparison, ...]
    grads: str = "new"

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes())

    @property
    def pipelines(self) -> list[str]:
        return [*dict.fromkeys(n for c in self.comparisons for n in (c.pipeline, c.reference))]

    def shrunk(self) -> Case:
        """For a dry run."""
        label = f"DRY RUN, a tiny list in the place of: {self.label}"
        return dataclasses.replace(self, shapes=tiny, label=label)


def tiny() -> list[Shape]:
    """For a dry run: tails, and so many elements in all that scaled fp16 gradients are finite.

    Triton's interpreter takes 20 ms for each tensor.
    """
    return [(3, 5, 7), (257,), (60, 65)]


# ---- on a CPU ------------------------------------------------------------------------------------

Pairs = Sequence[tuple[str, str]]


def _against(pipeline: str, *references: str) -> Pairs:
    return [(pipeline, reference) for reference in references]


_ADAMW = partial(_against, "fusedopt_adamw")
_SCALING = ("fusedopt_adamw_amp_scaling", "adamw_fused")
_ROOF = ("adamw_fused", "stream_huge")  # no step can be further ahead of torch than a stream is
_ADAMW_MANY = (
    *_ADAMW("adamw_fused", "adamw_foreach", "adamw_deepspeed", "stream_huge", "stream_4k"),
    *_ADAMW("fusedopt_adamw_exact"),
    *(_SCALING, ("adamw_foreach", "adamw_fused"), ("adamw_deepspeed", "adamw_fused"), _ROOF),
)
_ADAMW_ONE = (*_ADAMW("adamw_fused", "stream_huge"), _SCALING, _ROOF)
_MODEL = _ADAMW("adamw_fused", "adamw_foreach", "stream_huge")
_SWEEP = (*_MODEL, *_ADAMW("adamw_deepspeed"))
_SGD_MODEL = _against("fusedopt_sgd", "sgd_fused", "sgd_foreach")
_SGD = _SGD_MODEL[:1]
_BF16 = _against("fusedopt_adamw_bf16", "adamw_bf16_torch_ops")
_8BIT = _against("fusedopt_adamw_8bit", "fusedopt_adamw")
_BF16_8BIT = _against("fusedopt_adamw_bf16_8bit", "fusedopt_adamw_bf16")
_BF16_8BIT_PACKAGES = _against("fusedopt_adamw_bf16_8bit", "bitsandbytes_adamw8bit",
                               "torchao_adamw8bit")  # fmt: skip
_BF16_PACKAGES = _against("fusedopt_adamw_bf16", "optimi_adamw", "bitsandbytes_adamw8bit",
                          "torchao_adamw8bit")  # fmt: skip

# The parameter list and the pairs. AdamW with 100M in one tensor is not among them: torch's norm of
# an fp32 tensor as long as that is off by 1 % on the CPU, so its step is another one.
_CASES: tuple[tuple[str, Pairs], ...] = (
    ("tiny-1000x8", (*_ADAMW("adamw_fused"), _SCALING)),
    ("gpt-300k", _SWEEP),
    ("gpt-1M", _ADAMW_MANY),
    ("one-1M", _ADAMW_ONE),
    ("gpt-1M", _SGD),
    ("gpt-1M", _BF16),
    ("gpt-3M", _SWEEP),
    ("ragged", _MODEL),
    ("gpt-10M", (*_ADAMW_MANY, *_ADAMW("adamw_optimi", "adamw_torchao"))),
    ("one-10M", _ADAMW_ONE),
    ("gpt-10M", _SGD),
    ("gpt-10M", (*_BF16, *_BF16_PACKAGES, *_BF16_8BIT, *_BF16_8BIT_PACKAGES)),
    ("gpt-30M", _SWEEP),
    ("resnet50", _MODEL),
    ("resnet50", _SGD_MODEL),
    ("gpt-100M", (*_ADAMW_MANY, *_8BIT)),
    ("gpt-100M", (*_SGD_MODEL, ("sgd_fused", "stream_huge"))),
    ("gpt-100M", (*_BF16, *_BF16_8BIT, ("adamw_bf16_torch_ops", "stream_huge"))),
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
    label = f"{RULES[rule]}, {params} ({size(LISTS[params]())})"
    return Case(name, label, LISTS[params], dtype, tuple(Comparison(*pair) for pair in pairs))


def size(shapes: Sequence[Shape]) -> str:
    numel = sum(math.prod(shape) for shape in shapes)
    many = f"{numel / 1e6:.3g}M" if numel >= 1_000_000 else f"{numel:,}"
    return f"{many} in {len(shapes):,} tensor{'s' if len(shapes) > 1 else ''}"


def all_cases() -> dict[str, Case]:
    return {case.name: case for case in (make_case(params, pairs) for params, pairs in _CASES)}


# ---- on a GPU ------------------------------------------------------------------------------------

# Ours, and its rivals: each is compared with ours.
_GPU_ADAMW = ("fusedopt_adamw", "fusedopt_adamw_triton", "fusedopt_adamw_amp_scaling",
              "adamw_fused", "adamw_foreach")  # fmt: skip
_GPU_COMPILED = ("fusedopt_adamw", "adamw_compiled")
_GPU_SGD = ("fusedopt_sgd", "fusedopt_sgd_triton", "sgd_fused", "sgd_foreach")
_GPU_FP16 = ("fusedopt_adamw_fp16", "fusedopt_adamw_fp16_triton", "fusedopt_adamw_fp16_amp_scaling",
             "megatron_fp16", "deepspeed_fp16")  # fmt: skip
_GPU_BF16 = ("fusedopt_adamw_bf16", "fusedopt_adamw_bf16_triton", "adamw_bf16_torch_ops",
             "te_fused_adam", "apex_fused_adam", "flashoptim_adamw",
             "bitsandbytes_adamw8bit")  # fmt: skip
# Small models first; what has to compile last.
_GPU_CASES: dict[str, tuple[Callable[[], list[Shape]], tuple[str, ...]]] = {
    "adamw-300x1k": (LISTS["equal-300x1k"], _GPU_ADAMW),
    "adamw-1M": (partial(gpt, 1_000_000, 13), _GPU_ADAMW),
    "adamw-resnet50": (resnet50, _GPU_ADAMW),
    "adamw-ragged": (ragged, _GPU_ADAMW),
    "adamw-10M": (LISTS["gpt-10M"], _GPU_ADAMW),
    "sgd-resnet50": (resnet50, _GPU_SGD),
    "adamw-llama-1.24B": (llama_3_2_1b, _GPU_ADAMW),
    "fp16-llama-1.24B": (llama_3_2_1b, _GPU_FP16),
    "sgd-llama-1.24B": (llama_3_2_1b, _GPU_SGD),
    "adamw-gpt2-124M": (gpt2, _GPU_ADAMW),
    "bf16-gpt2-124M": (gpt2, _GPU_BF16),
    "fp16-gpt2-124M": (gpt2, _GPU_FP16),
    "adamw-gpt2-bucket": (gpt2, _GPU_ADAMW),
    "adamw-gpt2-compiled": (gpt2, _GPU_COMPILED),
    "adamw-resnet50-compiled": (resnet50, _GPU_COMPILED),
    "adamw-llama-compiled": (llama_3_2_1b, _GPU_COMPILED),
}
QUICK_GPU_CASES = ("adamw-300x1k", "adamw-1M", "adamw-resnet50")
COMPILED, BUCKET = "-compiled", "-bucket"  # at the end of names; the latter's gradients are views


def gpu_cases() -> dict[str, Case]:
    found = {}
    for name, (shapes, (ours, *rivals)) in _GPU_CASES.items():
        rule = name.partition("-")[0]
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(rule, torch.float32)
        label = f"{name}: {RULES[rule]}, {size(shapes())}"
        comparisons = tuple(Comparison(ours, rival) for rival in rivals)
        grads = "bucket" if name.endswith(BUCKET) else "new"
        found[name] = Case(name, label, shapes, dtype, comparisons, grads)
    return found
