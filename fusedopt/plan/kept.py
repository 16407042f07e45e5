"""Which precision the states and masters of a group get: read from its options, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from ..options import STATE_DTYPES, Options, invalid
from ..rules.declaration import RATCHETS, Group, Rule
from .checks import served_params
from .plan import HALF_DTYPES, Kept

STATE_DTYPE = "state_dtype"
Names = Callable[[Group], tuple[str, ...]]  # of the states of a group's parameters


def kept_of(
    rule: Rule,
    names: Names,
    options: Options,
    group: Group,
    error: type[Exception] = RuntimeError,
) -> Kept:
    """How the states of the group's parameters are kept.

    Raises:
        error: its ``state_dtype`` has no such state or no such form, or does not go with
            ``amsgrad=True``.
    """
    own = names(group)
    wish = group.get(STATE_DTYPE, options.state_dtype)
    if wish is None:
        return _in_fp32(own)
    _check_state_dtype(rule, wish, error)
    forms = tuple(wish.get(name) if isinstance(wish, dict) else wish for name in own)
    if "8bit" in forms and not RATCHETS.isdisjoint(own):
        raise error(
            f"Invalid state_dtype value: {wish!r} with amsgrad=True, whose maximum would keep "
            "every second moment that was rounded up; use 'bf16', or amsgrad=False"
        )
    return Kept(own, tuple(None if form == "fp32" else form for form in forms))


@cache
def _in_fp32(names: tuple[str, ...]) -> Kept:
    """One object for all steps: new tuples would fill the free lists."""
    return Kept(names, (None,) * len(names))


def _check_state_dtype(rule: Rule, wish: Any, error: type[Exception]) -> None:
    """Refuse a ``state_dtype`` with states that the rule does not have, or unknown forms."""
    known = [state.name for state in rule.states]
    forms = wish if isinstance(wish, dict) else {}
    strange = [name for name in forms if name not in known]
    if strange:
        raise invalid(STATE_DTYPE, wish, f"the states are {', '.join(known)}", error=error)
    for form in forms.values() if isinstance(wish, dict) else (wish,):
        if not (form is None or isinstance(form, str)) or form not in STATE_DTYPES:
            remedy = "use None for fp32, 'bf16', '8bit', or a dict of these by the names of states"
            raise invalid(STATE_DTYPE, wish, remedy, error=error)


def check_precision(
    rule: Rule,
    names: Names,
    options: Options,
    group: Group,
) -> None:
    """Refuse what cannot be kept as asked, given the dtypes that the parameters have now.

    Raises:
        ValueError: the message names the argument, its value and the remedy.
    """
    kept_of(rule, names, options, group, ValueError)
    dtypes = {param.dtype for param in served_params([group])}
    wish = options.master_weights
    if wish in ("remainder8", "dither") and torch.float16 in dtypes:
        raise invalid("master_weights", wish, "some parameters are fp16; use 'remainder'")
    wish = group.get(STATE_DTYPE, options.state_dtype)
    if wish is not None and torch.float64 in dtypes:
        remedy = "some parameters are float64; give their group `'state_dtype': None`"
        raise invalid(STATE_DTYPE, wish, remedy)


def check_masters(groups: Sequence[Group], options: Options) -> None:
    """Refuse a way to keep masters that no parameter has.

    Raises:
        ValueError: the message names the argument, its value and the remedy.
    """
    wish, dtypes = options.master_weights, {p.dtype for p in served_params([*groups])}
    if isinstance(wish, str) and dtypes and dtypes.isdisjoint(HALF_DTYPES):
        remedy = "no parameter is fp16 or bf16; convert them first, `model.bfloat16()`, or use None"
        raise invalid("master_weights", wish, remedy)
