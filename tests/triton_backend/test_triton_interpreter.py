"""What only the interpreter shows of the Triton kernels: orders of programs, whose memory they
touch, and the functions of the words one by one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter
from cases import CHUNK, FULL_CASES, OptimizerCase
from gpu_helpers import runners
from gpu_twins import Twins, grads_like, shifted
from harness import randn
from torch import Tensor
from triton_interpreter import BLOCK, Interpreter
from triton_memory import Memory

interpreter = runners("interpreter")

# ---- grids --------------------------------------------------------------------------------------


def backwards(n: int) -> Sequence[int]:
    return range(n)[::-1]


def from_the_middle(n: int) -> Sequence[int]:
    return [*range(n // 2, n), *range(n // 2)]


GRIDS = [(1, backwards), (2, range), (7, from_the_middle)]
ORDERS = ["backwards", "forwards", "from_the_middle"]


@pytest.mark.parametrize(("case", "grid"), list(zip(FULL_CASES, GRIDS, strict=True)), ids=ORDERS)
def test_grid_and_order_leave_no_trace(
    interpreter: Interpreter, case: OptimizerCase, grid: tuple[int, Callable[[int], Sequence[int]]]
) -> None:
    interpreter.programs, interpreter.order = grid
    lengths = [0, 1, 300, BLOCK + 9, CHUNK + 1, 26, 3]  # seven chunks
    dtypes = itertools.cycle((torch.float32, torch.bfloat16))
    twins = Twins.of(case, [randn(n, n, next(dtypes)) for n in lengths])
    twins.run(steps=3)
    grids = [n for name, n in interpreter.launched if not name.startswith("Memcpy")]
    assert grids == [interpreter.programs, 7] * 3


# ---- memory -------------------------------------------------------------------------------------


def tensors_of(twins: Twins) -> list[Tensor]:
    """All that the kernels of ours may touch."""
    plan = twins.opt._shared.plan
    own = [twins.opt._shared.scalars, *twins.params]
    own += [p.grad for p in twins.params if p.grad is not None]
    own += [t for p in twins.params for t in twins.opt.state.get(p, {}).values()]
    own += [row.dense for row in plan.rows] + list(plan._staged_grads.values())
    own += [number for part in plan.parts for number in part._kept if number is not None]
    return own + [t for part in plan.parts for t in (part.scalars, *part.tensors.values())]


@pytest.mark.parametrize("offset", [0, 3])
def test_memory_of_others(interpreter: Interpreter, offset: int) -> None:
    """Neither read nor written, also by elements that a mask should have excluded."""
    lengths = [1, 255, BLOCK + 257, 0, 511]
    dtypes = itertools.cycle((torch.float32, torch.float16)[:: -1 if offset else 1])
    for case, dtype in zip(FULL_CASES, dtypes, strict=False):
        twins = Twins.of(case, [shifted(randn(n, n, dtype), offset) for n in lengths])
        for step in range(2):
            grads = [shifted(grad, offset) for grad in grads_like(twins.params, step)]
            twins.give([*grads[:-1], grads[-1] if step == 0 else None])
            interpreter.memory = Memory(tensors_of(twins)) if step else None
            twins.step()
            interpreter.memory = None
            twins.check()


def test_the_watch_over_memory_sees(interpreter: Interpreter) -> None:
    twins = Twins.of_lengths(FULL_CASES[0], [5, 300])
    twins.run(steps=1)
    for hidden in (twins.params[1], twins.opt.state[twins.params[0]]["exp_avg"]):
        tensors = [t for t in tensors_of(twins) if t.data_ptr() != hidden.data_ptr()]
        interpreter.memory = Memory([*tensors, hidden.detach()[:-1]])
        with pytest.raises(Exception, match="touches what is not its own"):
            twins.opt.step()


# ---- words --------------------------------------------------------------------------------------

DIGITS, INF_CHUNKS, NAN_CHUNKS, SLOTS = 20, 20, 21, 32  # csrc/words.h; lanes of a block


def in_words(function: str, *arguments: Any) -> Any:
    return triton_interpreter.call(getattr(triton_interpreter.part("words"), function), *arguments)


def value_of(words: list[int]) -> Fraction:
    """Digit d counts 2^(32 d - 352)."""
    return sum(word * Fraction(2) ** (32 * d - 352) for d, word in enumerate(words[:DIGITS]))


def some_words() -> list[list[int]]:
    """Single partials, ties of the rounding, chains of carries, and as many as fit into a word."""
    rng = random.Random(0)
    pieces = [1, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**62 + 1]
    found = []
    for _ in range(100):
        words = [0] * SLOTS
        for _ in range(rng.choice([1, 2, 5, 20])):
            piece = rng.choice([*pieces, rng.getrandbits(8), rng.getrandbits(40)])
            at = rng.randrange(DIGITS)
            words[at] = min(words[at] + piece, 2**63 - 1)
        for d in range(rng.choice([0, 0, 3, DIGITS])):
            words[d] = 2**32 - 1
        found.append(words)
    # The middle of two doubles, of which the lower is even or odd, and just above the middle.
    for odd, below, place, shift in itertools.product((0, 1), (0, 1), (0, 4, 5), (0, 7)):
        tie = [0] * SLOTS
        tie[6], tie[7] = ((odd << 11) | 2**10) >> shift, 2 ** (31 - shift)
        tie[place] += below
        found.append(tie)
    return [[0] * SLOTS, *found]


def test_the_sum_is_rounded_once() -> None:
    for words in some_words():
        block = np.array(words, np.int64)
        assert in_words("sum_of_squares", block).item() == float(value_of(words))
    for slot, expected in ((INF_CHUNKS, "inf"), (NAN_CHUNKS, "nan")):
        block[slot] = 1
        assert repr(in_words("sum_of_squares", block).item()) == expected


def test_a_partial_is_added_exactly() -> None:
    sums = [1.0, 2.0**-80, 1 + 2.0**-23, 3.4e38, 0.7, 2.0**-126]
    words = [0] * SLOTS
    exact = Fraction(0)
    for k, (sum, exponent) in enumerate(itertools.product(sums, range(-195, 142, 7))):
        block = np.array(words, np.int64)
        partial = np.float32(sum), np.int32(exponent)
        words = in_words("with_partial", block, *partial, np.bool_(True)).tolist()
        assert in_words("with_partial", block, *partial, np.bool_(False)).tolist() == block.tolist()
        exact += Fraction(float(np.float32(sum))) * Fraction(2) ** exponent
        assert value_of(words) == exact and words[DIGITS:] == [0] * (SLOTS - DIGITS), k
    block = np.array(words, np.int64)
    zero = np.float32(0), np.int32(0), np.bool_(True)
    assert in_words("with_partial", block, *zero).tolist() == words
    bad = ((math.inf, INF_CHUNKS), (math.nan, NAN_CHUNKS), (-math.nan, NAN_CHUNKS))
    for (value, slot), counted in itertools.product(bad, (True, False)):
        partial = np.float32(value), np.int32(0), np.bool_(counted)
        added = in_words("with_partial", block, *partial) - block
        assert added.tolist() == [int(s == slot) for s in range(SLOTS)]
