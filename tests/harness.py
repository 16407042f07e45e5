"""One optimizer under test, the oracle and torch.optim, fed with the same params and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import OptimizerCase
from models.reference import HALF, Grads, Group, Oracle, TorchStep
from tolerances import (
    NORM_EPS_FLOAT32,
    Compared,
    assert_norm,
    assert_relative,
    assert_same_bits,
    assert_within_policy,
)
from torch import Tensor

import fusedopt

OPTIMIZERS = [getattr(fusedopt, name) for name in fusedopt.__all__ if name.startswith("Fused")]
FUSED = {cls.rule.name: cls for cls in OPTIMIZERS if hasattr(cls, "rule")}
Snapshot = list[dict[str, Tensor]]


def randn(
    shape: int | tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Normal values, reproducible and none of them near zero compared with `scale`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else shape
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((values + 0.01 * values.sign()) * scale).to(dtype)


def make_param(values: Tensor) -> torch.nn.Parameter:
    """A parameter on the memory of `values`, whatever its layout, that takes grads of any dtype."""
    param = torch.nn.Parameter(values)
    if hasattr(param, "grad_dtype"):
        param.grad_dtype = None
    return param


def set_grad(param: Tensor, grad: Tensor | None) -> None:
    if grad is not None and grad.dtype != param.dtype and not hasattr(param, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype: a gradient has the dtype of its param")
    param.grad = grad


@contextmanager
def scaler_attributes(
    optimizer: torch.optim.Optimizer, grad_scale: float | None, found_inf: float | None
) -> Iterator[None]:
    """What torch's GradScaler leaves on the optimizer for the time of one step."""
    values = {"grad_scale": grad_scale, "found_inf": found_inf}
    given = {name: torch.tensor(float(v)) for name, v in values.items() if v is not None}
    for name, value in given.items():
        setattr(optimizer, name, value)
    try:
        yield
    finally:
        for name in given:
            delattr(optimizer, name)


def check_together(trios: list[Trio]) -> None:
    """`Trio.check` with the errors of several runs of the same kind in one pool."""
    pools: dict[tuple[str, torch.dtype], list[Compared]] = {}
    for trio in trios:
        for index in range(len(trio.params)):
            trio.check_keys(index)
            for key, entry in trio.compared(index):
                pools.setdefault(key, []).append(entry)
    for (kind, dtype), compared in pools.items():
        assert_within_policy(kind, dtype, compared)
    for trio in trios:
        trio.agree_on_half_params()


