"""The options table: what the kernels read of the param groups, 64 bytes each (csrc/rules.h)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor

from ..options import OPTION_NAMES, flag, number
from .plan import OPTIONS_BYTES, Group

# Stands in the table for a number that is on the device: a NaN that nobody else uses, so that a
# table which holds a number again differs from it.
ON_DEVICE: float = struct.unpack("=d", struct.pack("=Q", 0x7FF8_0000_0F05_ED00))[0]
_DEVICE_NUMBERS = 4  # so many of a group may be there: kDeviceNumbers (csrc/cuda/step.h)
_DEVICE_DTYPES = (torch.float32, torch.float64)

_NUMBER = struct.Struct("=d")
_PLAIN = frozenset({float, int})
_FLAGS = frozenset({True, False})

# What the kernels know of a group: numbers and flags, in the order of the rule's Options.
KernelOptions = tuple[tuple[Any, ...], tuple[Any, ...]]
# Options that the user keeps on the device: which double of the table, and one element.
DeviceNumbers = list[tuple[int, Tensor]]


def pack(
    groups: Sequence[Group],
    options_of: Callable[[Group], KernelOptions],
    layout: struct.Struct,
    stays: Callable[[Tensor], bool],
    check: Callable[[int, Group], None],
) -> tuple[bytearray, DeviceNumbers]:
    """The table of one step.

    Args:
        groups: copies of ``optimizer.param_groups``.
        options_of: what the kernels know of a group.
        layout: of the rule's Options.
        stays: whether the kernels read a tensor where it is, so that nobody waits for its value.
        check: refuses the group of an index by name, where something is wrong with it.
    """
    table = bytearray(OPTIONS_BYTES * len(groups))
    device_numbers: DeviceNumbers = []
    offset = 0
    for group in groups:
        try:
            numbers, flags = options_of(group)
            if _PLAIN.issuperset(map(type, numbers)) and _FLAGS.issuperset(flags):
                try:
                    layout.pack_into(table, offset, *numbers, *flags)
                except struct.error:  # equal to True or False, and neither a bool nor an int
                    layout.pack_into(table, offset, *numbers, *map(bool, flags))
            else:
                there = _device_numbers(numbers, stays)
                numbers = tuple(0.0 if i in there else number(n) for i, n in enumerate(numbers))
                layout.pack_into(table, offset, *numbers, *map(flag, flags))
                for i, value in there.items():
                    _NUMBER.pack_into(table, offset + 8 * i, ON_DEVICE)
                    device_numbers.append((offset // 8 + i, value))
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
