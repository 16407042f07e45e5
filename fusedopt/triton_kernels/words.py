"""The norm as a sum of integers: csrc/words.h in Triton.

The words of a program are one block, with one word in each lane. Integer addition has no order, so
programs add their words to memory in any order.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fusedopt.backends import records

WORDS = tl.constexpr(records.WORDS)
SLOTS = tl.constexpr(32)  # WORDS, rounded up to a power of two
DIGITS = tl.constexpr(records.DIGITS)
LOWEST = tl.constexpr(records.LOWEST)  # digit d counts 2^(32 d + LOWEST)
INF_CHUNKS = tl.constexpr(records.DIGITS)
NAN_CHUNKS = tl.constexpr(records.DIGITS + 1)
LARGEST = tl.constexpr(records.DIGITS + 2)
VOTES = tl.constexpr(records.DIGITS + 3)
FOUND_INF = tl.constexpr(records.FOUND_INF)
BAD_SCALE = tl.constexpr(records.BAD_SCALE)
ABORT = tl.constexpr(records.ABORT)
VOTE_MASK = tl.constexpr((1 << records.VOTE_BITS) - 1)
FINGERPRINTS = tl.constexpr(1 << 32)


@triton.jit
def no_words():
    return tl.full([SLOTS], 0, tl.int64)


@triton.jit
def addend_of(sum, exponent):
    """The numbers that a partial, ``sum * 2^exponent``, adds to words[at] and words[at + 1]."""
    bits = sum.to(tl.int32, bitcast=True)
    lowest_bit = (bits >> 23) + exponent - 150 - LOWEST
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64)
    shifted = mantissa << (lowest_bit & 31).to(tl.int64)
    at, low, high = lowest_bit >> 5, shifted & 0xFFFFFFFF, shifted >> 32
    if (sum == 0.0) | (sum - sum != 0.0):
        at = tl.where(sum != sum, NAN_CHUNKS, INF_CHUNKS)
        low = tl.where(sum == 0.0, 0, 1).to(tl.int64)
        high = low * 0
    return at, low, high


@triton.jit
def with_partial(words, sum, exponent, counted):
    """Of a partial that is not counted only inf and NaN are reported."""
    slot = tl.arange(0, SLOTS)
    at, low, high = addend_of(sum, exponent)
    if (counted == 0) & (at < DIGITS):
        low, high = low * 0, high * 0
    return words + tl.where(slot == at, low, 0) + tl.where(slot == at + 1, high, 0)


@triton.jit
def with_magnitude(words, magnitude):
    bits = magnitude.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(tl.arange(0, SLOTS) == LARGEST, tl.maximum(words, bits), words)


@triton.jit
def combined(a, b):
    """The words of two devices together."""
    return tl.where(tl.arange(0, SLOTS) == LARGEST, tl.maximum(a, b), a + b)


@triton.jit
def voted(votes, about):
    return ((votes // about) & VOTE_MASK) != 0


@triton.jit
def add_words(address, words):
    """By atomics: other programs do the same meanwhile."""
    slot = tl.arange(0, SLOTS)
    pointer = address.to(tl.pointer_type(tl.int64)) + slot
    due = (slot < WORDS) & (words != 0)
    tl.atomic_add(pointer, words, mask=due & (slot != LARGEST), sem="relaxed", scope="gpu")
    tl.atomic_max(pointer, words, mask=due & (slot == LARGEST), sem="relaxed", scope="gpu")


@triton.jit
def load_words(address):
    """Loads bypass L1: other programs have just added to these words."""
    slot = tl.arange(0, SLOTS)
    pointer = address.to(tl.pointer_type(tl.int64)) + slot
    return tl.load(pointer, mask=slot < WORDS, other=0, cache_modifier=".cg")


@triton.jit
def store_words(address, words):
    slot = tl.arange(0, SLOTS)
    tl.store(address.to(tl.pointer_type(tl.int64)) + slot, words, mask=slot < WORDS)


@triton.jit
def word_of(words, at):
    own = tl.where(tl.arange(0, SLOTS) == at, words, 0)
    return tl.sum(own, 0).to(tl.uint64, bitcast=True)


@triton.jit
def mask_of(flags):
    """Flags of the slots as bits of one number."""
    bit = tl.full([SLOTS], 1, tl.int64) << tl.arange(0, SLOTS).to(tl.int64)
    return tl.sum(tl.where(flags, bit, 0), 0)


@triton.jit
def exponent_of(x):
    """The number of the highest bit of a positive integer."""
    return (x.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1023


@triton.jit
def digits_of(words):
    """The digits, each below 2^32 and in its slot.

    First each digit gets the bits above 32 of its lower neighbour. The carries that are left are
    ones. Adding two bit masks propagates them: a bit of ``carrying`` starts a carry, and bits of
    ``full`` pass it on.
    """
    slot = tl.arange(0, SLOTS)
    words = tl.where(slot < DIGITS, words, 0)
    below = tl.gather(words >> 32, tl.maximum(slot - 1, 0), 0)
    sums = (words & 0xFFFFFFFF) + tl.where(slot == 0, 0, below)
    carrying, full = mask_of(sums > 0xFFFFFFFF), mask_of(sums == 0xFFFFFFFF)
    into = (2 * carrying + full) ^ full
    return (sums + ((into >> slot.to(tl.int64)) & 1)) & 0xFFFFFFFF


@triton.jit
def sum_of_squares(words):
    """Rounded to nearest even; inf or NaN where a chunk had one.

    The highest three digits have 65 bits at least. A double keeps 53 of them. Of all lower bits it
    matters only whether they are zero.
    """
    digits = digits_of(words)
    there = mask_of(digits != 0)
    at = exponent_of(tl.maximum(there, 1))
    first, second, third = word_of(digits, at), word_of(digits, at - 1), word_of(digits, at - 2)
    shift = 31 - exponent_of(tl.maximum(first, 1))
    high = ((first << 32) | second) << shift.to(tl.uint64)
    low = third << shift.to(tl.uint64)
    below = there & ((tl.full([], 1, tl.int64) << tl.maximum(at - 2, 0)) - 1)
    sticky = (below != 0) | ((low & 0xFFFFFFFF) != 0)
    kept = high | (low >> 32) | sticky.to(tl.uint64)
    exponent = 32 * (at - 1) + LOWEST - shift
    power = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    sum = kept.to(tl.float64) * power
    sum = tl.where(word_of(words, INF_CHUNKS) != 0, float("inf"), sum)
    return tl.where(word_of(words, NAN_CHUNKS) != 0, float("nan"), sum)
