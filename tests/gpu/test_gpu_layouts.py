"""Gradients, params and states wherever they lie in memory: the bits of the CPU backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    CHUNK,
    DTYPE_PAIRS,
    FLOATS,
    FULL_CASES,
    KERNEL_CASES,
    LAYOUT_SHAPE,
    LAYOUTS,
    PLAIN_CASES,
    OptimizerCase,
    parametrize,
)
from gpu_helpers import by_speed, device, moved, runners
from gpu_twins import Twins, grads_like, shifted
from harness import make_param, randn
from tolerances import assert_same_bits

runner = runners()
EVERY_TWO = list(itertools.product(LAYOUTS.values(), repeat=2))  # of a param and of its gradient
PLAIN = LAYOUTS["contiguous"]


@parametrize("case", FULL_CASES)
def test_layouts(case: OptimizerCase) -> None:
    """Of the param, of the gradient, and of both: each is staged on its own."""
    some = [(p, g) for p, g in EVERY_TWO if PLAIN in (p, g) or p is g]
    pairs = by_speed(EVERY_TWO, EVERY_TWO, some)
    for dtypes in by_speed(*[[(torch.float32,), (torch.bfloat16,)]] * 2, [FLOATS]):
        dtype = itertools.cycle(dtypes)
        values = [
            of_param(randn(LAYOUT_SHAPE, k, next(dtype))) for k, (of_param, _) in enumerate(pairs)
        ]
        twins = Twins.of(case, values)
        for step in range(2):
            grads = grads_like(twins.params, step)
            twins.step([of_grad(g) for g, (_, of_grad) in zip(grads, pairs, strict=True)])
            twins.check()


@pytest.mark.parametrize("pairs", [DTYPE_PAIRS[:1], DTYPE_PAIRS], ids=["float32", "every_pair"])
@parametrize("case", KERNEL_CASES)
def test_alignment(case: OptimizerCase, pairs: list[tuple[torch.dtype, torch.dtype]]) -> None:
    """Params and gradients at storage offsets that move against each other, as views of one buffer
    lie, say of a bucket of a data-parallel wrapper."""
    every = [(p, g) for p, g in itertools.product(range(17), repeat=2) if p in (0, 3, 4) or g == 5]
    few = [(p, g) for p, g in every if p < 9 and g < 9]
    fewest = [(0, 0), (1, 3), (8, 8), (3, 0), (4, 3)]
    offsets = by_speed(every, few, fewest)
    lengths = itertools.cycle(by_speed((3, 256, 517, 67), (3, 256, 517), (3, 1100, 3)))
    two = list(itertools.product(offsets, pairs))
    two = by_speed(two, two, list(zip(offsets, itertools.cycle(pairs[::4]), strict=False)))
    own = [(next(lengths), *one) for one in two]
    twins = Twins.of(case, [shifted(randn(n, n, d), p) for n, (p, _), (d, _) in own])
    for step in range(by_speed(2, 2, 1)):
        grads = grads_like(twins.params, step, [d for _, _, (_, d) in own])
        twins.step([shifted(g, at) for g, (_, (_, at), _) in zip(grads, own, strict=True)])
        twins.check()


@parametrize("case", PLAIN_CASES)
@parametrize("dtype", FLOATS)
def test_params_in_one_buffer(case: OptimizerCase, dtype: torch.dtype) -> None:
    """Params that are views of a flat buffer, and nothing between them is touched."""
    buffer = randn(3000, 1, dtype)
    values = [buffer[start : start + n] for start, n in ((1, 17), (19, 1), (23, 700), (731, 2000))]
    whole = make_param(moved(buffer, device()))
    twins = Twins.of(case, values)
    # `moved` gives every view a storage of its own; here they share one
    shared = [whole.detach()[v.storage_offset() :][: v.numel()] for v in values]
    for param, view in zip(twins.params, shared, strict=True):
        param.data = view
    twins.run(steps=2)
    between = torch.ones(3000, dtype=torch.bool)
    for value in values:
        between[value.storage_offset() :][: value.numel()] = False
    assert_same_bits(whole.detach().cpu()[between], buffer[between], "memory between the params")


@parametrize("dtype", FLOATS)
def test_gradient_that_changes_its_layout_and_dtype(dtype: torch.dtype) -> None:
    """Also to what sum().backward() leaves: one element seen many times."""
    order = ["contiguous", "transposed", None, "with_gaps", "expanded", "channels_last"]
    for case in by_speed(FULL_CASES, FULL_CASES, [FULL_CASES[FLOATS.index(dtype)]]):
        twins = Twins.of(case, [randn(LAYOUT_SHAPE, 1, dtype), randn(1400, 2, dtype)])
        for step, layout in enumerate(order):
            grad, other = (randn(p.shape, step + 5, FLOATS[step % 3]) for p in twins.params)
            if layout == "expanded":
                grad = grad[0, 0, 0, 0].expand(LAYOUT_SHAPE)
            elif layout is not None:
                grad = LAYOUTS[layout](grad)
            twins.step([None if layout is None else grad, other.to(FLOATS[step // 2])])
            twins.check()


@parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize("case", FULL_CASES)
def test_states_at_odd_offsets(case: OptimizerCase, dtype: torch.dtype) -> None:
    """A user's own state tensors: not aligned, one at a time and then all."""
    lengths = by_speed([17, CHUNK + 700], [17, CHUNK + 700], [1300, 1100])
    twins = Twins.of_lengths(case, lengths, dtype)
    twins.run(steps=1)
    for step, name in enumerate(sorted(twins.opt.state[twins.params[1]].keys() - {"step"})):
        for optimizer, params in twins.both:
            state = optimizer.state[params[1]]
            buffer = torch.zeros(state[name].numel() + 8, device=params[1].device)
            state[name] = buffer[step + 1 :][: state[name].numel()].copy_(state[name])
        twins.run(steps=1, first=step + 1)
