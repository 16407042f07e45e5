"""The data that an optimizer shares with wrappers and copies that take over its ``__dict__``.

Lightning, Fabric and others make an object of a derived class and give it the optimizer's
attributes. If one of the two rebinds an attribute, the other keeps the old value. So everything of
ours that changes in the life of an optimizer is in one object to which both refer.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .modes import untraced
from .options import NOT_PICKLED, Options
from .plan.checks import served_params
from .plan.exchange import REPLICATED, Ranks, Refusal, ranks_of, same_objects
from .plan.kept import check_masters, check_precision
from .plan.local import is_dtensor, local_of
from .plan.options_table import Line
from .plan.plan import CLIP_COEF, GRAD_NORM, SKIPPED_STEPS, Plan
from .plan.state import for_other_ranks
from .rules.declaration import Group, Rule
from .scaler.exchange import ScalerExchange

PLANS_ASIDE = 8
OF_PRECISION = ("state_dtype", "master_weights", "min_8bit_size")


@dataclass
class Shared:
    options: Options
    scalars: Tensor  # StepScalars (csrc/records.h)
    line: Line
    turn: Any = field(default_factory=threading.RLock)  # held by the thread that steps
    measured: bool = False  # the last step computed the norm
    begun: bool = False  # the step, after its pre-hooks
    made_by_zero: bool = False  # by a ZeroRedundancyOptimizer, for one rank's share
    plan: Plan | None = None
    # That share a norm with this process.
    ranks: Ranks | Refusal | None = None
    replicated: list[Any] = field(default_factory=list)  # the groups' keys that were asked for it
    told: Tensor | None = None  # see Plan.told
    # Names of parameters in messages, once a checkpoint has replaced the names in the groups.
    names: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    captured_plans: list[Plan] = field(default_factory=list)  # a CUDA graph may still replay them
    aside: list[Plan] = field(default_factory=list)  # see set_aside
    amp: ScalerExchange = field(default_factory=ScalerExchange)

    def drop_plans(self) -> None:
        plans = (self.plan, *self.aside)
        self.captured_plans += [plan for plan in plans if plan is not None and plan.captured]
        self.plan, self.aside = None, []

    def set_aside(self, state: dict[Tensor, Any]) -> None:
        """Drop the plan, or keep it for later if it keeps no memory alive that would be freed.

        DeepSpeed's ZeRO steps one param group at a time: during each call ``param_groups`` has one
        group only, and each group has its own plan.
        """
        plans = [plan for plan in (self.plan, *self.aside) if plan is not None]
        self.drop_plans()
        kept = [plan for plan in plans if not plan.captured and plan.holds_only(state)]
        self.aside = kept[:PLANS_ASIDE]

    def take_up(self, plan: Plan) -> None:
        self.plan, self.ranks = plan, plan.ranks
        if isinstance(plan.ranks, Ranks):
            plan.ranks.joined = False
        self.aside = [each for each in self.aside if each is not plan]


def _option(name: str) -> property:
    def read(self: SharingOptimizer) -> Any:
        return getattr(self._shared.options, name)

    @untraced  # a trace would lose the new value
    def write(self: SharingOptimizer, value: Any) -> None:
        options = self._shared.options.changed(**{name: value})
        if name in OF_PRECISION:
            names = self._shared.line.state_names
            check_masters(self.param_groups, options)
            for group in self.param_groups:
                check_precision(self.rule, names, options, group)
        if name in (*OF_PRECISION, "norm_group"):
            self._shared.drop_plans()
        self._shared.options = options

    return property(read, write, doc=f"The option ``{name}``; assignment validates.")


class SharingOptimizer(Optimizer):
    """An optimizer between two steps: what users read and set, and how it is pickled."""

    rule: Rule
    _shared: Shared

    def _check_loaded_groups(self, groups: list[Group]) -> None:
        """Warn if the groups of a checkpoint that is about to be loaded change the computation."""

    # ---- what the last step found ---------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all unscaled gradients of the last step, before clipping: 0-dim fp32, a copy.

        None before the first step, and when the last step had no reason to measure it (no
        ``max_grad_norm``, no ``skip_nonfinite``, no ``fusedopt.GradScaler``);
        ``max_grad_norm=float("inf")`` measures without clipping. No host sync.
        """
        shared = self._shared
        return shared.scalars[GRAD_NORM].clone() if shared.measured else None

    @property
    def clip_coef(self) -> Tensor:
        """The factor that the last step applied to the unscaled gradients: 0-dim fp32, a copy."""
        coef = self._shared.scalars[CLIP_COEF]
        return coef.clone() if self._shared.measured else torch.ones_like(coef)

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped because of non-finite gradients: 0-dim int64, a copy. Not checkpointed."""
        return self._shared.scalars[SKIPPED_STEPS].to(torch.int64)

    def _ranks(self) -> Ranks | Refusal | None:
        """The ranks that share a norm with this process, or why they cannot."""
        shared = self._shared
        with suppress(AttributeError, KeyError, TypeError):  # no param groups: the step says so
            keys = [group.get(REPLICATED) for group in self.param_groups]
            stale = isinstance(shared.ranks, Refusal) or not same_objects(keys, shared.replicated)
            if shared.ranks is not None and stale:
                shared.drop_plans()
            if shared.plan is None:
                shared.ranks = ranks_of(self.param_groups, shared.options, shared.names)
                shared.replicated = keys
        return shared.ranks

    @property
    def backend(self) -> dict[str, str]:
        """Name of the backend that serves each device; empty before the first step."""
        plan = self._shared.plan
        if plan is None:
            return {}
        devices = {str(p.device) for p in served_params(self.param_groups)}
        return dict.fromkeys(sorted(devices), plan.backend)

    @untraced
    def memory_footprint(self) -> dict[str, int]:
        """Bytes by kind: ``param``, ``grad``, each state by its name, ``plan`` and ``total``.

        Counts the tensors that are there now: before the first step, or ``init_state()``, there is
        no state yet. Of a DTensor it counts this rank's part. An entry of ``state``
        that belongs to no parameter is listed under its key.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        sizes = {"param": sum(map(_nbytes, params)), "grad": sum(_nbytes(p.grad) for p in params)}
        for key, own in self.state.copy().items():
            for name, value in own.copy().items() if isinstance(own, dict) else [(str(key), own)]:
                if isinstance(value, Tensor):
                    sizes[name] = sizes.get(name, 0) + _nbytes(value)
        sizes["plan"] = 0 if self._shared.plan is None else self._shared.plan.nbytes()
        sizes["total"] = sum(sizes.values())
        return sizes

    # ---- options of the whole optimizer ---------------------------------------------------------

    max_grad_norm = _option("max_grad_norm")
    norm_type = _option("norm_type")
    max_grad_value = _option("max_grad_value")
    master_weights = _option("master_weights")
    skip_nonfinite = _option("skip_nonfinite")
    amp_scaling = _option("amp_scaling")
    norm_group = _option("norm_group")
    norm_bits = _option("norm_bits")
    state_dtype = _option("state_dtype")
    min_8bit_size = _option("min_8bit_size")

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with states in the order of the parameters.

        A state is made when its parameter first has a gradient, which may be in another order on
        another rank. Ranks that gather a checkpoint would meet at different tensors.

        The state of a DTensor is saved so that other ranks can take any part of it: 8-bit states
        with the scale of each element, and 16-bit remainders as int32.
        """
        saved: dict[str, Any] = super().state_dict()
        if "state" not in saved or "param_groups" not in saved:  # a hook has returned another
            return saved
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        state = saved["state"]
        in_order = {key: state[key] for key in keys if key in state}
        params = [p for group in self.param_groups for p in group["params"]]
        if len(params) == len(keys):
            for key, param in zip(keys, params, strict=True):
                if key in in_order and is_dtensor(param) and isinstance(in_order[key], dict):
                    in_order[key] = for_other_ranks(in_order[key], param)
        saved["state"] = {**in_order, **{k: v for k, v in state.items() if k not in in_order}}
        return saved

    # ---- pickles and copies ----------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        shared, names = self._shared, self._shared.names
        options = shared.options
        if options.norm_group is not None:  # a group of processes is of this process
            options = options.changed(norm_group=NOT_PICKLED)
        params = [p for group in self.param_groups for p in group["params"]]
        return {
            **super().__getstate__(),
            "_options": options,
            "_scalars": shared.scalars,
            "_measured": shared.measured,
            "_made_by_zero": shared.made_by_zero,
            "_names": [(p, names[p]) for p in params if p in names],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_options" in state:  # unpickled; load_state_dict comes here, too
            self._shared = Shared(
                state.pop("_options"),
                state.pop("_scalars"),
                Line(self.rule),
                measured=state.pop("_measured"),
                made_by_zero=state.pop("_made_by_zero", False),
            )
            self._shared.names.update(state.pop("_names", ()))
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._shared.drop_plans()


def _nbytes(tensor: Tensor | None) -> int:
    if tensor is None or is_lazy(tensor):
        return 0
    local = local_of(tensor)
    return local.numel() * local.element_size()
