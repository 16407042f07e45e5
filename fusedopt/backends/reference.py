"""The reference backend: the three verbs in plain torch operations.

Slow and obvious. Serves where no kernel does (no compiler, float64, devices without a backend) and
shows what the kernels compute. It rounds where torch's operations round, so it agrees with the
kernels within the tolerance policy, not to the bit; and it reads the skip flag on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import (
    CLIP_COEF,
    FOUND_INF,
    GRAD_MULT,
    GRAD_NORM,
    INV_SCALE,
    SKIP,
    SKIPPED_STEPS,
    Group,
    Plan,
    Row,
    StepInputs,
)
from .watch import Snapshot

CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_


class ReferencePlan(Plan):
    """A plan that keeps the gradients as tensors."""

    def __init__(
        self,
        rule: str,
        rows: Sequence[Row],
        layout: object,
        groups: list[Group],
        state: dict[Tensor, Any],
    ) -> None:
        super().__init__(rule, rows, layout)
        self.grads: list[Tensor | None] = [None] * len(self.rows)
        # What reduce leaves for finalize: a norm (fp64) and a flag a row.
        self.norms = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.finite = torch.zeros(0, dtype=torch.bool, device="cpu")
        self.grad_mult = torch.zeros((), dtype=torch.float64, device="cpu")
        self._snapshot = Snapshot(groups, state, [row.served for row in self.rows])

    def _look(self, groups: list[Group], state: dict[Tensor, Any]) -> Sequence[int] | None:
        if not self._snapshot.is_current(groups, state):
            return None
        self.grads = [None] * len(self.rows)
        odd = [i for i, row in enumerate(self.rows) if row.param.grad is not None]
        rows = [self.rows[i] for i in odd]
        return odd if all(row.served and not row.awaits_state for row in rows) else None

    def _dense_grad(self, index: int, grad: Tensor) -> Tensor:
        return grad  # torch's operations take any layout

    def _set_grad(self, index: int, grad: Tensor) -> None:
        self.grads[index] = grad.detach()

    def active(self) -> list[tuple[Row, Tensor]]:
        return [(r, g) for r, g in zip(self.rows, self.grads, strict=True) if g is not None]

    def updated_params(self) -> list[Tensor]:
        return [row.param for row, _ in self.active()]

    def nbytes(self) -> int:
        return self.norms.numel() * self.norms.element_size() + self.staging_nbytes()


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def vector_norm(x: Tensor, norm_type: float) -> Tensor:
    """fp64 norm of ``x`` that neither over- nor underflows for finite ``x``."""
    x = x.double()
    if x.numel() == 0:
        return x.new_zeros(())
    largest = x.abs().max()
    if norm_type == math.inf:
        return largest
    usable = (largest > 0) & largest.isfinite()
    scale = torch.where(usable, largest, torch.ones_like(largest))
    return scale * (x / scale).square().sum().sqrt()


def geometric_sum(base: float, count: int) -> float:
    """Sum of ``base**i`` for ``0 <= i < count``, as in csrc/rules.h."""
    total, power = 0.0, 1.0
    for bit in f"{count:b}":
        total, power = total * (1.0 + power), power * power
        if bit == "1":
            total, power = 1.0 + base * total, power * base
    return total


def round_to(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype).item()


def _decayed(p: Tensor, grad: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    weight_decay = float(group["weight_decay"])
    if weight_decay == 0.0:
        return p, grad
    if group["decoupled_weight_decay"]:
        return p - (float(group["lr"]) * weight_decay) * p, grad
    return p, grad + weight_decay * p


def adamw(p: Tensor, grad: Tensor, row: Row, group: Group, step: int) -> Tensor:
    """Twin of ``AdamW::update`` in csrc/rules.h."""
    exp_avg, exp_avg_sq = row.states[:2]
    weight1 = round_to(1.0 - float(group["betas"][0]), p.dtype)
    weight2 = round_to(1.0 - float(group["betas"][1]), p.dtype)
    beta2 = round_to(float(group["betas"][1]), p.dtype)
    p, grad = _decayed(p, grad, group)
    exp_avg.lerp_(grad, weight1)
    exp_avg_sq.mul_(beta2).add_(weight2 * grad * grad)
    second_moment = exp_avg_sq
    if group["amsgrad"]:
        second_moment = torch.maximum(row.states[2], exp_avg_sq, out=row.states[2])
    step_size = float(group["lr"]) / (weight1 * geometric_sum(1.0 - weight1, step))
    bias_correction2 = weight2 * geometric_sum(beta2, step)
    denom = second_moment.sqrt() / math.sqrt(bias_correction2) + float(group["eps"])
    return p - step_size * exp_avg / denom


def sgd(p: Tensor, grad: Tensor, row: Row, group: Group, step: int) -> Tensor:
    """Twin of ``SGD::update`` in csrc/rules.h."""
    p, grad = _decayed(p, grad, group)
    momentum = float(group["momentum"])
    if momentum != 0.0:
        (buffer,) = row.states
        if step <= 1:
            buffer.copy_(grad)
        else:
            buffer.mul_(momentum).add_((1.0 - float(group["dampening"])) * grad)
        grad = grad + momentum * buffer if group["nesterov"] else buffer
    return p - float(group["lr"]) * grad


RULES: dict[str, Callable[[Tensor, Tensor, Row, Group, int], Tensor]] = {"adamw": adamw, "sgd": sgd}


class ReferenceBackend:
    """Plain torch operations, for any device and floating-point dtype."""

    name = "reference"

    def plan(
        self,
        rule: str,
        rows: Sequence[Row],
        layout: object,
        groups: list[Group],
        state: dict[Tensor, Any],
    ) -> Plan:
        return ReferencePlan(rule, rows, layout, groups, state)

    @torch.no_grad()
    def reduce(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, ReferencePlan)
        device = step.scalars.device
        inv_scale = _inverse_scale(step)
        norms, finite = [], []
        for row, grad in plan.active():
            x = grad.to(opmath(row.param.dtype)) * inv_scale.to(grad.device)
            norms.append(vector_norm(x, step.norm_type).to(device))
            finite.append(x.isfinite().all().to(device))
        none = torch.zeros(0, dtype=torch.float64, device=device)
        plan.norms = torch.stack(norms) if norms else none
        plan.finite = torch.stack(finite) if finite else none.bool()

    @torch.no_grad()
    def finalize(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, ReferencePlan)
        scalars = step.scalars
        clip_coef = torch.ones((), dtype=torch.float64, device=scalars.device)
        bad = torch.zeros((), dtype=torch.bool, device=scalars.device)
        norm = clip_coef * math.nan
        if step.measured:
            norm = vector_norm(plan.norms, step.norm_type)
            bad = bad | ~plan.finite.all()
            if step.max_grad_norm is not None:
                clip_coef = (step.max_grad_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        if step.found_inf is not None:
            bad = bad | (step.found_inf.reshape(()) != 0)
        inv_scale = _inverse_scale(step)
        plan.grad_mult = clip_coef * inv_scale
        scalars[GRAD_NORM] = norm
        scalars[CLIP_COEF] = clip_coef
        scalars[GRAD_MULT] = plan.grad_mult
        scalars[INV_SCALE] = inv_scale
        scalars[FOUND_INF] = bad
        scalars[SKIP] = bad & step.skip_nonfinite
        scalars[SKIPPED_STEPS] += scalars[SKIP]
        if step.inf_flag is not None:
            step.inf_flag.copy_(scalars[FOUND_INF])
        if scalars[SKIP] == 0:
            for row, _ in plan.active():
                if row.step is not None:
                    row.step.add_(1)

    @torch.no_grad()
    def update(self, plan: Plan, step: StepInputs) -> None:
        assert isinstance(plan, ReferencePlan)
        if step.scalars[SKIP] != 0:
            return
        for row, grad in plan.active():
            self._update_row(plan, row, grad, step)

    def _update_row(self, plan: ReferencePlan, row: Row, grad: Tensor, step: StepInputs) -> None:
        group = step.groups[row.group]
        dtype = opmath(row.param.dtype)
        grad = grad.to(dtype) * plan.grad_mult.to(grad.device, dtype)
        if step.max_grad_value is not None:
            grad = grad.clamp(-step.max_grad_value, step.max_grad_value)
        if group["maximize"]:
            grad = -grad
        p = row.dense.to(dtype)
        if row.master is not None:
            unwritten = row.dense == row.master.to(row.dense.dtype)
            p = torch.where(unwritten, row.master, p)
        count = int(row.step.item()) if row.step is not None else 0
        p = RULES[plan.rule](p, grad, row, group, count)
        if row.master is not None:
            row.master.copy_(p)
        row.dense.copy_(p)


def _inverse_scale(step: StepInputs) -> Tensor:
    """1 / grad_scale as fp32, the reciprocal taken in fp64 as GradScaler does."""
    if step.grad_scale is None:
        return torch.ones((), dtype=torch.float32, device=step.scalars.device)
    return step.grad_scale.reshape(()).double().reciprocal().float()
