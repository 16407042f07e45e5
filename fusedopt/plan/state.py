"""Optimizer state of one parameter: its contents, and how it is made and checked.

Names and meaning are torch's (``step`` and those that the rule declares) plus
``master_param``, the fp32 copy of an fp16/bf16 parameter. Whatever the parameter's dtype, state is
fp32 (fp64 for an fp64 parameter) and laid out in memory like the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from ..options import number
from ..rules.declaration import NOT_BESIDE, OF_SOME_RULE, STARTS_LATER, UNCOUNTED
from .local import is_dtensor, local_of, part_for, same_sharding, wrapped
from .memory import is_dense, state_dtype, strides, unfilled_state
from .plan import HALF_DTYPES, Layout, Row

MASTER = "master_param"
STEP = "step"

ParamState = dict[str, Any]


def copy_without_gaps(local: Tensor) -> Tensor | None:
    """Room for a dense copy of ``local``, if the kernels cannot update it in place.

    They cannot if it has gaps or is a lazily negated view.
    """
    if is_dense(local) and not local.is_neg():
        return None
    return torch.empty(local.shape, dtype=local.dtype, device=local.device)


def dense_like(param: Tensor) -> Tensor:
    """A tensor laid out as the kernels see this rank's part of ``param``."""
    local = local_of(param)
    copy = copy_without_gaps(local)
    return local if copy is None else copy


def wanted_names(
    param: Tensor, names: Sequence[str], master_weights: bool | None
) -> tuple[str, ...]:
    """State names of ``param``: the rule's, and ``master_param`` for an fp16 or bf16 parameter."""
    has_master = param.dtype in HALF_DTYPES and master_weights is not False
    return (*names, MASTER) if has_master else (*names,)


def is_complete(
    row: Row, state: ParamState, names: Sequence[str], master_weights: bool | None
) -> bool:
    """Whether ``state`` can be used by the kernels as it is."""
    wanted = wanted_names(row.param, names, master_weights)
    if MASTER in state and MASTER not in wanted:
        return False
    if names and not is_step(state.get(STEP), row.param):
        return False
    return all(fits(state.get(name), row.param, row.dense) for name in wanted)


def fits(value: object, param: Tensor, like: Tensor) -> bool:
    """Whether ``value`` is state of ``param`` as the kernels need it; ``like``: its dense part."""
    if is_dtensor(param):
        if not is_dtensor(value) or not same_sharding(value, param):
            return False
        value = value._local_tensor  # type: ignore[attr-defined]
    return (
        isinstance(value, Tensor)
        and value.dtype == state_dtype(like)
        and value.device == like.device
        and value.shape == like.shape
        and (value.stride() == like.stride() or strides(value) == strides(like))
        and not value.is_neg()
    )


def is_step(value: object, param: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.float32
        and value.dim() == 0
        and value.device == param.device
    )


def step_tensor(value: Any, param: Tensor) -> Tensor:
    """A 0-dim fp32 count on the parameter's device, from a number or a one-element tensor."""
    return torch.tensor(float(value), dtype=torch.float32, device=param.device)


def as_ours(state: ParamState, names: Sequence[str]) -> ParamState:
    """A copy of ``state`` in our form: entries of None are left out, and ``step`` is added.

    torch's SGD keeps no count, but its buffer shows that the first step is past: ``step`` is 1.
    """
    known = {*names, MASTER, STEP, *UNCOUNTED}
    own = {name: value for name, value in state.items() if value is not None or name not in known}
    if not UNCOUNTED.isdisjoint(own):
        own.setdefault(STEP, 1)
    return own


