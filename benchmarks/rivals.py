"""What ours is compared with, beside torch's optimizers under torch's scaler.

The Megatron-style and DeepSpeed-style ones write out in torch operations what those frameworks do
on one rank, launches and host syncs included; only their own fused Adam is replaced by torch's.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from benchmarks.param_sets import GRAD_SCALE, Gradients
from benchmarks.pipelines import ADAMW, MAX_GRAD_NORM, SGD, Pipeline, TorchOpsMasters, Unavailable

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one and prints that

Build = Callable[[list[Tensor], Gradients], Pipeline]
EPS = 1e-6  # of torch's clip_grad_norm_; Megatron and DeepSpeed have the same


class Compiled(Pipeline):
    """Clip and step compiled together; unscaling, and the skip with its sync, are the scaler's."""

    def __init__(self, params: list[Tensor], grads: Gradients, compiler: str = "inductor") -> None:
        on_gpu = params[0].device.type == "cuda"
        super().__init__(params, grads, torch_adamw(foreach=True, capturable=on_gpu))
        plain_step = self.optimizer.step

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
            plain_step()

        self.optimizer.step = torch.compile(clip_and_step, backend=compiler)

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


class Library(Pipeline):
    """A library's optimizer under torch's scaler and clipping."""

    module = ""

    def describe(self) -> str:
        package = self.module.split(".")[0]
        version = getattr(importlib.import_module(package), "__version__", "of unknown version")
        return f"{package} {version}"


class ClipThenLibraryStep(Library):
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


def library(driver: type[Library], module: str, name: str, **options: Any) -> Build:
    """Builds the optimizer ``name`` of ``module`` with ``options``, stepped as ``driver`` does."""

    def build(params: list[Tensor], grads: Gradients) -> Pipeline:
        try:
            optimizer = getattr(importlib.import_module(module), name)
            pipeline = driver(params, grads, lambda p: optimizer(p, **ADAMW, **options))
        except Exception as error:  # compiled extensions fail to load in many ways
            raise Unavailable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        pipeline.module = module
        return pipeline

    return build


def torch_adamw(**flags: Any) -> Callable[[list[Tensor]], Any]:
    return partial(torch.optim.AdamW, **ADAMW, **flags)


def torch_sgd(**flags: Any) -> Build:
    def build(params: list[Tensor], grads: Gradients) -> Pipeline:
        half = any(param.dtype in (torch.float16, torch.bfloat16) for param in params)
        if half and flags.get("fused") and params[0].device.type == "cpu":
            # torch 2.13's leaves blocks of half params without their update.
            raise ValueError("torch's fused SGD on the CPU is wrong for fp16 and bf16 params")
        return Pipeline(params, grads, lambda p: torch.optim.SGD(p, **SGD, **flags))

    return build
