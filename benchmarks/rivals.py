"""The pipelines that are compared on a GPU, in addition to those of `benchmarks/pipelines.py`.

The Megatron-style and DeepSpeed-style ones write out in torch operations what those frameworks do
on one rank, launches and host syncs included; only their own fused Adam is replaced by torch's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from benchmarks.param_sets import GRAD_SCALE, Gradients
from benchmarks.pipelines import (
    ADAMW,
    KINDS,
    MAX_GRAD_NORM,
    SGD,
    Kind,
    Pipeline,
    TorchOpsMasters,
    Unavailable,
    ours,
    torch_adamw,
)

TRITON = "_triton"  # at the end of the names of pipelines and kernels of the Triton backend
EPS = 1e-6  # of torch's clip_grad_norm_; Megatron and DeepSpeed have the same
BY_BF16_GRADS = 20.0  # tolerances: the clipped gradient was rounded to bf16
BY_BF16_PARAMS = 500.0  # tolerances: half a move of AdamW, where a param of 0.1 is known to 2e-4


class Compiled(Pipeline):
    """Clip and step compiled together; unscaling, and the skip with its sync, are the scaler's."""

    def __init__(self, params: list[Tensor], grads: Gradients) -> None:
        on_gpu = params[0].device.type == "cuda"
        super().__init__(params, grads, torch_adamw(foreach=True, capturable=on_gpu))
        plain_step = self.optimizer.step

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
            plain_step()

        # Without a GPU only what Dynamo does is of interest, not minutes of C++ compiler.
        backend = "inductor" if on_gpu else "eager"
        self.optimizer.step = torch.compile(clip_and_step, backend=backend)

    def step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class MegatronFp16(TorchOpsMasters):
    """megatron/core/optimizer/optimizer.py, Float16OptimizerWithFloat16Params.step."""

    def __init__(self, params: list[Tensor], grads: Gradients) -> None:
        super().__init__(params, grads, torch_adamw(fused=True))
        self.master_grads = []
        self._found_inf = torch.zeros((), device=params[0].device)
        self._inv_scale = torch.full((), 1.0 / GRAD_SCALE, device=params[0].device)

    @torch.no_grad()
    def step(self) -> None:
        for param, master in zip(self.params, self.masters, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()  # a kernel per param, as there
            param.grad = None
        grads = [master.grad for master in self.masters if master.grad is not None]
        self._found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, self._found_inf, self._inv_scale)
        if self._found_inf.item() > 0:
            return
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item()
        coef = MAX_GRAD_NORM / (norm + EPS)
        if coef < 1.0:
            torch._foreach_mul_(grads, coef)
        self.optimizer.step()
        torch._foreach_copy_([param.detach() for param in self.params], self.masters)


class DeepSpeedFp16(Pipeline):
    """deepspeed/runtime/fp16/fused_optimizer.py, FP16_Optimizer.step without ZeRO."""

    def __init__(self, params: list[Tensor], grads: Gradients) -> None:
        flat = _flatten_dense_tensors([param.detach() for param in params])
        for param, view in zip(params, _unflatten_dense_tensors(flat, params), strict=True):
            param.data = view
        self._master = torch.nn.Parameter(flat.float())
        super().__init__([self._master], grads, torch_adamw(fused=True))
        self.params = params

    @torch.no_grad()
    def step(self) -> None:
        grads = [param.grad for param in self.params if param.grad is not None]
        for grad in grads:  # CheckOverflow: a sum and a host sync per param
            if float(grad.float().sum()) in (float("inf"), float("-inf")):
                return
        flat_grad = _flatten_dense_tensors([grad.float() for grad in grads])
        del grads
        for param in self.params:
            param.grad = None
        norm = flat_grad.norm().item() / GRAD_SCALE
        clip = (norm + EPS) / MAX_GRAD_NORM
        flat_grad.mul_(1.0 / (max(clip, 1.0) * GRAD_SCALE))
        self._master.grad = flat_grad
        self.optimizer.step()
        self._master.grad = None
        for param, master in zip(self.params, self.updated(), strict=True):
            param.data.copy_(master)

    def updated(self) -> list[Tensor]:
        flat = self._master.detach()
        return list(_unflatten_dense_tensors(flat, self.params))


class ClipThenLibraryStep(Pipeline):
    """Norm and scale of the bf16 gradients as Megatron clips them, then a library's optimizer."""

    @torch.no_grad()
    def step(self) -> None:
        grads = [param.grad for param in self.params if param.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms)) / GRAD_SCALE
        coef = (MAX_GRAD_NORM / (norm + EPS)).clamp(max=1.0) / GRAD_SCALE
        torch._foreach_mul_(grads, coef)
        self.optimizer.step()

    def updated(self) -> list[Tensor]:
        groups = getattr(self.optimizer, "param_groups_master", None)  # Apex
        if groups:
            return [master for group in groups for master in group["params"]]
        states = self.optimizer.state
        return [states[param].get("master_param", param) for param in self.params]


