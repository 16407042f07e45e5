"""Optimizer state of one parameter: what it holds, how it is made, checked and loaded.

Names and meaning are torch's (``step``, ``exp_avg``, ``momentum_buffer`` ...) plus
``master_param``, the fp32 copy of an fp16/bf16 parameter. Whatever the parameter's dtype, state is
fp32 (fp64 for an fp64 parameter) and laid out in memory like the parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import is_dense, zeros_like_all
from .plan import HALF_DTYPES

MASTER = "master_param"
STEP = "step"

ParamState = dict[str, Any]


def state_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def is_readable(param: Tensor) -> bool:
    """Whether the kernels can take ``param`` as it lies: no gaps, and not a lazily negated view."""
    return is_dense(param) and not param.is_neg()


def dense_like(param: Tensor) -> Tensor:
    """``param`` itself when the kernels can read it, else a dense tensor of its shape."""
    flat = param.detach()
    if is_readable(flat):
        return flat
    return torch.empty(flat.shape, dtype=flat.dtype, device=flat.device)


def wants_master(param: Tensor, master_weights: bool | None) -> bool:
    return param.dtype in HALF_DTYPES and master_weights is not False


def is_complete(param: Tensor, state: ParamState, names: Sequence[str], master: bool) -> bool:
    """Whether ``state`` can be used by the kernels as it is."""
    if not names and not master:
        return True
    wanted = [*names, MASTER] if master else [*names]
    if names and not is_step(state.get(STEP), param):
        return False
    like = dense_like(param)
    return all(name in state and _fits(state[name], like) for name in wanted)


def _fits(value: object, like: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == state_dtype(like)
        and value.device == like.device
        and value.shape == like.shape
        and all(
            v == p or n < 2
            for v, p, n in zip(value.stride(), like.stride(), like.shape, strict=True)
        )
    )


def check_shapes(label: str, param: Tensor, state: ParamState, names: Sequence[str]) -> None:
    """Raise ``RuntimeError`` if a state tensor lacks its parameter's shape, or memory."""
    for name in (*names, MASTER, STEP):
        value = state.get(name)
        if not isinstance(value, Tensor):
            continue
        if name != STEP and value.shape != param.shape:
            raise RuntimeError(
                f"{label}: state {name!r} has shape {tuple(value.shape)}, the parameter has "
                f"{tuple(param.shape)}; delete optimizer.state[param] or give it that shape"
            )
        if value.numel() > 0 and value.device.type != "meta" and value.data_ptr() == 0:
            raise RuntimeError(
                f"{label}: state {name!r} has no memory; delete optimizer.state[param] or give it "
                "values"
            )


def complete_all(
    params: Sequence[Tensor],
    states: Sequence[ParamState],
    names: Sequence[Sequence[str]],
    master_weights: bool | None,
) -> None:
    """Make what is missing in each of ``states`` and convert what does not fit, in place.

    A new master starts as its parameter. An existing value keeps its numbers in the right dtype,
    device and layout.
    """
    wanted: list[tuple[int, str, Tensor]] = []
    for i, param in enumerate(params):
        like = dense_like(param)
        master = [MASTER] if wants_master(param, master_weights) else []
        if not master:
            states[i].pop(MASTER, None)  # of a time when the parameter was half: stale by now
        for name in (*names[i], *master):
            if not _fits(states[i].get(name), like):
                wanted.append((i, name, like))
    fresh = zeros_like_all([like for _, _, like in wanted], [state_dtype(w[2]) for w in wanted])
    for (i, name, _), new in zip(wanted, fresh, strict=True):
        old = states[i].get(name)
        if isinstance(old, Tensor):
            new.copy_(old)
        elif name == MASTER:
            new.copy_(params[i].detach())
        else:
            new.zero_()  # commits the memory: if there is not enough, it shows here
        states[i][name] = new
    for i, param in enumerate(params):
        if names[i] and not is_step(states[i].get(STEP), param):
            states[i][STEP] = _step_tensor(states[i].get(STEP, 0), param)


def is_step(value: object, param: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.float32
        and value.dim() == 0
        and value.device == param.device
    )


def _step_tensor(value: Any, param: Tensor) -> Tensor:
    """A 0-dim fp32 count on the parameter's device, from a number or a one-element tensor."""
    return torch.tensor(float(value), dtype=torch.float32, device=param.device)


def loaded(param: Tensor, saved: ParamState) -> ParamState:
    """The state for ``param`` that a checkpoint's ``saved`` stands for; shares no memory with it.

    Accepts what ``torch.optim`` saves: states in the parameter's dtype, ``step`` as a number or in
    any float dtype, a ``momentum_buffer`` that is None or comes without ``step``.
    """
    if not isinstance(saved, dict):
        raise TypeError(
            f"state of one parameter must be a dict, got {type(saved).__name__}; "
            "pass what optimizer.state_dict() returned"
        )
    saved = {name: value for name, value in saved.items() if value is not None}
    if "momentum_buffer" in saved and STEP not in saved:
        saved[STEP] = 1  # torch's SGD keeps no count: a buffer means that the first step is past
    like = dense_like(param)
    result: ParamState = {}
    for name, value in saved.items():
        if name == STEP:
            result[name] = _step_tensor(value, param)
        elif isinstance(value, Tensor) and value.shape == param.shape and value.is_floating_point():
            new = torch.empty_like(like, dtype=state_dtype(param), device=param.device)
            result[name] = new.copy_(value)
        elif isinstance(value, Tensor):
            result[name] = value.detach().clone().to(param.device)
        else:
            result[name] = copy.deepcopy(value)
    return result
