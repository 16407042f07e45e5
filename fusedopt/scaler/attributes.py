"""The optimizer's side of the GradScaler contract.

torch's scaler sets ``optimizer.grad_scale`` and ``optimizer.found_inf`` before ``step()`` and
deletes both after it. If ``step()`` raises, they stay, and the next ``scaler.step`` would multiply
its scale into the stale one. So a failing step restores the values from before the scaler's call.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..callers import users_level
from ..modes import is_recorded, untraced
from ..options import is_number
from ..plan.checks import served_params
from ..plan.exchange import Ranks, Refusal
from ..plan.plan import FOUND_INF
from ..plan.shards import has_fsdp1_shards
from ..shared import SharingOptimizer
from .torchs import asks_all_ranks, scaler_in_step

F = TypeVar("F", bound=Callable[..., Any])


class AmpAttributes(SharingOptimizer):
    """``grad_scale``, ``found_inf`` and ``_step_supports_amp_scaling`` of an optimizer."""

    @property
    def grad_scale(self) -> Any:
        """The divisor of the gradients in the next step; usually set by a GradScaler.

        Tensor of one element, number or None. Raises AttributeError when nobody has set it.
        """
        try:
            return self._shared.amp.values["grad_scale"]
        except KeyError:
            raise AttributeError("grad_scale") from None

    @grad_scale.setter
    @untraced  # a trace would lose what is noted here
    def grad_scale(self, value: Any) -> None:
        amp = self._shared.amp
        amp.before = dict(amp.values)
        amp.values["grad_scale"] = value

    @grad_scale.deleter
    @untraced
    def grad_scale(self) -> None:
        self._unset("grad_scale")

    @property
    def found_inf(self) -> Any:
        """0-dim fp32 tensor: 1 if the last step met an inf or NaN gradient element, else 0.

        Between a GradScaler's call and the update it is the flag that the scaler set, or 0 if the
        step itself is to check. Step post-hooks see the step's answer.
        """
        amp = self._shared.amp
        if "found_inf" in amp.values and not amp.answered:
            found_inf = amp.values["found_inf"]
            asked = amp.due is not None and found_inf is amp.due
            return torch.zeros_like(found_inf) if asked else found_inf
        return self._shared.scalars[FOUND_INF].clone()

    @found_inf.setter
    @untraced  # a trace would lose what is noted here
    def found_inf(self, value: Any) -> None:
        self._shared.amp.answered = False
        self._shared.amp.values["found_inf"] = value

    @found_inf.deleter
    @untraced
    def found_inf(self) -> None:
        self._unset("found_inf")

    def _unset(self, name: str) -> None:
        if name not in self._shared.amp.values:
            raise AttributeError(name)
        del self._shared.amp.values[name]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's GradScaler leaves unscaling, checking and skipping to ``step()``.

        torch's scaler, and every framework that reads this, then treats the gradients as scaled
        until the step is over. So the answer is False, and we are a stock optimizer to them, unless
        ``amp_scaling=True`` asks for it, some parameter is fp16, whose gradients ``unscale_``
        refuses, or ranks share a norm. ``fusedopt.GradScaler`` asks ``_takes_scaled_gradients``
        instead.
        """
        if self._is_fsdp1_sharded():
            return False
        if self._must_agree():
            return not asks_all_ranks(scaler_in_step())
        wanted = self._shared.options.amp_scaling
        if wanted is False:
            return False
        if self._takes_scaled_gradients():
            return wanted is True or self._has_fp16() or self._ranks() is not None
        return self._hooks_know_scales()

    def _must_agree(self) -> bool:
        """Whether ranks share a norm, and flags of torch's scaler may differ between them.

        A scaler that skips on one rank alone would leave the others waiting for its message. So
        the step is called on all ranks, and decides, whatever hooks and options there are.
        """
        ranks = self._ranks()
        return isinstance(ranks, Refusal) or (ranks is not None and ranks.is_mixed)

    def _hooks_know_scales(self) -> bool:
        """Whether a hook, or another step, that sees the gradients may find them scaled.

        With ``amp_scaling=True`` the user says so. We rely on that only for fp16, which torch
        refuses to unscale.
        """
        wanted = self._shared.options.amp_scaling is True and self._has_fp16()
        return wanted and not self._is_fsdp1_sharded()

    def _refuse_scaled_for_hooks(self) -> None:
        """torch's scaler cannot unscale for them where the step has to be called."""
        values = self._shared.amp.values
        if "found_inf" not in values or values.get("grad_scale") is None or not self._must_agree():
            return
        if not (self._takes_scaled_gradients() or self._hooks_know_scales()):
            raise RuntimeError(
                "a hook, or a step that is not fusedopt's own, would see scaled gradients: torch's "
                "GradScaler does not unscale them where ranks have to agree about a skip; unscale "
                "before the step: `scaler.unscale_(optimizer)`, or use ours, which does: "
                "`fusedopt.fuse_scaler(scaler)`"
            )

    def _warn_of_scale(self, ranks: Ranks) -> None:
        """Once, if the scaler that calls this step does not know other ranks' inf and NaN."""
        amp = self._shared.amp
        if amp.warned or not ranks.is_mixed or amp.due is not None or "found_inf" not in amp.values:
            return
        scaler = scaler_in_step()
        if scaler is None or asks_all_ranks(scaler):
            return
        amp.warned = True
        warnings.warn(
            f"{type(scaler).__name__} sees the inf and NaN of this rank's gradients, or of one "
            "mesh: all ranks skip a step together, but afterwards their scales may differ; use "
            "one that learns what the ranks have agreed on: `fusedopt.fuse_scaler(scaler)`",
            stacklevel=users_level(),
        )

    def _takes_scaled_gradients(self) -> bool:
        """Whether nothing but our own step sees the gradients between a scaler and the update.

        A pre-hook or another ``step`` (of a subclass, or set on the instance) may clip or read
        them, and has to find them unscaled. With FSDP1 shards ranks could disagree about a skip.
        """
        return (
            not (self._optimizer_step_pre_hooks or _global_optimizer_pre_hooks)
            and _runs_our_step(self)
            and not self._is_fsdp1_sharded()
        )

    def _has_fp16(self) -> bool:
        return any(p.dtype == torch.float16 for p in served_params(self.param_groups))

    def _is_fsdp1_sharded(self) -> bool:
        """Whether there are shards of FSDP1, and nobody has said which ranks share them."""
        if self._shared.options.norm_group is not None:
            return False
        plan = self._shared.plan
        if plan is not None and not plan.fsdp1_sharded:
            return False
        return has_fsdp1_shards(self.param_groups)

    def _flag_device(self, otherwise: torch.device) -> torch.device:
        """The device where the step will run; its flag has to be there."""
        plan = self._shared.plan
        if plan is not None and plan.first is not None:
            return plan.first.param.device
        return next((p.device for p in served_params(self.param_groups)), otherwise)

    def _amp_inputs(
        self, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
        """``grad_scale``, ``found_inf`` and ``inf_flag`` of ``StepInputs``; and whether a scaler
        decides about this step, so that non-finite gradients skip it."""
        values, due = self._shared.amp.values, self._shared.amp.due
        if not values:
            return None, None, due, False
        found_inf = values.get("found_inf")
        return (
            _one_float(values.get("grad_scale"), "grad_scale", device),
            None if found_inf is due else _one_float(found_inf, "found_inf", device),
            due,
            "found_inf" in values,
        )

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper around ``step``, entered only if there is a profiler or a hook.

        An error in the step or a hook restores the attributes. Ranks whose hooks have not failed
        wait for the step's message, so a rank whose hook has failed joins it. It does not where a
        closure or a step of the user's own fails: those run the model, whose ranks may be in the
        middle of another message.
        """
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(hooked)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            watched = (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or is_recorded()
            )
            self._shared.begun = False
            try:
                if self._shared.amp.values and self._shared.amp.due is None:  # torch's scaler
                    self._refuse_scaled_for_hooks()
                return hooked(self, *args, **kwargs) if watched else func(self, *args, **kwargs)
            except BaseException:
                if func in _OURS and not self._shared.begun:
                    self._abort_unbegun()
                self._shared.amp.restore()
                raise

        if func in _OURS:
            _OURS.add(step)
        # scaler.step() inspects the signature each time; stored here, it is not computed again.
        step.__signature__ = inspect.signature(hooked)  # type: ignore[attr-defined]
        return step


# The step of this package, without hooks and with them. An attribute of the function would not do:
# functools.wraps copies it to the step of a subclass.
_OURS: set[Callable[..., Any]] = set()


def ours(step: F) -> F:
    """Note that ``step`` knows scaled gradients."""
    _OURS.add(step)
    return step


def _runs_our_step(optimizer: Any) -> bool:
    """Whether ``optimizer.step`` is FusedOptimizer's, and only that."""
    step = optimizer.__dict__.get("step")
    if step is None:
        return type(optimizer).step in _OURS
    if isinstance(step, MethodType):  # a saved method that was put back
        return step.__self__ is optimizer and step.__func__ in _OURS
    # A scheduler sets a wrapper on the instance, which counts the calls of the step. We recognise
    # it by its module's globals: functools.wraps copies names and attributes, but not globals.
    if getattr(step, "__globals__", None) is vars(lr_scheduler):
        cells = dict(zip(step.__code__.co_freevars, step.__closure__ or (), strict=True))
        return "func" in cells and cells["func"].cell_contents in _OURS
    return False


def _one_float(value: Any, name: str, device: torch.device) -> Tensor | None:
    """``value`` as an fp32 tensor of one element on ``device``; no copy when it is one already."""
    if value is None:
        return None
    if (
        isinstance(value, Tensor)
        and value.dtype == torch.float32
        and value.device == device
        and value.numel() == 1
        and not value.is_neg()
    ):
        return value
    if not is_number(value, nan=True):
        raise RuntimeError(
            f"optimizer.{name} is {value!r}; it must be a number or a tensor of one element, or "
            f"None: `optimizer.{name} = None`"
        )
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float32, device=device)
    return value.detach().resolve_neg().to(device=device, dtype=torch.float32)
