"""Exact sums of squares as Python's whole numbers: ``norm_bits="exact"`` in the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .records import DIGITS, LOWEST

PIECE = 1 << 20  # elements; sums of their products fit in 64 bits
PART = 18  # bits; the 53 of an fp64 number are three parts
SMALLEST = -1073  # exponent of the smallest fp64 number by frexp
LARGEST_SUM = 2.0**287  # that words can hold; only gradients in fp64 may exceed it
UNIT = 2 * (SMALLEST - 53)  # sums are multiples of 2^UNIT, which even squares of fp64 numbers are


def sum_of_squares(x: Tensor) -> int:
    """In units of 2^UNIT; elements that are not finite count as zero."""
    return sum(_sum_of_piece(piece) for piece in torch.split(x.reshape(-1).double(), PIECE))


def _sum_of_piece(x: Tensor) -> int:
    fractions, exponents = torch.frexp(torch.where(x.isfinite(), x, 0.0).abs())
    wholes = (fractions * 2.0**53).to(torch.int64)  # x * 2^(53 - exponent)
    mask = (1 << PART) - 1
    a, b, c = wholes >> 2 * PART, wholes >> PART & mask, wholes & mask
    products = torch.stack([c * c, 2 * b * c, 2 * a * c + b * b, 2 * a * b, a * a], 1)
    rows, at = torch.unique(exponents, return_inverse=True)
    sums = torch.zeros(len(rows), 5, dtype=torch.int64, device=x.device).index_add_(0, at, products)
    return sum(
        column << 2 * (exponent - SMALLEST) + PART * i
        for exponent, row in zip(rows.tolist(), sums.tolist(), strict=True)
        for i, column in enumerate(row)
    )


def root_of(total: int) -> float:
    """The square root of ``sum_of_squares``, which is rounded to fp64 first. Of any size: powers of
    four are taken out before, and put in again after."""
    twos = (total.bit_length() + UNIT) // 2
    root = math.sqrt(total / (1 << 2 * twos - UNIT))
    try:
        return math.ldexp(root, twos)
    except OverflowError:
        return math.inf


def digits_of(total: int) -> list[int]:
    """The digits of csrc/words.h. Squares of fp64 numbers may have bits below the lowest digit,
    which are left out, or above the highest; those of fp32 numbers have none."""
    whole = min(total >> LOWEST - UNIT, int(LARGEST_SUM * 2.0**-LOWEST))
    return [whole >> 32 * d & 0xFFFFFFFF for d in range(DIGITS)]
