"""The options table: the options that kernels read, a line of 64 bytes for each group."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor

from ..options import OF_GROUPS, OPTION_NAMES, flag, number
from ..rules.declaration import DEVICE_NUMBERS, OPTIONS_BYTES, Group, Rule

# Stands in the table for a number that is on the device. It is a NaN with bits that no number has,
# so that the table differs once it has the number itself again.
ON_DEVICE: float = struct.unpack("=d", struct.pack("=Q", 0x7FF8_0000_0F05_ED00))[0]
_DEVICE_DTYPES = (torch.float32, torch.float64)

_ONLY_WHOLE = OPTION_NAMES - OF_GROUPS  # options that a group may not have
_NUMBER = struct.Struct("=d")

# Options that the user keeps on the device: index of the double in the table, and tensor.
DeviceNumbers = list[tuple[int, Tensor]]


class Line:
    """Reads and writes one group's Options; prepared once for a rule."""

    def __init__(self, rule: Rule) -> None:
        self.values, self.state_names = rule.values(), rule.state_names()
        self.pack_into = rule.table.pack_into
        kinds = tuple(rule.options.values())
        self.flags = {i for i, kind in enumerate(kinds) if kind == "q"}
        self.on_device = [i for i in range(len(kinds)) if i not in self.flags][:DEVICE_NUMBERS]
        # Types of a group's values that can be packed without conversion: floats, ints and bools.
        self.plain: set[tuple[type, ...]] = set()

    def convert(
        self, values: tuple[Any, ...], stays: Callable[[Tensor], bool]
    ) -> tuple[tuple[float, ...], dict[int, Tensor]]:
        """Values as numbers, zero for those that stay on the device; and the latter by index.

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
        stays: whether the kernels read a tensor on its device, so that the host need not wait.
        check: raises if the group with that index is wrong, and names the option.
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
        if isnan(sum(values)) or group.get("differentiable") or not _ONLY_WHOLE.isdisjoint(group):
            check(offset // OPTIONS_BYTES, group)
        offset += OPTIONS_BYTES
    return table, device_numbers
