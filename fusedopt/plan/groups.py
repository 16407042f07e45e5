"""Param groups as users give and edit them: checks, and the messages that refuse."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..options import (
    NOT_PICKLED,
    OF_GROUPS,
    OPTION_NAMES,
    Options,
    invalid,
    is_flag,
    is_number,
    is_pair,
    literal,
)
from ..rules.declaration import Group, Rule


def torch_defaults(twin: type[Optimizer], rule: Rule, arguments: dict[str, Any]) -> dict[str, Any]:
    """The group keys and defaults of torch's own class, which checks the arguments: errors are
    torch's, in any version. Bad arguments that torch accepts or does not name are refused here.

    Raises:
        ValueError: an argument is out of range, no number, or NaN.
    """
    known = arguments.keys() & inspect.signature(twin).parameters.keys()
    try:
        defaults = twin([torch.zeros(0)], **{name: arguments[name] for name in known}).defaults
    except ValueError:
        raise
    except Exception:  # for example, torch compared None with a number
        check_group(arguments, rule)
        raise
    check_group(arguments, rule)  # not the defaults: torch unpacks a dict's keys as a pair
    return {name: defaults.get(name, value) for name, value in arguments.items()}


def check_group(
    group: Mapping[str, Any], rule: Rule, where: str = "", error: type[Exception] = ValueError
) -> None:
    """Refuse hyper-parameters of a param group that are no numbers, or NaN, or no bools.

    Args:
        group: the options, of which some may be absent.
        where: says which group it is, for the message.
        error: the exception to raise; it names the option, its value and the group.
    """
    for name in filter(group.__contains__, rule.number_keys):
        value = group[name]
        if name in rule.pair_keys:
            if not is_pair(value):
                raise invalid(name, value, "use a pair of numbers", where, error)
        elif not is_number(value):
            raise invalid(name, value, "use a number, or a tensor of one element", where, error)
    for name in filter(group.__contains__, rule.flag_keys):
        if not is_flag(group[name]):
            raise invalid(name, group[name], "use True or False", where, error)


def check_containers(groups: Any, state: Any) -> None:
    """Refuse groups, params or state of a wrong type."""
    if not isinstance(groups, list):
        convert = isinstance(groups, Iterable) and not isinstance(groups, Mapping)
        anew = "[{**optimizer.defaults, 'params': params}]"
        raise RuntimeError(
            f"optimizer.param_groups is a {type(groups).__name__}, not a list; use "
            f"`optimizer.param_groups = {'list(optimizer.param_groups)' if convert else anew}`"
        )
    for i, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            raise RuntimeError(
                f"param group {i} is no dict with a list of params; take it out: "
                f"`del optimizer.param_groups[{i}]`"
            )
        for k, param in enumerate(group["params"]):
            if not isinstance(param, Tensor):
                raise RuntimeError(
                    f"param {k} of group {i} is a {type(param).__name__}, not a tensor; take "
                    f"it out: `group = optimizer.param_groups[{i}]; group['params'] = "
                    "[p for p in group['params'] if isinstance(p, torch.Tensor)]`"
                )
    if not isinstance(state, dict):
        raise RuntimeError(
            f"optimizer.state is a {type(state).__name__}, not a dict; "
            "`optimizer.state = {}` starts all state anew"
        )


def copies(groups: Any, state: Any) -> tuple[list[Group], dict[Any, Any]]:
    """Copies of an optimizer's lists and dicts; another thread may change the originals."""
    check_containers(groups, state)
    return (
        [{**group, "params": list(group["params"])} for group in groups],
        {key: dict(own) if is_plain_dict(own) else own for key, own in state.copy().items()},
    )


def is_plain_dict(own: object) -> bool:
    """Whether its class has dict's own access: the native watch (csrc/watch) uses no other."""
    return isinstance(own, dict) and type(own).__getitem__ is dict.__getitem__


def take_out_options(
    group: Group, where: str, optimizer: str, options: Options, error: type[Exception]
) -> None:
    """Remove options of the whole optimizer from a group: wrappers that pass on their keyword
    arguments put them there. A value other than the optimizer's own is refused.

    In place of a process group a text is left: ZeroRedundancyOptimizer copies the keys of groups
    back into its own, and saves them.
    """
    for name in (OPTION_NAMES - OF_GROUPS) & group.keys():
        value, own = group[name], getattr(options, name)
        if name == "norm_group" and value is not None and value in (own, NOT_PICKLED):
            group[name] = NOT_PICKLED
            continue
        if getattr(options.changed(**{name: value}), name) != own:
            raise error(
                f"{name}={value!r} in {where}: it holds for all groups together, where it is "
                f"{own!r}; take it out of the group, and pass it to the optimizer: "
                f"`{optimizer}(params, {name}={literal(value)})`"
            )
        del group[name]


def refuse_differentiable(group: dict[str, Any], label: str) -> None:
    if group.get("differentiable"):
        raise RuntimeError(
            f"{label}: differentiable=True is not supported: the fused step is not recorded by "
            "autograd; set `differentiable=False`, or use torch.optim for what has to be recorded"
        )


def refuse_duplicates(group: dict[str, Any], where: str) -> None:
    """torch only warns, and the first step would refuse the second row of a parameter."""
    params = group.get("params")
    if params is None or isinstance(params, (Tensor, set)):  # a set is refused by torch
        return
    group["params"] = params = list(params)
    first: dict[int, int] = {}
    for i, entry in enumerate(params):
        param = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        earlier = first.setdefault(id(param), i)
        if earlier != i:
            of_named = "{id(p): (name, p) for name, p in params}.values()"
            once = "dict.fromkeys(params)" if param is entry else of_named
            raise ValueError(
                f"param {i} of {where} is param {earlier} again; list each parameter "
                f"once: `params = list({once})`"
            )
