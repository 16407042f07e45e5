"""Loading a checkpoint: what it must hold, and how its values get into the optimizer's state."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .modes import durable
from .options import OPTION_NAMES, literal
from .plan.checks import check_param, is_served
from .plan.groups import check_group, refuse_differentiable
from .plan.memory import unfilled_state
from .plan.plan import copy_all
from .plan.rows import label_of
from .plan.state import (
    MASTER,
    STEP,
    ParamState,
    as_ours,
    check_state,
    dense_like,
    fits,
    step_tensor,
    wanted_names,
)
from .rules.declaration import Group
from .shared import SharingOptimizer

Wanted = dict[Any, tuple[Tensor, tuple[str, ...]]]  # of a checkpoint's key: parameter and states
Write = tuple[Tensor, Tensor]  # a tensor of the optimizer, and the one that is copied to it
Fill = tuple[ParamState, str, Tensor]  # a checkpoint's tensor, to be copied in the form of another


def load(optimizer: SharingOptimizer, state_dict: dict[str, Any]) -> None:
    """What ``load_state_dict`` does. All is checked before anything is changed."""
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = dict(replaced)
    # Options of the whole optimizer, which a wrapper may have put there, stay as constructed.
    groups = [
        {name: value for name, value in group.items() if name not in OPTION_NAMES}
        for group in state_dict["param_groups"]
    ]
    state_dict["param_groups"] = groups
    wanted = _check(optimizer, groups, state_dict)
    optimizer._check_loaded_groups(groups)
    with optimizer._shared.turn, durable(), torch.no_grad():  # not beside a step
        optimizer._shared.drop_plans()
        _copy_in(optimizer, state_dict, wanted)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


# ---- what a checkpoint must hold -----------------------------------------------------------------


def _check(optimizer: SharingOptimizer, groups: list[Group], state_dict: dict[str, Any]) -> Wanted:
    """Raise unless the checkpoint is one for this optimizer; say whose state each entry is."""
    wanted: Wanted = {}
    for g, saved in enumerate(groups):
        _check_group(g, saved, optimizer)
    sizes = [[len(group["params"]) for group in each] for each in (groups, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        return wanted  # torch refuses it in a moment
    _check_keys(state_dict)
    for g, (own, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        names = optimizer._shared.line.state_names({**optimizer.defaults, **saved})
        for i, (param, key) in enumerate(zip(own["params"], saved["params"], strict=True)):
            if key in state_dict["state"]:
                label = label_of(own, g, i, optimizer._shared.names)
                if key in wanted:
                    raise ValueError(
                        f"{label}: the checkpoint gives it the state {key!r} of a parameter before "
                        "it; start it anew, by a key that has no state: "
                        f"`keys = list(state_dict['param_groups'][{g}]['params']); keys[{i}] = -1; "
                        f"state_dict['param_groups'][{g}]['params'] = keys`"
                    )
                _check_saved(label, key, param, state_dict["state"][key], names, saved)
                wanted[key] = (param, names)
    return wanted


def _check_keys(state_dict: dict[str, Any]) -> None:
    """A state under a key of no group would be kept beside its parameter, which starts anew."""
    state = state_dict["state"]
    keys = {str(key): key for group in state_dict["param_groups"] for key in group["params"]}
    astray = [key for key in state if str(key) in keys and keys[str(key)] not in state]
    if astray:
        raise KeyError(
            f"state_dict['state'] has {astray} where its param groups name "
            f"{[keys[str(key)] for key in astray]}: JSON, for one, makes strings of keys; use the "
            "groups' own: `keys = {str(i): i for g in state_dict['param_groups'] for i in "
            "g['params']}; state_dict['state'] = {keys.get(str(k), k): v for k, v in "
            "state_dict['state'].items()}`"
        )


def _check_group(index: int, group: Group, optimizer: SharingOptimizer) -> None:
    """Each checkpoint of a rule has its numbers. Of the flags, older ones lack some.

    A group of torch's that has ``foreach`` and not the rule's own flags is one of NAdam, RAdam or
    Adamax. Groups of Apex's Adam have neither.
    """
    where, rule = f"param group {index} of the state_dict", optimizer.rule
    refuse_differentiable(group, where)
    check_group(group, rule, f" in {where}")
    defaults = optimizer.defaults
    wanted = {n: v for n, v in defaults.items() if not (v is None or isinstance(v, bool))}
    if "foreach" in group:
        wanted.update({n: v for n, v in defaults.items() if n in rule.flags})
    missing = {name: value for name, value in wanted.items() if name not in group}
    if missing:
        values = ", ".join(f"{name}={literal(value)}" for name, value in missing.items())
        raise ValueError(
            f"param group {index} of the state_dict has no {', '.join(map(repr, missing))}: it is "
            "the checkpoint of another optimizer; to load it none the less, say what to go on "
            f"with: `state_dict['param_groups'][{index}].update({values})`"
        )


def _check_saved(
    label: str, key: Any, param: Tensor, saved: object, names: Sequence[str], group: Group
) -> None:
    if not isinstance(saved, dict):
        raise TypeError(
            f"{label}: state of one parameter must be a dict, got {type(saved).__name__}; "
            f"pass what optimizer.state_dict() returned, or start it anew: "
            f"`del state_dict['state'][{key!r}]`"
        )
    own = as_ours(saved, names)
    if STEP in group and STEP not in own and any(name in own for name in names):
        raise KeyError(
            f"{label}: the checkpoint counts the steps of a group, not of each parameter, as "
            "Apex's does; give each its own: `for g in state_dict['param_groups']: [state_dict"
            "['state'][i].update(step=g['step']) for i in g['params'] if i in state_dict['state']]`"
        )
    # The memory of a parameter may be elsewhere for the time: `param.data` is empty then.
    shaped = is_served(param) and not is_lazy(param) and param.numel() > 0
    check_state(label, param, saved, names, f"del state_dict['state'][{key!r}]", shaped)


# ---- how its values get in -----------------------------------------------------------------------


def _copy_in(optimizer: SharingOptimizer, state_dict: dict[str, Any], wanted: Wanted) -> None:
    """Copy a checkpoint that was checked; until all memory is there nothing is changed."""
    state: dict[Any, Any] = {}
    writes: list[Write] = []
    fills: list[Fill] = []
    for key, value in state_dict["state"].items():
        if key in wanted:
            state[wanted[key][0]] = _receive(optimizer, *wanted[key], value, writes, fills)
        else:
            state[key] = copy.deepcopy(value)
    with unfilled_state([like for _, _, like in fills]) as new:
        copy_all(new, [own[name] for own, name, _ in fills])
    for (own, name, _), tensor in zip(fills, new, strict=True):
        own[name] = tensor
    names = _names_given(optimizer)
    # torch would cast state to the parameter's dtype, so it gets the groups alone.
    _load_without_hooks(optimizer, {**state_dict, "state": {}})
    optimizer._shared.names = names
    optimizer.state.update(state)
    copy_all([target for target, _ in writes], [source for _, source in writes])


def _receive(
    optimizer: SharingOptimizer,
    param: Tensor,
    names: Sequence[str],
    saved: ParamState,
    writes: list[Write],
    fills: list[Fill],
) -> ParamState:
    """The state for ``param`` that ``saved`` stands for; shares no memory with it.

    A tensor of the optimizer that nobody else can see is used again, so that loading needs no
    second state. What is still to be copied is added to ``writes`` and ``fills``.

    Accepts what ``torch.optim`` saves: states in the parameter's dtype, ``step`` as a number or in
    any dtype, a ``momentum_buffer`` that is None or comes without ``step``.
    """
    own = as_ours(saved, names)
    if is_lazy(param) or not _can_be_updated(param):
        return copy.deepcopy(own)  # the step converts it, once the parameter can be updated
    like = dense_like(param)
    if MASTER not in wanted_names(param, names, optimizer._shared.options.master_weights):
        own.pop(MASTER, None)  # of a half parameter
    state: ParamState = {}
    for name, value in own.items():
        if name == STEP and names:
            state[name] = step_tensor(value, param)
        elif not isinstance(value, Tensor):
            state[name] = copy.deepcopy(value)
        elif value.shape != param.shape or not value.is_floating_point():
            state[name] = value.detach().clone().to(param.device)
        elif _is_reusable(optimizer, param, name, like):
            state[name] = optimizer.state[param][name]
            writes.append((state[name], value))
        else:
            state[name] = value
            fills.append((state, name, like))
    return state


def _can_be_updated(param: Tensor) -> bool:
    """False for some frozen parameters: nobody asks how they lie in memory."""
    try:
        check_param("", param)
    except TypeError:
        return False
    return True


def _is_reusable(optimizer: SharingOptimizer, param: Tensor, name: str, like: Tensor) -> bool:
    """Whether the optimizer has such a tensor, in memory that torch allocated for it alone."""
    own = optimizer.state.get(param)
    tensor = own.get(name) if type(own) is dict else None
    if type(tensor) is not Tensor or not fits(tensor, like):
        return False
    storage = tensor.untyped_storage()
    shared = storage.is_shared() and tensor.is_cpu  # on a GPU, all memory is "shared"
    whole = storage.resizable() and not shared and storage.nbytes() == tensor.nbytes
    if not whole or tensor.is_inference() or tensor.requires_grad:
        return False
    del own, tensor, storage  # they would count as owners
    nobody_else = SimpleNamespace(state={param: {name: torch.empty(1)}})
    return _owners(optimizer, param, name) == _owners(nobody_else, param, name)


def _owners(holder: Any, param: Tensor, name: str) -> tuple[int, ...]:
    """How many hold all state, the state of ``param``, its tensor ``name``, the tensor's memory."""
    own = holder.state[param]
    tensor = own[name]
    storage = tensor.untyped_storage()
    return (
        sys.getrefcount(holder.state),
        sys.getrefcount(own),
        sys.getrefcount(tensor),
        sys.getrefcount(storage),
        tensor._use_count(),
        torch._C._storage_Use_Count(storage._cdata),
    )


def _load_without_hooks(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """torch's own; the hooks see the checkpoint and the result, not the state on its way."""
    names = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    hooks = {name: getattr(optimizer, name) for name in names}
    optimizer.__dict__.update({name: OrderedDict() for name in names})
    try:
        Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        optimizer.__dict__.update(hooks)


def _names_given(optimizer: SharingOptimizer) -> WeakTensorKeyDictionary:
    """By parameter. torch replaces a group's names by a checkpoint's, which may be in any order."""
    names, known = WeakTensorKeyDictionary(), optimizer._shared.names
    for group in optimizer.param_groups:
        in_group = group.get("param_names") or [None] * len(group["params"])
        for param, name in zip(group["params"], in_group, strict=False):
            names[param] = known.get(param, name)  # type: ignore[no-untyped-call]
    return names
