"""The declaration of a rule: its kernels' options, its states, and its formula in plain torch."""

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
DEVICE_NUMBERS = 4  # at most so many numbers of a group, the first, may be on the device
Group = dict[str, Any]

# States of the optimizers of torch and of bitsandbytes. A checkpoint that has one of them in place
# of a rule's own states is another rule's, whatever the value.
OF_SOME_RULE = frozenset(
    ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg")
    + ("grad_avg", "acc_delta", "sum", "prev", "ax", "state1", "state2")
)
# States of optimizers for which torch keeps no count: if one exists, the first step is past.
UNCOUNTED: set[str] = set()
# States that a parameter may lack although it has others: they then start as zero.
STARTS_LATER: set[str] = set()
# States that are never below zero.
POSITIVE: set[str] = set()
# States that are a maximum over steps.
RATCHETS: set[str] = set()
# By the states of a rule: see Rule.not_beside.
NOT_BESIDE: dict[tuple[str, ...], tuple[str, ...]] = {}


@dataclass(frozen=True)
class State:
    """One tensor like the parameter.

    Args:
        name: torch's name.
        when: an option of the group; if it is zero or False, there is no such state.
        absent: the value that a kernel reads in place of an absent state.
        starts_later: a parameter may lack it although it has other states, and then gets zeros.
        uncounted: torch keeps no step count with it.
        positive: it is never below zero.
        ratchets: it is a maximum over steps, so it would keep whatever was rounded up.
    """

    name: str
    when: str | None = None
    absent: float = 0.0
    starts_later: bool = False
    uncounted: bool = False
    positive: bool = False
    ratchets: bool = False

    def __post_init__(self) -> None:
        if self.starts_later:
            STARTS_LATER.add(self.name)
        if self.uncounted:
            UNCOUNTED.add(self.name)
        if self.positive:
            POSITIVE.add(self.name)
        if self.ratchets:
            RATCHETS.add(self.name)


# A rule in plain torch: parameter, gradient, states (changed in place), group, number of the step
# -> the new parameter. All of one dtype, fp32 or fp64.
Reference = Callable[[Tensor, Tensor, Sequence[Tensor], Group, int], Tensor]


@dataclass(frozen=True)
class Rule:
    """The one declaration of a rule; names in C++ and Triton are compared with it.

    Args:
        name: also that of the files in ``csrc/rules`` and ``triton_kernels/rules``.
        numbers: options of a group that are numbers, apart from ``lr`` and ``weight_decay``. A pair
            is given with the kernels' names of both: ``("betas", "beta1", "beta2")``.
        flags: options that are true or false, apart from the two that every rule has.
        states: in the order of the kernels; those with ``when`` come last.
        hyper: names of the fp32 numbers that ``prepare`` computes for the kernels.
        reference: the rule in plain torch.
        not_beside: states of other rules that also have every state of this one. A parameter with
            one of them belongs to another rule.
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
        """The fewest states that GPU kernels are compiled for; one of them may be absent."""
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
        """Fields of the kernels' Options in order, and their ``struct`` formats."""
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
        """The number of states, the first ones, that every parameter has."""
        return sum(state.when is None for state in self.states)

    @property
    def row_step_bytes(self) -> int:
        """``RowStep`` of csrc/rules/common.h: hyper and count, in units of 32 bytes."""
        return -(-4 * (len(self.hyper) + 1) // 32) * 32

    def values(self) -> Callable[[Group], tuple[Any, ...]]:
        """A function that reads from a group the kernels' options, in the order of ``options``.

        It raises ``TypeError`` for a pair that is none, ``KeyError`` for an option that is missing.
        """
        numbers, flags = self.number_keys, self.flag_keys  # both begin with the common two
        values_of = itemgetter(*numbers[:2], *flags[:2], *numbers[2:], *flags[2:])
        pairs = [4 + i for i, each in enumerate(self.numbers) if not isinstance(each, str)]
        pairs.reverse()  # so that earlier indices stay valid

        def read(group: Group) -> tuple[Any, ...]:
            values: tuple[Any, ...] = values_of(group)
            for i in pairs:
                pair = values[i]
                if type(pair) is not tuple and type(pair) is not list and not is_pair(pair):
                    raise TypeError(pair)  # a dict's keys or a set's members would be unpacked
                values = (*values[:i], *pair, *values[i + 1 :])
            return values

        return read

    def state_names(self) -> Callable[[Group], tuple[str, ...]]:
        """A function that names the states of a group's parameters, in the order of the kernels."""
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
