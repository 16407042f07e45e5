"""The table of cases of the GPU benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.cases import Case, Comparison
from benchmarks.param_sets import Shape, equal, gpt, gpt2, llama_3_2_1b, ragged, resnet50

Shapes = list[Shape]


def tiny() -> Shapes:
    """For a dry run: tails, and so many elements in all that scaled fp16 gradients are finite.

    Triton's interpreter takes 20 ms for each tensor.
    """
    return [(3, 5, 7), (257,), (60, 65)]


@dataclass(frozen=True)
class GpuCase(Case):
    """The first pipeline of the comparisons is ours; the others are its rivals."""

    grads: str = "new"
    quick: bool = False

    @property
    def ours(self) -> str:
        return self.comparisons[0].pipeline

    @property
    def pipelines(self) -> list[str]:
        return [self.ours, *(comparison.reference for comparison in self.comparisons)]

    @property
    def compiles(self) -> bool:
        return "adamw_compiled" in self.pipelines

    def shrunk(self) -> GpuCase:
        """For a dry run."""
        label = f"DRY RUN, a tiny list in the place of: {self.label}"
        return dataclasses.replace(self, shapes=tiny, label=label)


_ADAMW = ("fusedopt_adamw", "fusedopt_adamw_triton", "fusedopt_adamw_amp_scaling",
          "adamw_fused", "adamw_foreach")  # fmt: skip
_COMPILED = ("fusedopt_adamw", "adamw_compiled")
_SGD = ("fusedopt_sgd", "fusedopt_sgd_triton", "sgd_fused", "sgd_foreach")
_FP16 = ("fusedopt_adamw_fp16", "fusedopt_adamw_fp16_triton", "fusedopt_adamw_fp16_amp_scaling",
         "megatron_fp16", "deepspeed_fp16")  # fmt: skip
_BF16 = ("fusedopt_adamw_bf16", "fusedopt_adamw_bf16_triton", "adamw_bf16_torch_ops",
         "te_fused_adam", "apex_fused_adam", "flashoptim_adamw",
         "bitsandbytes_adamw8bit")  # fmt: skip


def _case(
    name: str,
    label: str,
    shapes: Callable[[], Shapes],
    pipelines: Sequence[str],
    dtype: torch.dtype = torch.float32,
    grads: str = "new",
    quick: bool = False,
) -> GpuCase:
    ours, *rivals = pipelines
    comparisons = tuple(Comparison(ours, rival) for rival in rivals)
    return GpuCase(name, label, shapes, dtype, comparisons, grads, quick)


def gpu_cases() -> dict[str, GpuCase]:
    """Small models first, where a profiler must not have run before; what has to compile last."""
    half, bf16 = torch.float16, torch.bfloat16
    llama, gpt2_label = "Llama-3.2-1B (1.24B in 146 tensors)", "GPT-2 (124M in 148 tensors)"
    resnet = "ResNet-50 (25.6M in 161 tensors)"
    small, many = partial(gpt, 1_000_000, 13), partial(equal, 300, 1000)
    cases = [
        _case("adamw-300x1k", "AdamW fp32, 300 tensors of 1,000", many, _ADAMW, quick=True),
        _case("adamw-1M", "AdamW fp32, 1M in 160 tensors", small, _ADAMW, quick=True),
        _case("adamw-resnet50", f"AdamW fp32, {resnet}", resnet50, _ADAMW, quick=True),
        _case("adamw-ragged", "AdamW fp32, 2,000 tensors of 1 to 5,000", ragged, _ADAMW),
        _case("adamw-10M", "AdamW fp32, 10M in 148 tensors", partial(gpt, 10_000_000), _ADAMW),
        _case("sgd-resnet50", f"SGD momentum fp32, {resnet}", resnet50, _SGD),
        _case("adamw-llama-1.24B", f"AdamW fp32, {llama}", llama_3_2_1b, _ADAMW),
        _case("fp16-llama-1.24B", f"AdamW fp16 with masters, {llama}", llama_3_2_1b, _FP16, half),
        _case("sgd-llama-1.24B", f"SGD momentum fp32, {llama}", llama_3_2_1b, _SGD),
        _case("adamw-gpt2-124M", f"AdamW fp32, {gpt2_label}", gpt2, _ADAMW),
        _case("bf16-gpt2-124M", f"AdamW bf16 with masters, {gpt2_label}", gpt2, _BF16, bf16),
        _case("fp16-gpt2-124M", f"AdamW fp16 with masters, {gpt2_label}", gpt2, _FP16, half),
        _case("adamw-gpt2-bucket", f"AdamW fp32, {gpt2_label}, gradients off alignment", gpt2,
              _ADAMW, grads="bucket"),
        _case("adamw-gpt2-compiled", f"AdamW fp32, {gpt2_label}, compiled", gpt2, _COMPILED),
        _case("adamw-resnet50-compiled", f"AdamW fp32, {resnet}, compiled", resnet50, _COMPILED),
        _case("adamw-llama-compiled", f"AdamW fp32, {llama}, compiled", llama_3_2_1b, _COMPILED),
    ]  # fmt: skip
    return {case.name: case for case in cases}
