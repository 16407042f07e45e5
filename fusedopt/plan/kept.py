"""Which precision the states and masters of a group get: read from its options, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import STATE_DTYPES, Options, invalid
from ..rules.declaration import RATCHETS, Group, Rule
from .checks import served_params
from .plan import HALF_DTYPES, Kept

STATE_DTYPE = "state_dtype"


def kept_of(
    rule: Rule, names: Callable[[Group], tuple[str, ...]], options: Options, group: Group
) -> Kept:
    """How the states of the group's parameters are kept.

    Raises:
        RuntimeError: its ``state_dtype`` has no such state or no such form, or does not go with
            ``amsgrad=True``.
    """
    own = names(group)
    wish = group.get(STATE_DTYPE, options.state_dtype)
    if wish is None:
        return Kept(own, (None,) * len(own))
    check_state_dtype(rule, wish, RuntimeError)
    forms = tuple(wish.get(name) if isinstance(wish, dict) else wish for name in own)
    if "8bit" in forms and not RATCHETS.isdisjoint(own):
        raise RuntimeError(
            f"Invalid state_dtype value: {wish!r} with amsgrad=True, whose maximum would keep "
            "every second moment that was rounded up; use 16 bits, "
            "`optimizer.state_dtype = 'bf16'`, or no maximum: `amsgrad=False`"
        )
    return Kept(own, tuple(None if form == "fp32" else form for form in forms))


def check_state_dtype(rule: Rule, wish: Any, error: type[Exception]) -> None:
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


def check_precision(rule: Rule, groups: Sequence[Group], options: Options) -> None:
    """Refuse what cannot be kept as asked, given the dtypes that the parameters have now.

    Raises:
        ValueError: the message names the argument, its value and the remedy.
    """
    params = list(served_params(list(groups)))
    for group in groups:
        check_state_dtype(rule, group.get(STATE_DTYPE, options.state_dtype), ValueError)
    wish = options.master_weights
    if isinstance(wish, str) and params and not any(p.dtype in HALF_DTYPES for p in params):
        raise invalid(
            "master_weights",
            wish,
            "no parameter is fp16 or bf16; convert them before: `model.bfloat16()`, or use None",
        )
    if wish in ("remainder8", "dither") and any(p.dtype == torch.float16 for p in params):
        raise invalid("master_weights", wish, "some parameters are fp16; use 'remainder'")
    doubles = [p for group in groups for p in _narrow(group, options) if p.dtype == torch.float64]
    if doubles:
        wish = options.state_dtype
        raise invalid(STATE_DTYPE, wish, "some parameters are float64; use None for their group")


def _narrow(group: Group, options: Options) -> list[Tensor]:
    wish = group.get(STATE_DTYPE, options.state_dtype)
    return [] if wish is None else list(served_params([group]))
