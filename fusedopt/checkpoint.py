"""Load a checkpoint: check what it holds, and copy its values into the optimizer's state."""

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
from .plan.exchange import REPLICATED
from .plan.groups import check_group, refuse_differentiable
from .plan.local import local_of, part_for, wrapped
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

Wanted = dict[Any, tuple[Tensor, tuple[str, ...]]]  # by a checkpoint's key: parameter, state names
Write = tuple[Tensor, Tensor]  # a tensor of the optimizer, and the tensor that is copied to it
Fill = tuple[ParamState, str, Tensor, Tensor]  # a state, its name, param, the wanted layout


def load(optimizer: SharingOptimizer, state_dict: dict[str, Any]) -> None:
    """Implement ``load_state_dict``. Everything is checked before anything is changed."""
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = dict(replaced)
    # A wrapper may have put options of the whole optimizer there; those stay as constructed. How
    # parameters lie on ranks is a matter of this run, and not of the one that saved.
    stays = {*OPTION_NAMES, REPLICATED}
    groups = [
        {name: value for name, value in group.items() if name not in stays}
        for group in state_dict["param_groups"]
    ]
    for own, saved in zip(optimizer.param_groups, groups, strict=False):
        saved.update({name: own[name] for name in (REPLICATED,) if name in own})
    state_dict["param_groups"] = groups
    wanted = _check(optimizer, groups, state_dict)
    optimizer._check_loaded_groups(groups)
    with optimizer._shared.turn, durable(), torch.no_grad():  # not during a step
        optimizer._shared.drop_plans()
        _copy_in(optimizer, state_dict, wanted)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


# ---- what a checkpoint must hold -----------------------------------------------------------------


def _check(optimizer: SharingOptimizer, groups: list[Group], state_dict: dict[str, Any]) -> Wanted:
    """Raise unless the checkpoint fits this optimizer. Returns the parameter of each state."""
    wanted: Wanted = {}
    for g, saved in enumerate(groups):
        _check_group(g, saved, optimizer)
    sizes = [[len(group["params"]) for group in each] for each in (groups, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        return wanted  # torch's load_state_dict refuses it
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
    """Refuse keys such as "0" for 0: their states would stay unused, and parameters start anew."""
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
    """Refuse the group of another optimizer.

    Every checkpoint of a rule has its numbers; older ones lack some flags. A group with ``foreach``
    and without the rule's own flags is torch's NAdam, RAdam or Adamax. Apex's Adam has neither.
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
    # A wrapper may have moved the parameter's memory elsewhere: `param.data` is empty then.
    shaped = is_served(param) and not is_lazy(param) and param.numel() > 0
    check_state(label, param, saved, names, f"del state_dict['state'][{key!r}]", shaped)


# ---- how its values get in -----------------------------------------------------------------------


def _copy_in(optimizer: SharingOptimizer, state_dict: dict[str, Any], wanted: Wanted) -> None:
    """Copy a checked checkpoint; nothing is changed until all memory has been allocated."""
    state: dict[Any, Any] = {}
    writes: list[Write] = []
    fills: list[Fill] = []
    for key, value in state_dict["state"].items():
        if key in wanted:
            state[wanted[key][0]] = _receive(optimizer, *wanted[key], value, writes, fills)
        else:
            state[key] = copy.deepcopy(value)
    with unfilled_state([like for *_, like in fills]) as new:
        copy_all(new, [own[name] for own, name, *_ in fills])
    for (own, name, param, _), tensor in zip(fills, new, strict=True):
        own[name] = wrapped(tensor, param)
    names = _names_given(optimizer)
    # torch would cast state to the parameter's dtype, so torch loads the groups only.
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
    """Make the state of ``param`` from ``saved``; the two share no memory.

    A tensor of the optimizer that nobody else refers to is reused, so that loading needs no second
    state. The copies that are still to be made are added to ``writes`` and ``fills``.

    Accepts what ``torch.optim`` saves: states in the parameter's dtype, ``step`` as a number or in
    any dtype, a ``momentum_buffer`` that is None or comes without ``step``.
    """
    own = as_ours(saved, names)
    if is_lazy(param) or not _can_be_updated(param):
        return copy.deepcopy(own)  # the step converts it, once the parameter can be updated
    like = dense_like(param)
    if MASTER not in wanted_names(param, names, optimizer._shared.options.master_weights):
        own.pop(MASTER, None)  # this parameter keeps no master
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
            writes.append((local_of(state[name]), part_for(param, value)))
        else:
            state[name] = part_for(param, value)
            fills.append((state, name, param, like))
    return state


def _can_be_updated(param: Tensor) -> bool:
    """False for a frozen parameter of a dtype or layout that no backend can update."""
    try:
        check_param("", param)
    except TypeError:
        return False
    return True


def _is_reusable(optimizer: SharingOptimizer, param: Tensor, name: str, like: Tensor) -> bool:
    """Whether the optimizer has such a tensor, in memory that torch allocated for it alone."""
    own = optimizer.state.get(param)
    tensor = own.get(name) if type(own) is dict else None
    if tensor is None or not fits(tensor, param, like) or type(local_of(tensor)) is not Tensor:
        return False
    local = local_of(tensor)
    storage = local.untyped_storage()
    shared = storage.is_shared() and local.is_cpu  # on a GPU, all memory is "shared"
    whole = storage.resizable() and not shared and storage.nbytes() == local.nbytes
    if not whole or local.is_inference() or tensor.requires_grad:
        return False
    del own, tensor, local, storage  # these references would count as owners
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