def _library(
    module: str, name: str, **options: Any
) -> Callable[[list[Tensor], Gradients], Pipeline]:
    def build(params: list[Tensor], grads: Gradients) -> Pipeline:
        try:
            optimizer = getattr(importlib.import_module(module), name)
            return ClipThenLibraryStep(params, grads, lambda p: optimizer(p, **ADAMW, **options))
        except Exception as error:  # compiled extensions fail to load in many ways
            raise Unavailable(f"{type(error).__name__}: {error}") from error

    return build


def _torch_sgd(**flags: Any) -> Callable[[list[Tensor]], Any]:
    return lambda params: torch.optim.SGD(params, **SGD, **flags)


def _ours_on(backend: str, suffix: str, label: str) -> dict[str, Kind]:
    """Ours reads a half param that it writes, to follow what others wrote to it: 32 bytes."""
    adamw: dict[str, Any] = {**ADAMW, "backend": backend}
    sgd: dict[str, Any] = {**SGD, "decoupled_weight_decay": False, "backend": backend}
    build = _where_available(backend, ours("FusedAdamW", **adamw))
    return {
        f"fusedopt_adamw{suffix}": Kind(label, 32, build),
        f"fusedopt_adamw_fp16{suffix}": Kind(label, 32, build),
        f"fusedopt_adamw_bf16{suffix}": Kind(label, 32, build),
        f"fusedopt_sgd{suffix}": Kind(
            label, 24, _where_available(backend, ours("FusedSGD", **sgd))
        ),
    }


def _where_available(
    backend: str, build: Callable[[list[Tensor], Gradients], Pipeline]
) -> Callable[[list[Tensor], Gradients], Pipeline]:
    """Triton may be missing, as a library may; without the CUDA module there is nothing to time."""

    def checked(params: list[Tensor], grads: Gradients) -> Pipeline:
        if backend == "triton":
            reason = importlib.import_module("fusedopt.backends.triton").unavailable_reason()
            if reason is not None:
                raise Unavailable(reason)
        return build(params, grads)

    return checked


def gpu_kinds(backends: Mapping[str, str]) -> dict[str, Kind]:
    """All pipelines by name, ours on what serves as the backends `cuda` and `triton`."""
    adamw: dict[str, Any] = {**ADAMW, "backend": backends["cuda"]}
    half_stock = ours("FusedAdamW", stock_scaler=True, **adamw)
    te, apex = "transformer_engine.pytorch.optimizers", "apex.optimizers"
    return {
        **_ours_on(backends["cuda"], "", "fusedopt"),
        **_ours_on(backends["triton"], TRITON, "fusedopt, Triton"),
        "fusedopt_adamw_stock_scaler": Kind("fusedopt, torch's scaler", 40, half_stock),
        "fusedopt_adamw_fp16_stock_scaler": Kind("fusedopt, torch's scaler", 36, half_stock),
        **{name: KINDS[name] for name in ("adamw_fused", "adamw_foreach", "adamw_bf16_torch_ops")},
        "adamw_compiled": Kind("torch.compile", 44, Compiled),
        "sgd_fused": Kind(
            "torch fused=True", 40, lambda p, g: Pipeline(p, g, _torch_sgd(fused=True))
        ),
        "sgd_foreach": Kind(
            "torch foreach=True", 64, lambda p, g: Pipeline(p, g, _torch_sgd(foreach=True))
        ),
        "megatron_fp16": Kind("Megatron-style", 60, MegatronFp16),
        "deepspeed_fp16": Kind("DeepSpeed-style", 70, DeepSpeedFp16),
        "te_fused_adam": Kind(
            "TransformerEngine FusedAdam",
            34,
            _library(te, "FusedAdam", adam_w_mode=True, master_weights=True),
            BY_BF16_GRADS,
        ),
        "apex_fused_adam": Kind(
            "Apex FusedAdam",
            34,
            _library(apex, "FusedAdam", adam_w_mode=True, capturable=True, master_weights=True),
            BY_BF16_GRADS,
        ),
        "flashoptim_adamw": Kind(
            "FlashOptim", 18, _library("flashoptim", "FlashAdamW"), BY_BF16_PARAMS
        ),
        "bitsandbytes_adamw8bit": Kind(
            "bitsandbytes 8-bit", 16, _library("bitsandbytes.optim", "AdamW8bit"), BY_BF16_PARAMS
        ),
    }


def unavailable_libraries() -> dict[str, str]:
    """The libraries that are compared where they import, and why each does not."""
    reasons = {}
    for module in ("transformer_engine.pytorch", "apex", "flashoptim", "bitsandbytes"):
        try:
            importlib.import_module(module)
        except Exception as error:
            reasons[module] = f"{type(error).__name__}: {error}".splitlines()[0]
    return reasons
