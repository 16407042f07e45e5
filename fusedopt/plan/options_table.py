"""The options table: what the kernels read of the param groups, a line of 64 bytes each."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor

from ..options import OPTION_NAMES, flag, number
from ..rules.declaration import OPTIONS_BYTES, Group, Rule

# Stands in the table for a number that is on the device: a NaN that nobody else uses, so that a
# table which holds a number again differs from it.
ON_DEVICE: float = struct.unpack("=d", struct.pack("=Q", 0x7FF8_0000_0F05_ED00))[0]
_DEVICE_NUMBERS = 4  # so many of a group may be there: DEVICE_NUMBERS of backends/records.py
_DEVICE_DTYPES = (torch.float32, torch.float64)

_NUMBER = struct.Struct("=d")
_PLAIN = frozenset({float, int})
_FLAGS = frozenset({True, False})

_COMMON = 2  # numbers, and then as many flags, come first in every rule's Options
# Options that the user keeps on the device: which double of the table, and one element.
DeviceNumbers = list[tuple[int, Tensor]]


class Line:
    """How one group's Options of a rule are read and written."""

    def __init__(self, rule: Rule) -> None:
        self.values = rule.values()
        self._pack_into = rule.table.pack_into

    def pack_into(
        self, table: bytearray, offset: int, numbers: Sequence[float], flags: Sequence[Any]
    ) -> None:
        common = (*numbers[:_COMMON], *flags[:_COMMON])
        self._pack_into(table, offset, *common, *numbers[_COMMON:], *flags[_COMMON:])


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
        try:
            numbers, flags = line.values(group)
            if _PLAIN.issuperset(map(type, numbers)) and _FLAGS.issuperset(flags):
                try:
                    line.pack_into(table, offset, numbers, flags)
                except struct.error:  # equal to True or False, and neither a bool nor an int
                    line.pack_into(table, offset, numbers, tuple(map(bool, flags)))
            else:
                there = _device_numbers(numbers, stays)
                numbers = tuple(0.0 if i in there else number(n) for i, n in enumerate(numbers))
                line.pack_into(table, offset, numbers, tuple(map(flag, flags)))
                for i, value in there.items():
                    field = offset // 8 + (i if i < _COMMON else i + _COMMON)
                    _NUMBER.pack_into(table, 8 * field, ON_DEVICE)
                    device_numbers.append((field, value))
        except Exception:
            check(offset // OPTIONS_BYTES, group)
            raise
        if isnan(sum(numbers)) or group.get("differentiable") or not OPTION_NAMES.isdisjoint(group):
            check(offset // OPTIONS_BYTES, group)
        offset += OPTIONS_BYTES
    return table, device_numbers


def _device_numbers(numbers: Sequence[Any], stays: Callable[[Tensor], bool]) -> dict[int, Tensor]:
    found = {}
    for i, value in enumerate(numbers[:_DEVICE_NUMBERS]):
        if isinstance(value, Tensor) and stays(value):
            if value.numel() != 1:
                raise TypeError(value.shape)  # refused by name in a moment
            found[i] = value if value.dtype in _DEVICE_DTYPES else value.double()
    return found
