"""The options table: what the kernels read of the param groups, a line of 64 bytes each."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor

from ..options import OPTION_NAMES, flag, number
from ..rules.declaration import DEVICE_NUMBERS, OPTIONS_BYTES, Group, Rule

# Stands in the table for a number that is on the device: a NaN that nobody else uses, so that a
# table which holds a number again differs from it.
ON_DEVICE: float = struct.unpack("=d", struct.pack("=Q", 0x7FF8_0000_0F05_ED00))[0]
_DEVICE_DTYPES = (torch.float32, torch.float64)

_NUMBER = struct.Struct("=d")

# Options that the user keeps on the device: which double of the table, and one element.
DeviceNumbers = list[tuple[int, Tensor]]


class Line:
    """How one group's Options of a rule are read and written, worked out once."""

    def __init__(self, rule: Rule) -> None:
        self.values, self.state_names = rule.values(), rule.state_names()
        self.pack_into = rule.table.pack_into
        kinds = tuple(rule.options.values())
        self.flags = {i for i, kind in enumerate(kinds) if kind == "q"}
        self.on_device = [i for i in range(len(kinds)) if i not in self.flags][:DEVICE_NUMBERS]
        # Types of values that can be packed as they are: floats, ints and bools in their places.
        self.plain: set[tuple[type, ...]] = set()

    def convert(
        self, values: tuple[Any, ...], stays: Callable[[Tensor], bool]
    ) -> tuple[tuple[float, ...], dict[int, Tensor]]:
        """Values of any types as numbers; zero for those that stay on the device, which come too.

        Raises:
            TypeError, ValueError, OverflowError, RuntimeError: one is no number, or no flag.
        """
        types = (*map(type, values),)
        there = {i: v for i in self.on_device if isinstance(v := values[i], Tensor) and stays(v)}
        for i, value in there.items():
            if value.numel() != 1:
                raise TypeError(value.shape)
            there[i] = value if value.dtype in _DEVICE_DTYPES else value.double()
        if all(t is bool if i in self.flags else t in (float, int) for i, t in enumerate(types)):
            self.plain.add(types)
        numbers = tuple(
            flag(v) if i in self.flags else 0.0 if i in there else number(v)
            for i, v in enumerate(values)
        )
        return numbers, there


def pack(
    groups: Sequence[Group],
    line: Line,
    stays: Callable[[Tensor], bool],
    check: Callable[[int, Group], None],
) -> tuple[bytearray, DeviceNumbers]:
    """The table of one step.

    Args:
        groups: copies of ``optimizer.param_groups``.
        line: of the rule.
        stays: whether the kernels read a tensor where it is, so that nobody waits for its value.
        check: refuses the group of an index by name, where something is wrong with it.
    """
    table = bytearray(OPTIONS_BYTES * len(groups))
    device_numbers: DeviceNumbers = []
    offset = 0
    for group in groups:
        there = None
        try:
            values = line.values(group)
            # tuple(map()) would fill the free list of tuples
            if (*map(type, values),) not in line.plain:
                values, there = line.convert(values, stays)
            line.pack_into(table, offset, *values)
        except Exception:
            check(offset // OPTIONS_BYTES, group)
            raise
        if there:
            for i, value in there.items():
                _NUMBER.pack_into(table, offset + 8 * i, ON_DEVICE)
                device_numbers.append((offset // 8 + i, value))
        if isnan(sum(values)) or group.get("differentiable") or not OPTION_NAMES.isdisjoint(group):
            check(offset // OPTIONS_BYTES, group)
        offset += OPTIONS_BYTES
    return table, device_numbers
