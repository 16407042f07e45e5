"""What a checkpoint must hold: refuse it by name before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from .options import literal
from .plan.checks import is_served
from .plan.groups import check_group, refuse_differentiable
from .plan.kept import kept_of
from .plan.plan import Kept
from .plan.rows import label_of
from .plan.state import MASTER, STEP, ParamState, as_ours, check_state
from .rules.declaration import OF_SOME_RULE, Group
from .shared import SharingOptimizer

Wanted = dict[Any, tuple[Tensor, Kept]]  # by a checkpoint's key: parameter, its states


def check(optimizer: SharingOptimizer, groups: list[Group], state_dict: dict[str, Any]) -> Wanted:
    """Raise unless the checkpoint fits this optimizer. Returns the parameter of each state."""
    wanted: Wanted = {}
    for g, saved in enumerate(groups):
        _check_group(g, saved, optimizer)
    sizes = [[len(group["params"]) for group in each] for each in (groups, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        return wanted  # torch's load_state_dict refuses it
    _check_keys(state_dict)
    for g, (own, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        options, names_of_group = optimizer._shared.options, optimizer._shared.line.state_names
        whole = {**optimizer.defaults, **saved}
        kept = kept_of(optimizer.rule, names_of_group, options, whole)
        names = kept.names
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
                found = state_dict["state"][key]
                if isinstance(found, dict):
                    turned_on = {n: saved[n] for n in _turned_on(optimizer, own, saved)}
                    _check_taken(label, (g, key), found, names, turned_on)
                _check_saved(label, key, param, found, names, saved)
                wanted[key] = (param, kept)
    return wanted


def _turned_on(optimizer: SharingOptimizer, own: Group, saved: Group) -> list[str]:
    """Options that give the checkpoint's parameters states that the optimizer's do not have."""
    options = (state.when for state in optimizer.rule.states if state.when is not None)
    return [name for name in options if not own.get(name) and saved.get(name)]


def _check_taken(
    label: str, at: tuple[int, Any], saved: ParamState, names: Sequence[str], turned_on: Group
) -> None:
    """Refuse states that ``torch.distributed.checkpoint`` has lost on the way.

    Of a flattened checkpoint it takes those states that the optimizer has already, and gives an
    empty dict for each that is not in the checkpoint. It names parameters, as no other saver does.
    """
    group, key = at
    anew = (
        "start it anew: `optimizer.register_load_state_dict_pre_hook(lambda _, saved: "
        f"saved['state'].__delitem__({key!r}))`"
    )
    lost = [name for name in (*names, STEP) if isinstance(saved.get(name), dict)]
    if names and lost:
        raise KeyError(
            f"{label}: the checkpoint has no {', '.join(map(repr, lost))} of {key!r}; {anew}"
        )
    if not isinstance(key, str) or all(name in saved for name in names):
        return
    if turned_on:
        values = ", ".join(f"{name}={literal(value)}" for name, value in turned_on.items())
        raise KeyError(
            f"{label}: its states in the checkpoint depend on {values}, which the optimizer did "
            "not have, so that torch.distributed.checkpoint has left them out; before you load: "
            f"`optimizer.param_groups[{group}].update({values}); optimizer.init_state()`"
        )
    if not saved:
        raise KeyError(
            f"{label}: it had no state for torch.distributed.checkpoint to load into; before you "
            f"load: `optimizer.init_state()`. If the checkpoint has none either, {anew}"
        )


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
    saved = without_gaps(saved)
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


def without_gaps(saved: ParamState) -> ParamState:
    """Without empty dicts in place of states: see ``_check_taken``."""
    known = OF_SOME_RULE | {MASTER, STEP}
    return {k: v for k, v in saved.items() if not (k in known and isinstance(v, dict))}