def check_state(
    label: str,
    param: Tensor,
    state: ParamState,
    names: Sequence[str],
    anew: str,
    shaped: bool = True,
) -> None:
    """Raise unless each state of ``names`` exists, or none does and the parameter starts anew.

    Args:
        label: the parameter's name in messages.
        anew: the line of code that drops the parameter's state.
        shaped: False if the parameter's shape may still change.

    Raises:
        KeyError: some states are there and some are not, or only those of another rule.
        TypeError: a state is no plain tensor, or is of an integer or complex dtype.
        ValueError: ``step`` is no count.
        RuntimeError: a state has no memory, or another shape than the parameter.
    """
    own = as_ours(state, names)
    missing = [name for name in (*names, STEP) if name not in own and name not in STARTS_LATER]
    present = [name for name in state if name in own] if names and missing else []
    found = sorted((name for name in present if _tells(name, own[name], names)), key=str)
    if found:
        raise KeyError(
            f"{label}: its state has {_listed(found)} and lacks {_listed(missing)}; add what is "
            f"missing, or start it anew: `{anew}`"
        )
    strange = [name for name in NOT_BESIDE.get(tuple(names), ()) if name in own]
    if strange:
        raise KeyError(
            f"{label}: its state has {_listed(strange)}, which another optimizer keeps; start it "
            f"anew: `{anew}`"
        )
    for name in (*names, MASTER, STEP):
        value = own.get(name)
        if name != STEP and value is not None:
            _check_tensor(label, name, value, param, anew)
        if isinstance(value, Tensor) and _has_no_memory(local_of(value), local_of(param)):
            raise RuntimeError(f"{label}: state {name!r} has no memory; start it anew: `{anew}`")
        if shaped and name != STEP and value is not None and value.shape != param.shape:
            raise RuntimeError(
                f"{label}: state {name!r} has shape {tuple(value.shape)}, the parameter has "
                f"{tuple(param.shape)}; give it that shape, or start it anew: `{anew}`"
            )
    if names and STEP in own and not _is_count(own[STEP]):
        raise ValueError(
            f"{label}: state 'step' is {own[STEP]!r}, and has to be a number of steps, at least 0; "
            f"set it, or start it anew: `{anew}`"
        )


def _tells(name: str, value: object, names: Sequence[str]) -> bool:
    """Whether ``name`` is a state of this rule or of another, and not a user's own note."""
    if name in (*names, STEP) or name in OF_SOME_RULE:
        return True
    # torch's SGD starts its buffer beside any entries. A master alone tells no rule from another.
    notes = name == MASTER or not UNCOUNTED.isdisjoint(names)
    return not notes and any(isinstance(leaf, Tensor) for leaf in tree_iter(value))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _check_tensor(label: str, name: str, value: object, param: Tensor, anew: str) -> None:
    if is_dtensor(value):
        sharded: Any = value
        if not is_dtensor(param) or sharded.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
            place = f"{anew.removeprefix('del ')}[{name!r}]"
            raise TypeError(
                f"{label}: state {name!r} lies on {sharded.device_mesh}, and the parameter does "
                f"not; make it whole, on all ranks: `{place} = {place}.full_tensor()`, or start it "
                f"anew: `{anew}`"
            )
        value = local_of(value)
    kind, wrapped = f"a {type(value).__name__}", is_traceable_wrapper_subclass(value)
    if isinstance(value, Tensor) and not wrapped and value.layout == torch.strided:
        if value.is_floating_point():
            return
        kind = f"of dtype {value.dtype}"
    raise TypeError(
        f"{label}: state {name!r} is {kind}, not a plain tensor of floating-point numbers; "
        f"convert it, or start it anew: `{anew}`"
    )


def _has_no_memory(value: Tensor, param: Tensor) -> bool:
    if value.device.type == "meta":
        return param.device.type != "meta"
    return value.numel() > 0 and value.data_ptr() == 0


def _is_count(value: Any) -> bool:
    """Whether ``value`` is a step count. A count that kernels read on a GPU is not read back."""
    if isinstance(value, Tensor) and is_step(value, value) and not value.is_cpu:
        return True
    try:
        return 0.0 <= number(value) < math.inf
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: several elements
        return False


def complete_all(
    rows: Sequence[Row], state: dict[Tensor, ParamState], names: Layout, master_weights: bool | None
) -> dict[Tensor, ParamState]:
    """Copies of the rows' states: missing tensors are added, and unfit ones converted.

    A new master starts as its parameter, a new moment as zero. An existing value keeps its numbers
    in the right dtype, device and layout. All memory is allocated before any of it is filled.

    Args:
        names: of the states that the rule wants, for each group.
        master_weights: as given by the user.
    """
    complete = {row.param: as_ours(state.get(row.param, {}), names[row.group]) for row in rows}
    missing: list[tuple[ParamState, str, Row]] = []
    for row in rows:
        own, wanted = complete[row.param], wanted_names(row.param, names[row.group], master_weights)
        if MASTER not in wanted:
            own.pop(MASTER, None)  # of a time when the parameter was half: stale by now
        missing += [
            (own, name, row) for name in wanted if not fits(own.get(name), row.param, row.dense)
        ]
    with unfilled_state([row.dense for _, _, row in missing]) as tensors:
        for (own, name, row), new in zip(missing, tensors, strict=True):
            old = own.get(name, row.param.detach() if name == MASTER else None)
            if old is None:
                new.zero_()
            else:
                new.copy_(part_for(row.param, old))
            own[name] = wrapped(new, row.param)
    for row in rows:
        own = complete[row.param]
        if (names[row.group] or STEP in own) and not is_step(own.get(STEP), row.param):
            own[STEP] = step_tensor(own.get(STEP, 0), row.param)
    return complete
