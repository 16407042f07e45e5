"""The optimizer's side of the GradScaler contract.

torch's scaler sets ``optimizer.grad_scale`` and ``optimizer.found_inf`` before ``step()`` and
deletes both after it. If ``step()`` raises they stay, and the next ``scaler.step`` would multiply
its scale into the stale one; so a failing step puts them back as they were before the scaler came.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .options import Options
from .plan import FOUND_INF, Plan, is_fsdp1_shard


@dataclass
class AmpInputs:
    grad_scale: Tensor | None
    found_inf: Tensor | None
    inf_flag: Tensor | None
    in_charge: bool  # a scaler decides about this step: non-finite gradients skip it


class AmpAttributes:
    """``grad_scale``, ``found_inf`` and ``_step_supports_amp_scaling`` of an optimizer."""

    _options: Options
    _scalars: Tensor
    _plan: Plan | None
    param_groups: list[dict[str, Any]]
    _optimizer_step_pre_hooks: Any

    def _amp_offer(self, grad_scale: Tensor, found_inf: Tensor) -> None:
        """What a scaler that knows this class sets; ``_amp_withdraw`` takes it back."""
        values = self._amp_values()
        self.__dict__["_amp_before"] = dict(values)
        self.__dict__["_amp_answered"] = False
        values.update(grad_scale=grad_scale, found_inf=found_inf)

    def _amp_withdraw(self) -> None:
        values = self._amp_values()
        values.pop("grad_scale", None)
        values.pop("found_inf", None)

    def _amp_values(self) -> dict[str, Any]:
        values: dict[str, Any] = self.__dict__.setdefault("_amp", {})
        return values

    @property
    def grad_scale(self) -> Any:
        """What gradients are to be divided by in the next step; usually set by a GradScaler.

        Tensor of one element, number or None. Raises AttributeError when nobody has set it.
        """
        try:
            return self._amp_values()["grad_scale"]
        except KeyError:
            raise AttributeError("grad_scale") from None

    @grad_scale.setter
    @_disable_dynamo  # which would lose what is noted here
    def grad_scale(self, value: Any) -> None:
        values = self._amp_values()
        self.__dict__["_amp_before"] = dict(values)
        values["grad_scale"] = value

    @grad_scale.deleter
    @_disable_dynamo
    def grad_scale(self) -> None:
        if "grad_scale" not in self._amp_values():
            raise AttributeError("grad_scale")
        del self._amp_values()["grad_scale"]

    @property
    def found_inf(self) -> Any:
        """0-dim fp32 tensor: 1 if the last step met an inf or NaN gradient element, else 0.

        Between a GradScaler's call and the update it is the flag that the scaler set, or 0 if it
        left the question to the step; step post-hooks see the answer.
        """
        values = self._amp_values()
        if "found_inf" in values and not self.__dict__.get("_amp_answered"):
            found_inf = values["found_inf"]
            asked = self.__dict__.get("_inf_flag_due") and found_inf is self.__dict__["_inf_flag"]
            return torch.zeros_like(found_inf) if asked else found_inf
        return self._scalars[FOUND_INF].clone()

    @found_inf.setter
    @_disable_dynamo  # which would lose what is noted here
    def found_inf(self, value: Any) -> None:
        self.__dict__["_amp_answered"] = False
        self._amp_values()["found_inf"] = value

    @found_inf.deleter
    @_disable_dynamo
    def found_inf(self) -> None:
        if "found_inf" not in self._amp_values():
            raise AttributeError("found_inf")
        del self._amp_values()["found_inf"]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler may leave unscaling, checking and skipping to ``step()``.

        False when the user said ``amp_scaling=False``; when a subclass overrides ``step`` (it may
        clip gradients there, which have to be unscaled by then); and for FSDP1 shards, where
        torch's protocol lets ranks disagree about a skip.
        """
        if self._options.amp_scaling is not None and not self._options.amp_scaling:
            return False
        own_step: Callable[..., Any] = type(self).step  # type: ignore[attr-defined]
        return _is_our_step(own_step) and not self._is_fsdp1_sharded()

    def _is_fsdp1_sharded(self) -> bool:
        if self._plan is not None:
            return self._plan.fsdp1_sharded
        return any(is_fsdp1_shard(p) for g in self.param_groups for p in g["params"])

    def _flag_device(self, otherwise: torch.device) -> torch.device:
        """Where the step will run, which is where its flag has to be."""
        for group in self.param_groups:
            for p in group["params"]:
                device: torch.device = p.device
                return device
        return otherwise

    def _expect_inf_flag(self, device: torch.device, clear: bool, scaler: object) -> Tensor:
        """An fp32 flag that the next step fills in for ``scaler``; see ``fusedopt.GradScaler``.

        The scaler accumulates into it in place, so it is never the value ``found_inf`` reports, and
        another scaler gets another one. Until the step it holds the last answer, unless ``clear``,
        or a hook that could look: on a GPU clearing is a launch of its own.
        """
        flags: dict[int, Tensor] = self.__dict__.setdefault("_inf_flags", {})
        flag = flags.get(id(scaler))  # of one that is gone, maybe: then nobody else has it
        if flag is None or flag.device != device:
            with torch.inference_mode(False):  # for a step outside of it, too
                flag = flags[id(scaler)] = torch.zeros((), dtype=torch.float32, device=device)
        elif clear or self._optimizer_step_pre_hooks or _global_optimizer_pre_hooks:
            flag.zero_()
        self.__dict__["_inf_flag"] = flag
        self.__dict__["_inf_flag_due"] = True
        return flag

    def _amp_inputs(self, device: torch.device) -> AmpInputs:
        values = self._amp_values()
        flag = self.__dict__["_inf_flag"] if self.__dict__.get("_inf_flag_due") else None
        found_inf = values.get("found_inf")
        return AmpInputs(
            grad_scale=_one_float(values.get("grad_scale"), "grad_scale", device),
            found_inf=None if found_inf is flag else _one_float(found_inf, "found_inf", device),
            inf_flag=flag,
            in_charge="found_inf" in values,
        )

    def _amp_decided(self) -> None:
        """The flag holds this step's answer."""
        self.__dict__.pop("_inf_flag_due", None)

    def _amp_undecided(self) -> None:
        """A flag in the scaler's books that nobody wrote says that nothing was found."""
        if self.__dict__.pop("_inf_flag_due", False):
            with suppress(RuntimeError):  # of a GPU past help, whose own error is on its way
                self.__dict__["_inf_flag"].zero_()

    def _amp_done(self) -> None:
        self.__dict__["_amp_answered"] = True

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper around ``step`` (profiler, hooks), entered only where there is either.

        An error in any of it restores the attributes.
        """
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(hooked)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            watched = (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch.autograd.profiler._is_profiler_enabled
            )
            try:
                return hooked(self, *args, **kwargs) if watched else func(self, *args, **kwargs)
            except BaseException:
                self._amp_restore()
                raise

        _HOOKED[step] = func
        # scaler.step() looks at the signature each time; found here it need not be worked out.
        step.__signature__ = inspect.signature(hooked)  # type: ignore[attr-defined]
        return step

    def _amp_restore(self) -> None:
        """After a failed step: the attributes as they were before the scaler set them."""
        if "found_inf" in self._amp_values():  # a scaler sets both, grad_scale first
            before = self.__dict__.get("_amp_before", {})
            self.__dict__["_amp"] = {k: v for k, v in before.items() if k != "found_inf"}
        self._amp_undecided()


# A step with hooks, and the step inside. `__wrapped__` would not do: a subclass's own step has one,
# too, if its author used functools.wraps.
_HOOKED: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any]] = (
    weakref.WeakKeyDictionary()
)


@functools.lru_cache(maxsize=64)
def _is_our_step(step: Callable[..., Any]) -> bool:
    """Whether ``step``, with hooks or without, is FusedOptimizer's and not a subclass's own."""
    from .optimizer import FusedOptimizer

    while step in _HOOKED:
        step = _HOOKED[step]
    return step is FusedOptimizer._own_step


def _one_float(value: Any, name: str, device: torch.device) -> Tensor | None:
    """``value`` as an fp32 tensor of one element on ``device``; no copy when it is one already."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float32, device=device)
    if value.numel() != 1:
        raise RuntimeError(
            f"optimizer.{name} has shape {tuple(value.shape)}; it must be a number or a tensor of "
            "one element"
        )
    if value.dtype == torch.float32 and value.device == device and not value.is_neg():
        return value
    return value.detach().resolve_neg().to(device=device, dtype=torch.float32)
