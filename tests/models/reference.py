"""The whole optimizer step in float64, one tensor and one line at a time.

`Oracle` is what the kernels are held to. It takes everything at its mathematical value: no float32
constants, no chunks, no fused operations. `TorchStep` is the same step made of torch.optim and
torch.nn.utils calls. In float64 it checks the oracle; in float32 it says how large an error the
tolerance policy may call normal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from models import model_of

HALF = (torch.float16, torch.bfloat16)
Group = dict[str, Any]
Grads = list["Tensor | None"]


def as_floats(group: Group) -> Group:
    """The group with tensor lr and betas read as the numbers they hold."""
    floats = {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items()}
    if "betas" in floats:
        floats["betas"] = tuple(float(beta) for beta in floats["betas"])
    return floats


def global_norm(grads: list[Tensor], norm_type: float) -> Tensor:
    """L2 or maximum norm over all tensors; a NaN anywhere is a NaN norm."""
    flat = torch.cat([torch.zeros(1, dtype=torch.float64), *(g.flatten() for g in grads)])
    return flat.abs().amax() if norm_type == math.inf else flat.square().sum().sqrt()


def unscale(grad: Tensor, grad_scale: float) -> Tensor:
    """In float64, but what overflows in float32 (as kernels unscale all but float64) is inf."""
    unscaled = grad.double() / grad_scale
    overflows = unscaled.to(torch.promote_types(grad.dtype, torch.float32)).isinf()
    return torch.where(overflows, torch.inf * unscaled.sign(), unscaled)


def is_useless(grad_scale: float | None) -> bool:
    """Whether fp32 has no reciprocal of the scale."""
    if grad_scale is None:
        return False
    return not bool(torch.tensor(grad_scale, dtype=torch.float64).reciprocal().float().isfinite())


class Slot:
    """One param: its float64 value, its stored (possibly half) value, its state and step count."""

    def __init__(self, param: Tensor, group: Group, has_master: bool) -> None:
        self.dtype = param.dtype
        self.rounds_every_step = param.dtype in HALF and not has_master
        self.group = group
        self.stored = param.detach().double().clone()
        self.master = self.stored.clone()
        self.state: dict[str, Tensor] = {}
        self.step = 0
        # The largest magnitude that entered the arithmetic of each element: errors are counted in
        # its ulps, so that terms which cancel to nearly zero do not make an error look large.
        self.scale = {"param": self.master.abs()}

    def read_external_writes(self) -> None:
        """Where someone wrote to the param, the master starts again from what was written."""
        written = self.stored != self.master.to(self.dtype).double()
        self.master = torch.where(written, self.stored, self.master)

    def write(self, values: Tensor) -> None:
        """Stand for an in-place edit of the param by its user."""
        self.stored = values.double()
        if self.dtype not in HALF:
            self.master = self.stored
        self.grow_scale("param", self.stored)

    def store(self) -> None:
        self.stored = self.master.to(self.dtype).double()
        if self.rounds_every_step:
            self.master = self.stored

    def grow_scale(self, kind: str, *magnitudes: Tensor, keep: float = 1.0) -> Tensor:
        """Errors live on in the value, decayed by `keep` in a step as the value is."""
        scale = keep * self.scale.get(kind, torch.zeros_like(self.master))
        for magnitude in magnitudes:
            scale = torch.fmax(scale, magnitude.abs())
        self.scale[kind] = scale
        return scale


class Oracle:
    def __init__(
        self,
        rule: str,
        groups: list[Group],
        *,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        max_grad_value: float | None = None,
        master_weights: bool | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        self.rule = rule
        self.max_grad_norm, self.norm_type = max_grad_norm, norm_type
        self.max_grad_value, self.skip_nonfinite = max_grad_value, skip_nonfinite
        self.has_masters = master_weights is not False
        self.groups: list[Group] = []
        self.slots: list[Slot] = []
        self.grad_norm = self.clip_coef = torch.tensor(math.nan, dtype=torch.float64)
        self.found_inf, self.skipped_steps = False, 0
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, group: Group) -> None:
        hyper = {**model_of(self.rule).DEFAULTS, "decoupled_weight_decay": True, **group}
        params = hyper.pop("params")
        self.groups.append(hyper)
        self.slots += [Slot(param, hyper, self.has_masters) for param in params]

    def step(
        self,
        grads: Grads,
        grad_scale: float | None = None,
        found_inf: float | None = None,
        clip_coef: float | None = None,
    ) -> None:
        """`grads` in parameter order over all groups, as in `.grad`: scaled, None if there is none.

        A `clip_coef` given is used for the update in place of the oracle's own: the coefficient is
        judged by itself, and its last bit, common to all elements, does not blur their errors.
        """
        scale = 1.0 if grad_scale is None else grad_scale
        unscaled = [None if g is None else unscale(g, scale) for g in grads]
        present = [g for g in unscaled if g is not None]
        self.grad_norm = global_norm(present, self.norm_type)
        self.clip_coef = torch.ones((), dtype=torch.float64)
        if self.max_grad_norm is not None:
            self.clip_coef = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        finite = all(bool(g.isfinite().all()) for g in present)
        self.found_inf = not finite or bool(found_inf) or is_useless(grad_scale)
        has_scaler = grad_scale is not None or found_inf is not None
        if self.found_inf and (has_scaler or self.skip_nonfinite):
            self.skipped_steps += 1
            return
        for slot, grad in zip(self.slots, unscaled, strict=True):
            if grad is not None:
                self._update(slot, grad * (self.clip_coef if clip_coef is None else clip_coef))

    def _update(self, slot: Slot, grad: Tensor) -> None:
        slot.read_external_writes()
        hyper = slot.group
        lr, weight_decay = float(hyper["lr"]), float(hyper["weight_decay"])
        if self.max_grad_value is not None:
            grad = grad.clamp(-self.max_grad_value, self.max_grad_value)
        if hyper["maximize"]:
            grad = -grad
        decay = weight_decay * slot.master
        magnitude = grad.abs()
        if hyper["decoupled_weight_decay"]:
            slot.master = slot.master - lr * decay
        else:
            magnitude = torch.fmax(magnitude, decay.abs())
            grad = grad + decay
        move, move_magnitude = model_of(self.rule).oracle_move(slot, grad, magnitude)
        slot.grow_scale("param", lr * move_magnitude, slot.master)
        slot.master = slot.master - lr * move
        slot.grow_scale("param", slot.master)
        slot.store()


class TorchStep:
    """The oracle's interface over torch.optim; half params are kept in `dtype` and rounded."""

    def __init__(
        self, rule: str, groups: list[Group], dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self.rule, self.dtype = rule, dtype
        self.max_grad_norm = options.get("max_grad_norm")
        self.norm_type = options.get("norm_type", 2.0)
        self.max_grad_value = options.get("max_grad_value")
        self.skip_nonfinite = options.get("skip_nonfinite", False)
        self.has_masters = options.get("master_weights") is not False
        self.groups: list[Group] = []
        self.params: list[Tensor] = []
        self.stored: list[Tensor] = []
        self.optimizer: torch.optim.Optimizer | None = None
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, group: Group) -> None:
        hyper = {**model_of(self.rule).DEFAULTS, "decoupled_weight_decay": True, **group}
        stored = [p.detach().clone() for p in hyper.pop("params")]
        params = [torch.nn.Parameter(p.to(self._compute_dtype(p)).clone()) for p in stored]
        self.stored += stored
        self.params += params
        self.groups.append(hyper)
        torch_group = {**as_floats(hyper), "params": params}
        if self.optimizer is not None:
            self.optimizer.add_param_group(torch_group)
        else:
            self.optimizer = model_of(self.rule).TorchOptimizer([torch_group])

    def _compute_dtype(self, param: Tensor) -> torch.dtype:
        return torch.float64 if param.dtype == torch.float64 else self.dtype

    def step(
        self,
        grads: Grads,
        grad_scale: float | None = None,
        found_inf: float | None = None,
        clip_coef: float | None = None,
    ) -> None:
        if is_useless(grad_scale):
            return
        inv_scale = 1.0 / (1.0 if grad_scale is None else grad_scale)
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype).contiguous() * inv_scale
        finite = all(bool(p.grad.isfinite().all()) for p in self.params if p.grad is not None)
        has_scaler = grad_scale is not None or found_inf is not None
        if (not finite or found_inf) and (has_scaler or self.skip_nonfinite):
            return
        if clip_coef is not None:
            for param in self.params:
                if param.grad is not None:
                    param.grad.mul_(clip_coef)
        elif self.max_grad_norm is not None:
            # torch has no maximum norm of an empty tensor
            not_empty = [p for p in self.params if p.numel() > 0]
            torch.nn.utils.clip_grad_norm_(not_empty, self.max_grad_norm, self.norm_type)
        if self.max_grad_value is not None and any(p.grad is not None for p in self.params):
            torch.nn.utils.clip_grad_value_(self.params, self.max_grad_value)
        self._read_external_writes()
        self._update()

    def _read_external_writes(self) -> None:
        for param, stored in zip(self.params, self.stored, strict=True):
            written = stored != param.detach().to(stored.dtype)
            param.data = torch.where(written, stored.to(param.dtype), param.detach())

    def _update(self) -> None:
        assert self.optimizer is not None
        for hyper, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            group.update(as_floats(hyper))
        self.optimizer.step()
        for index, param in enumerate(self.params):
            stored = self.stored[index] = param.detach().to(self.stored[index].dtype)
            if not self.has_masters:
                param.data = stored.to(param.dtype)

    def write(self, index: int, values: Tensor) -> None:
        self.stored[index] = values.clone()
        if values.dtype not in HALF:
            self.params[index].data = values.to(self.params[index].dtype, copy=True)

    def state(self, index: int) -> dict[str, Tensor]:
        assert self.optimizer is not None
        return dict(self.optimizer.state[self.params[index]])
