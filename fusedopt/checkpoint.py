"""Load a checkpoint: copy its values into the optimizer's state."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .codecs import SCALE
from .loadable import Wanted, check, without_gaps
from .modes import durable
from .options import OPTION_NAMES
from .plan.checks import check_param
from .plan.exchange import REPLICATED
from .plan.kept import STATE_DTYPE
from .plan.local import is_dtensor, local_of, part_for, same_sharding, wrapped
from .plan.plan import Kept, copy_all
from .plan.state import (
    MASTER,
    STEP,
    Missing,
    ParamState,
    Stream,
    as_ours,
    cut_anywhere,
    dense_like,
    each_scale,
    fill_in,
    fits,
    names_of,
    plain_codec,
    step_tensor,
    stored,
    streams_of,
)
from .rules.declaration import Group
from .shared import SharingOptimizer

Write = tuple[Tensor, Tensor]  # a tensor of the optimizer, and the tensor that is copied to it
OF_TORCH = "torch.distributed.checkpoint.state_dict"


def load(optimizer: SharingOptimizer, state_dict: dict[str, Any]) -> None:
    """Implement ``load_state_dict``. Everything is checked before anything is changed."""
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = dict(replaced)
    groups = [_hyper_parameters(group) for group in state_dict["param_groups"]]
    for own, group in zip(optimizer.param_groups, groups, strict=False):
        group.update({name: own[name] for name in (REPLICATED, STATE_DTYPE) if name in own})
    state_dict["param_groups"] = groups
    wanted = check(optimizer, groups, state_dict)
    optimizer._check_loaded_groups(groups)
    with optimizer._shared.turn, durable(), torch.no_grad():  # not during a step
        optimizer._shared.drop_plans()
        _copy_in(optimizer, state_dict, wanted)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _hyper_parameters(group: Group) -> Group:
    """Without what stays as the user has set it: options of the whole optimizer, which a wrapper
    may have put there, and how ranks share the group, who may be others now."""
    return {name: v for name, v in group.items() if name not in OPTION_NAMES | {REPLICATED}}


def _copy_in(optimizer: SharingOptimizer, state_dict: dict[str, Any], wanted: Wanted) -> None:
    """Copy a checked checkpoint; nothing is changed until all memory has been allocated."""
    state: dict[Any, Any] = {}
    writes: list[Write] = []
    fills: list[Missing] = []
    for key, value in state_dict["state"].items():
        if key in wanted:
            state[wanted[key][0]] = _receive(optimizer, *wanted[key], value, writes, fills)
        else:
            state[key] = copy.deepcopy(value)
    # Ranks that exchange parts have to meet at each: their dicts may be in different orders.
    place = {param: number for number, (param, _) in enumerate(wanted.values())}
    fills.sort(key=lambda fill: (place[fill.param], fill.stream.name))
    fill_in(fills)
    names = _names_given(optimizer)
    # torch would cast state to the parameter's dtype, so torch loads the groups only.
    _load_without_hooks(optimizer, {**state_dict, "state": {}})
    optimizer._shared.names = names
    optimizer.state.update(state)
    copy_all([target for target, _ in writes], [source for _, source in writes])


def _receive(
    optimizer: SharingOptimizer,
    param: Tensor,
    kept: Kept,
    saved: ParamState,
    writes: list[Write],
    fills: list[Missing],
) -> ParamState:
    """Make the state of ``param`` from ``saved``; the two share no memory.

    A tensor of the optimizer that nobody else refers to is reused, so that loading needs no second
    state. The copies that are still to be made are added to ``writes`` and ``fills``.

    Accepts what ``torch.optim`` saves: states in the parameter's dtype, ``step`` as a number or in
    any dtype, a ``momentum_buffer`` that is None or comes without ``step``.
    """
    own = as_ours(without_gaps(saved), kept.names)
    if is_lazy(param) or not _can_be_updated(param):
        return copy.deepcopy(own)  # the step converts it, once the parameter can be updated
    like = dense_like(param)
    streams = streams_of(param, kept, optimizer._shared.options)
    if streams.master is None:  # this parameter keeps no master
        own = {name: value for name, value in own.items() if name not in names_of(MASTER)}
    wanted = {stream.of: stream for stream in streams.all}
    own = cut_anywhere(own, param)
    there = stored(own, kept.names)
    scales = {stream.name + SCALE for stream in there.values() if stream.codec.scaled}
    blocks = {s.name + SCALE for s in there.values() if each_scale(own, s) is None}
    state: ParamState = {}
    for name, value in own.items():
        stream = there.get(name) or Stream(name, plain_codec(param))
        wish = wanted.get(stream.of, stream)
        is_number = name in there or (isinstance(value, Tensor) and value.is_floating_point())
        if name == STEP and streams.counts:
            state[name] = step_tensor(value, param)
        elif not isinstance(value, Tensor):
            state[name] = copy.deepcopy(value)
        elif name in scales and name not in blocks:
            state[name] = value  # of each element: what it belongs to is filled in from both
        elif name in scales or value.shape != param.shape or not is_number:
            state[name] = value.detach().clone().to(param.device)
        elif stream.codec.scaled and stream.name + SCALE not in blocks:
            state[name] = value
            fills.append(Missing(state, wish, param, like))
        elif value is _own(optimizer, param, name) and _is_alone(value, param, like, wish):
            state[name] = value
        elif _is_here(param, value) and _is_reusable(optimizer, param, like, stream, wish):
            state[name] = optimizer.state[param][name]
            writes.append((local_of(state[name]), part_for(param, value)))
        else:
            state[name] = value
            fills.append(Missing(state, wish, param, like))
    filled = {fill.stream.of for fill in fills if fill.param is param}
    for stream in streams.all:
        for name in () if stream.of in filled else names_of(stream.of).difference(stream.names):
            state.pop(name, None)  # scales that came back from torch, of states in fp32
    return state


def _own(optimizer: SharingOptimizer, param: Tensor, name: str) -> Any:
    own = optimizer.state.get(param)
    return own.get(name) if type(own) is dict else None


def _is_here(param: Tensor, value: Tensor) -> bool:
    """Whether no rank has to send a part of ``value``: that may fail, so nothing is overwritten."""
    return not is_dtensor(value) or same_sharding(value, param)


def _can_be_updated(param: Tensor) -> bool:
    """False for a frozen parameter of a dtype or layout that no backend can update."""
    try:
        check_param("", param)
    except TypeError:
        return False
    return True


def _is_alone(tensor: Tensor, param: Tensor, like: Tensor, stream: Stream) -> bool:
    """Whether it is a stream of ``param``, in memory that torch allocated for it alone."""
    if not fits(tensor, param, like, stream.codec.dtype) or type(local_of(tensor)) is not Tensor:
        return False
    local = local_of(tensor)
    storage = local.untyped_storage()
    shared = storage.is_shared() and local.is_cpu  # on a GPU, all memory is "shared"
    whole = storage.resizable() and not shared and storage.nbytes() == local.nbytes
    return whole and not local.is_inference() and not tensor.requires_grad


def _is_reusable(
    optimizer: SharingOptimizer, param: Tensor, like: Tensor, stream: Stream, wish: Stream
) -> bool:
    """Whether the optimizer has such a tensor, and nobody else refers to it."""
    name = wish.name
    tensor = _own(optimizer, param, name)
    both_plain = not (stream.codec.suffix or wish.codec.suffix or wish.codec.dithers)
    if stream != wish and not both_plain:
        return False
    if tensor is None or not _is_alone(tensor, param, like, wish):
        return False
    del tensor  # this reference would count as an owner
    nobody_else = SimpleNamespace(state={param: {name: wrapped(torch.empty(1), param)}})
    return _owners(optimizer, param, name) == _owners(nobody_else, param, name)


def _owners(holder: Any, param: Tensor, name: str) -> tuple[int, ...]:
    """Reference counts of all state, of the state of ``param``, of its tensor ``name``, of the
    local part and of its storage."""
    own = holder.state[param]
    tensor = own[name]
    local: Any = local_of(tensor)
    storage = local.untyped_storage()
    return (
        sys.getrefcount(holder.state),
        sys.getrefcount(own),
        sys.getrefcount(tensor),
        sys.getrefcount(local),
        sys.getrefcount(storage),
        tensor._use_count(),
        local._use_count(),
        torch._C._storage_Use_Count(storage._cdata),
    )


def _load_without_hooks(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Call torch's own; ``load`` runs the hooks, on the checkpoint and on the final result."""
    names = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    hooks = {name: getattr(optimizer, name) for name in names}
    optimizer.__dict__.update({name: OrderedDict() for name in names})
    try:
        Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        optimizer.__dict__.update(hooks)


def _names_given(optimizer: SharingOptimizer) -> WeakTensorKeyDictionary:
    """Names by parameter. torch takes the checkpoint's names, which may be in another order."""
    names, known = WeakTensorKeyDictionary(), optimizer._shared.names
    for group in optimizer.param_groups:
        in_group = group.get("param_names") or [None] * len(group["params"])
        for param, name in zip(group["params"], in_group, strict=False):
            names[param] = known.get(param, name)  # type: ignore[no-untyped-call]
    return names