class Trio:
    def __init__(
        self, rule: str, groups: list[Group], backend: str | None = None, **common: Any
    ) -> None:
        self.rule, self.common, self.backend = rule, common, backend
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.opt = FUSED[rule](groups, backend=backend, **common)
        own = [{**group, "params": [p.detach() for p in group["params"]]} for group in groups]
        self.oracle = Oracle(rule, own, **common)
        self.torch = TorchStep(rule, own, **common)

    @classmethod
    def of(
        cls, case: OptimizerCase, params: list[Tensor], backend: str | None, **common: Any
    ) -> Trio:
        return cls(case.rule, [{"params": params, **case.hyper}], backend, **case.common, **common)

    def set(self, group: int = 0, **hyper: Any) -> None:
        """Change hyper-parameters in all three, as a scheduler does."""
        for groups in (self.opt.param_groups, self.oracle.groups, self.torch.groups):
            groups[group].update(hyper)

    def add_param_group(self, group: Group) -> None:
        self.params += group["params"]
        own = {**group, "params": [p.detach() for p in group["params"]]}
        self.opt.add_param_group(group)
        self.oracle.add_param_group(own)
        self.torch.add_param_group(own)

    @contextmanager
    def writing(self, index: int) -> Iterator[Tensor]:
        """The user edits param `index` in place; the other two learn which elements and values."""
        param = self.params[index]
        before = param.detach().clone()
        yield param
        now = param.detach()
        written = now != before
        oracle, in_torch = self.oracle.slots[index], self.torch
        oracle.write(torch.where(written, now.double(), oracle.stored))
        in_torch.write(index, torch.where(written, now, in_torch.stored[index]))

    def reload(self) -> None:
        """Continue in a new optimizer over copies of the params, from the state dict."""
        copies = {id(p): make_param(p.detach().clone()) for p in self.params}
        for old, new in zip(self.params, copies.values(), strict=True):
            new.requires_grad_(old.requires_grad)
        groups = [
            {"params": [copies[id(p)] for p in group["params"]]} for group in self.opt.param_groups
        ]
        loaded = FUSED[self.rule](groups, backend=self.backend, **self.common)
        loaded.load_state_dict(self.opt.state_dict())
        self.opt, self.params = loaded, list(copies.values())

    def step(
        self, grads: Grads, grad_scale: float | None = None, found_inf: float | None = None
    ) -> None:
        before = [None if g is None else g.clone() for g in grads]
        for param, grad in zip(self.params, grads, strict=True):
            set_grad(param, grad)
        skipped_before = self.opt.skipped_steps.item() - self.oracle.skipped_steps
        with scaler_attributes(self.opt, grad_scale, found_inf):
            self.opt.step()
        clip_coef = None if self.oracle.max_grad_norm is None else self.opt.clip_coef.item()
        self.oracle.step(grads, grad_scale, found_inf, clip_coef)
        self.torch.step(grads, grad_scale, found_inf, clip_coef)
        for index, (param, grad) in enumerate(zip(self.params, before, strict=True)):
            assert (param.grad is None) == (grad is None), f"grad {index} came or went"
            if grad is not None:
                assert_same_bits(param.grad, grad, f"grad {index} was written to")
        skipped = self.opt.skipped_steps.item() - self.oracle.skipped_steps
        assert skipped == skipped_before, "skipped_steps"
        self.check_scalars(has_scaler=grad_scale is not None or found_inf is not None)

    def check_scalars(self, has_scaler: bool) -> None:
        clips = self.oracle.max_grad_norm is not None
        if clips:
            assert_norm(self.opt.grad_norm, self.oracle.grad_norm)
            rtol = NORM_EPS_FLOAT32 + 3 * 2.0**-24  # the addition, the division, the rounding
            assert_relative(
                self.opt.clip_coef.item(), self.oracle.clip_coef.item(), rtol, "clip_coef"
            )
        elif self.opt.grad_norm is not None:
            assert self.opt.skip_nonfinite or has_scaler, "nobody asked for a norm"
            assert_norm(self.opt.grad_norm, self.oracle.grad_norm)
        if clips or self.opt.skip_nonfinite or has_scaler:
            assert self.opt.found_inf.item() == self.oracle.found_inf, "found_inf"

    def check(self) -> None:
        """Every element of every param and state, and what must hold to the bit."""
        check_together([self])

    def agree_on_half_params(self) -> None:
        """Without masters, a value next to a tie may be rounded either way, and the next gradient
        depends on it. From here on all three hold what fusedopt holds."""
        for index, slot in enumerate(self.oracle.slots):
            if slot.rounds_every_step:
                with torch.no_grad():
                    slot.stored = slot.master = self.params[index].detach().double()
                    self.torch.stored[index] = self.params[index].detach().clone()
                    self.torch.params[index].copy_(self.params[index])

    def check_keys(self, index: int) -> None:
        param, slot = self.params[index], self.oracle.slots[index]
        state = dict(self.opt.state.get(param, {}))
        step = state.pop("step", None)
        assert (0 if step is None else step.item()) == slot.step, f"step of param {index}"
        master = state.pop("master_param", None)
        if master is not None:
            assert param.dtype in HALF and self.oracle.has_masters, f"param {index} has a master"
            # What was written since the last step is read at the next.
            settled = slot.stored == slot.master.to(param.dtype).double()
            rounded = master.to(param.dtype)[settled]
            assert_same_bits(param[settled], rounded, f"param {index} is not round(master)")
        if slot.step > 0:
            assert set(state) == set(slot.state), f"state of param {index}"
            assert (master is not None) == (param.dtype in HALF and self.oracle.has_masters)
        else:
            assert not any(bool(value.any()) for value in state.values()), f"state {index} moved"

    def compared(self, index: int) -> Iterator[tuple[tuple[str, torch.dtype], Compared]]:
        param, slot = self.params[index], self.oracle.slots[index]
        state = self.opt.state.get(param, {})
        state_dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        torchs, torch_state = self.torch.params[index], self.torch.state(index)
        label = f"param {index} {tuple(param.shape)} {param.dtype}"
        values = {"param": (param.dtype, param, self.torch.stored[index], slot.stored)}
        if param.dtype not in HALF:
            values["param"] = (param.dtype, param, torchs, slot.master)
        if "master_param" in state:
            values["master_param"] = (torch.float32, state["master_param"], torchs, slot.master)
        for kind, expected in slot.state.items():
            values[kind] = (state_dtype, state[kind], torch_state[kind], expected)
        for kind, (dtype, ours, torch_value, expected) in values.items():
            scale = slot.scale["param" if kind == "master_param" else kind]
            yield (kind, dtype), Compared(label, ours, torch_value, expected, scale)

    def snapshot(self) -> Snapshot:
        """Copies of everything a skipped step must leave alone."""
        return [
            {"param": p.detach().clone(), **{k: v.clone() for k, v in self.opt.state[p].items()}}
            if p in self.opt.state
            else {"param": p.detach().clone()}
            for p in self.params
        ]

    def assert_unmoved(self, before: Snapshot) -> None:
        for index, (old, new) in enumerate(zip(before, self.snapshot(), strict=True)):
            for kind, value in new.items():
                label = f"{kind} of param {index}"
                if kind in old:
                    assert_same_bits(value, old[kind], label)
                elif kind == "master_param":
                    assert_same_bits(value, old["param"].float(), label)
                else:
                    assert not bool(value.any()), f"{label} was born moved"
