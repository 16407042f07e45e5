"""A GradScaler that leaves the inf/NaN check to the optimizer's own pass over the gradients.

torch's scaler reads and writes every gradient once more before it calls an optimizer that handles
scaling by itself: 8 bytes per fp32 parameter. Nothing else depends on torch's private
``_check_inf_per_device`` and ``_per_optimizer_states``; ``tests/scaler/test_fused_scaler.py``
pins them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler as TorchGradScaler, OptState
from torch.optim import Optimizer

from ..modes import durable, untraced
from ..optimizer import FusedOptimizer
from ..plan.checks import served_params
from ..plan.local import is_dtensor, local_of


class GradScaler(TorchGradScaler):
    """:class:`torch.amp.GradScaler` without the extra sweep over the gradients.

    Same arguments, same scale after every step, same ``state_dict``. For the optimizers of this
    package ``step()`` reads and writes no gradient: the optimizer checks them in the pass that
    computes the norm and writes the flag that ``update()`` reads. So where ranks share a norm, they
    have the same flag and scale. All other optimizers, and calls of ``unscale_``, are treated as
    torch treats them.
    """

    @untraced  # a trace would lose what is noted in the optimizer
    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """As torch's; our optimizers only get the scale and the flag."""
        if not isinstance(optimizer, FusedOptimizer) or not self._may_ask(optimizer) or kwargs:
            return super().step(optimizer, *args, **kwargs)
        own, amp = self._per_optimizer_states[id(optimizer)], optimizer._shared.amp
        if own["stage"] is OptState.READY and not self._may_pass_scaled(optimizer):
            self.unscale_(optimizer)
        preset = amp.values.get("grad_scale")
        if own["stage"] is OptState.READY:
            assert self._scale is not None  # or _may_ask had said no
            found_inf = self._record_flag(optimizer, clear=False)
            scale = self._scale if preset is None else self._scale * preset
        else:  # unscale_() has checked already
            device, found = optimizer._flag_device(torch.device("cpu")), own["found_inf_per_device"]
            found_inf = sum(flag.to(device, non_blocking=True) for flag in found.values())
            scale = preset
            if optimizer._ranks() is not None:  # they vote, and update() has to read the outcome
                self._record_flag(optimizer, clear=False)
        try:
            amp.offer(scale, found_inf)
            result = optimizer.step(*args)
        except BaseException:  # a step in place of ours restores nothing when it raises
            amp.restore()
            if own["stage"] is OptState.UNSCALED:
                own["found_inf_per_device"] = found
            raise
        amp.undecided()
        own["stage"] = OptState.STEPPED
        amp.values.clear()
        return result

    def _may_ask(self, optimizer: FusedOptimizer) -> bool:
        return (
            self._enabled
            and self._scale is not None
            and self._per_optimizer_states[id(optimizer)]["stage"] is not OptState.STEPPED
            and (optimizer._takes_scaled_gradients() or optimizer._ranks() is not None)
        )

    def _may_pass_scaled(self, optimizer: FusedOptimizer) -> bool:
        return optimizer._takes_scaled_gradients() or optimizer._hooks_know_scales()

    def sweeps(self, optimizer: Optimizer) -> bool:
        """Whether ``step(optimizer)`` would sweep over the gradients once more to check them.

        False for the optimizers of this package. True for every other, also for a wrapper around
        one of ours (``Lookahead(FusedAdamW(...))``), and while a step pre-hook, or a ``step`` that
        is not ours, needs unscaled gradients. The step is right in either case.
        """
        return not (isinstance(optimizer, FusedOptimizer) and self._may_pass_scaled(optimizer))

    def _unscale_grads_(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Where ranks share a norm, this rank's parts are unscaled, and the step asks all ranks.
        torch would ask those of one gradient's mesh, and refuse plain gradients beside DTensors.
        """
        if isinstance(optimizer, FusedOptimizer) and optimizer._ranks() is not None:
            optimizer = _local_view(optimizer)
        return super()._unscale_grads_(optimizer, *args, **kwargs)

    @untraced
    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[Any, Any]:
        if not isinstance(optimizer, FusedOptimizer):
            return super()._check_inf_per_device(optimizer)
        flag = self._record_flag(optimizer, clear=True)  # torch adds it up at once
        return {flag.device: flag}

    def _record_flag(self, optimizer: FusedOptimizer, clear: bool) -> torch.Tensor:
        """An fp32 flag that the optimizer's next step fills in; scaler and optimizer refer to it.

        ``update()`` accumulates into the flag in place, so ``found_inf`` never returns the flag
        itself, and each scaler has its own. Until the step it holds the last answer, unless
        ``clear``: on a GPU clearing is a launch of its own.
        """
        scale, _ = self._check_scale_growth_tracker("step")
        device, amp = optimizer._flag_device(scale.device), optimizer._shared.amp
        # A scaler that no longer exists may have had this id; then nobody else uses its flag.
        flag = amp.flags.get(id(self))
        if flag is None or flag.device != device:
            with durable():
                flag = amp.flags[id(self)] = torch.zeros((), dtype=torch.float32, device=device)
        elif clear:
            flag.zero_()
        amp.due = flag
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {device: flag}
        return flag


def _local_view(optimizer: FusedOptimizer) -> Any:
    """An optimizer whose params have this rank's parts of DTensors as gradients."""
    params = []
    for param in served_params(optimizer.param_groups):
        if is_dtensor(param.grad):
            part = local_of(param.grad).detach()
            param, param.grad = part.detach(), part  # two objects: no tensor is its own gradient
        params.append(param)
    return SimpleNamespace(param_groups=[{"params": params}])


_PLAIN_SCALERS = (
    TorchGradScaler,
    torch.cuda.amp.GradScaler,
    torch.cpu.amp.grad_scaler.GradScaler,
)


def fuse_scaler(scaler: Any) -> Any:
    """Turn a scaler that a framework made into one that behaves like :class:`GradScaler`.

    Works on Accelerate's ``accelerator.scaler``, Lightning's ``plugin.scaler``, timm's
    ``NativeScaler._scaler`` and the like, at any time between ``update()`` and ``step()``.

    Args:
        scaler: a ``torch.amp.GradScaler`` or an instance of a subclass; converted in place.

    Returns:
        ``scaler``.

    Raises:
        TypeError: not a GradScaler, or one that brings its own check (FSDP's ShardedGradScaler
            reduces the flag over ranks, which an optimizer's own flag would bypass).
    """
    if isinstance(scaler, GradScaler):
        return scaler
    cls = type(scaler)
    if not isinstance(scaler, TorchGradScaler):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler, got {cls.__name__}; a wrapper often has it "
            "inside: `fusedopt.fuse_scaler(wrapper.scaler)`"
        )
    for name in ("_check_inf_per_device", "_unscale_grads_", "unscale_", "step"):
        if getattr(cls, name) is not getattr(TorchGradScaler, name):
            raise TypeError(
                f"scaler: {cls.__name__} overrides {name}, which fuse_scaler would bypass; "
                "use it as it is (the step is right, with one more sweep over the gradients)"
            )
    if cls in _PLAIN_SCALERS:
        scaler.__class__ = GradScaler
    else:
        bases = (GradScaler, cls)
        scaler.__class__ = type(f"Fused{cls.__name__}", bases, {"__reduce_ex__": _reduce})
    return scaler


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle by the original class: the fused one exists only at run time."""
    return _rebuild, (type(self).__mro__[2], self.__getstate__())


def _rebuild(cls: type, state: dict[str, Any]) -> Any:
    scaler: Any = object.__new__(cls)
    scaler.__setstate__(state)
    return fuse_scaler(scaler)
