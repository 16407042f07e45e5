"""What a rule is: the options that its kernels read, the states of a parameter, and plain torch."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor

from ..options import is_pair

OPTIONS_BYTES = 64  # of one param group, for every rule (csrc/rules/common.h)
DEVICE_NUMBERS = 4  # numbers of a group that may be on the device, at most: the first ones
Group = dict[str, Any]

# States of the optimizers of torch and of bitsandbytes. Who finds one of them instead of its own
# has the checkpoint of another rule, whatever is in it.
OF_SOME_RULE = frozenset(
    ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg")
    + ("grad_avg", "acc_delta", "sum", "prev", "ax", "state1", "state2")
)
# States beside which torch keeps no count: one is there, so the first step is past.
UNCOUNTED: set[str] = set()
# States of which a parameter may lack one beside others: it then starts as zero.
STARTS_LATER: set[str] = set()
# By the states of a rule: see Rule.not_beside.
NOT_BESIDE: dict[tuple[str, ...], tuple[str, ...]] = {}


@dataclass(frozen=True)
class State:
    """One tensor like the parameter.

    Args:
        name: torch's.
        when: an option of the group; without it, or where it is zero, there is no such state.
        absent: what a kernel reads in place of one that is not there.
        starts_later: a parameter may lack it beside its other states, and then gets zeros.
        uncounted: torch keeps no count beside it.
    """

    name: str
    when: str | None = None
    absent: float = 0.0
    starts_later: bool = False
    uncounted: bool = False

    def __post_init__(self) -> None:
        if self.starts_later:
            STARTS_LATER.add(self.name)
        if self.uncounted:
            UNCOUNTED.add(self.name)


# Of a rule in plain torch: parameter, gradient, states (changed in place), group, number of the
# step -> the new parameter. All of one dtype, fp32 or fp64.
Reference = Callable[[Tensor, Tensor, Sequence[Tensor], Group, int], Tensor]


@dataclass(frozen=True)
class Rule:
    """A rule is declared once; its C++ and Triton texts are compared with this by name.

    Args:
        name: of the files in ``csrc/rules`` and ``triton_kernels/rules``, too.
        numbers: options of a group that are numbers, apart from ``lr`` and ``weight_decay``. A pair
            of them has the names of both in the kernels: ``("betas", "beta1", "beta2")``.
        flags: those that are true or false, apart from the common two.
        states: in the order in which the kernels know them; those with ``when`` come last.
        hyper: what ``prepare`` computes for the kernels, fp32 numbers.
        reference: the rule in plain torch.
        not_beside: states of other rules that have all of this one's. A parameter that has one of
            them is another rule's.
    """

    name: str
    numbers: tuple[str | tuple[str, str, str], ...]
    flags: tuple[str, ...]
    states: tuple[State, ...]
    hyper: tuple[str, ...]
    reference: Reference
    not_beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.not_beside:
            NOT_BESIDE[tuple(state.name for state in self.states)] = self.not_beside

    @property
    def fewest_states(self) -> int:
        """GPU kernels are compiled for so many states at least, and may find one absent."""
        return max(self.n_always, 1)

    @property
    def number_keys(self) -> tuple[str, ...]:
        """Keys of a group that are a number, or a pair of them."""
        own = (each if isinstance(each, str) else each[0] for each in self.numbers)
        return ("lr", "weight_decay", *own)

    @property
    def pair_keys(self) -> tuple[str, ...]:
        return tuple(each[0] for each in self.numbers if not isinstance(each, str))

    @property
    def flag_keys(self) -> tuple[str, ...]:
        return ("decoupled_weight_decay", "maximize", *self.flags)

    @property
    def options(self) -> dict[str, str]:
        """Fields of the kernels' Options in order, and their kinds in the words of ``struct``."""
        names: list[str] = []
        for each in self.numbers:
            names += [each] if isinstance(each, str) else each[1:]
        return {
            **{"lr": "d", "weight_decay": "d", "decoupled": "q", "maximize": "q"},
            **dict.fromkeys(names, "d"),
            **dict.fromkeys(self.flags, "q"),
        }

    @property
    def table(self) -> struct.Struct:
        """A group's Options in memory."""
        fields = "".join(self.options.values())
        return struct.Struct(f"={fields}{OPTIONS_BYTES - 8 * len(fields)}x")

    @property
    def n_always(self) -> int:
        """So many states, the first ones, every parameter has."""
        return sum(state.when is None for state in self.states)

    @property
    def row_step_bytes(self) -> int:
        """``RowStep`` of csrc/rules/common.h: hyper and count, in units of 32 bytes."""
        return -(-4 * (len(self.hyper) + 1) // 32) * 32

    def values(self) -> Callable[[Group], tuple[Any, ...]]:
        """What the kernels know of a group, in the order of ``options``.

        The function that it returns raises ``TypeError`` where a pair is none, and ``KeyError``.
        """
        numbers, flags = self.number_keys, self.flag_keys  # the common ones of both come first
        values_of = itemgetter(*numbers[:2], *flags[:2], *numbers[2:], *flags[2:])
        pairs = [4 + i for i, each in enumerate(self.numbers) if not isinstance(each, str)]
        pairs.reverse()  # so that the places of those that are left stay as they are

        def read(group: Group) -> tuple[Any, ...]:
            values: tuple[Any, ...] = values_of(group)
            for i in pairs:
                pair = values[i]
                if type(pair) is not tuple and type(pair) is not list and not is_pair(pair):
                    raise TypeError(pair)  # would be unpacked: the keys of a dict, a set's members
                values = (*values[:i], *pair, *values[i + 1 :])
            return values

        return read

    def state_names(self) -> Callable[[Group], tuple[str, ...]]:
        """States of a parameter in a group, in the order in which the kernels know them."""
        always = tuple(state.name for state in self.states if state.when is None)
        others = [(state.name, state.when) for state in self.states if state.when is not None]

        def names(group: Group) -> tuple[str, ...]:
            found = always
            for name, when in others:
                value = group[when]
                if value is True or (value is not False and float(value) != 0.0):
                    found = (*found, name)
            return found

        return names


def declared(name: str) -> Rule:
    """The rule of ``fusedopt/rules/<name>.py``."""
    rule: Rule = importlib.import_module(f".{name}", __package__).RULE
    return rule
