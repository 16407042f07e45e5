"""``norm_bits="exact"`` on a GPU: the words of the CPU backend, which hold every bit of the sum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import CHUNK, FLOATS, LAYOUT_SHAPE, LAYOUTS, OptimizerCase, parametrize
from gpu_helpers import by_speed, runners
from gpu_twins import Twins, shifted
from harness import randn
from torch import Tensor
from triton_interpreter import BLOCK

runner = runners()

MEASURE = OptimizerCase("exact", "sgd", {"lr": 0.125}, {"max_grad_norm": 2.0, "norm_bits": "exact"})
LIMIT = torch.finfo(torch.float32)


def spread(low: int, high: int) -> Callable[[int], Tensor]:
    """Exponents between the two, in any order."""

    def make(n: int) -> Tensor:
        exponents = torch.randint(low, high, (n,), generator=torch.manual_seed(n))
        return torch.ldexp(randn(n, n).clamp(-1.9, 1.9), exponents)

    return make


NASTY: dict[str, Callable[[int], Tensor]] = {
    "smallest": lambda n: torch.full((n,), 2.0**-149),
    "denormal": lambda n: torch.ldexp(torch.arange(n) % 999 + 1.0, torch.tensor(-149)),
    "largest": lambda n: torch.full((n,), LIMIT.max),
    "all_bits": lambda n: torch.full((n,), 2.0 - 2.0**-23),
    "every_exponent": spread(-149, 127),
    "a_window": spread(-16, 16),
    "two_windows": spread(-40, 0),
    "at_the_bottom": spread(-149, -110),
    "far_apart": lambda n: torch.where(torch.arange(n) % 2 == 0, 2.0**127, 2.0**-149),
    "one_far_below": lambda n: torch.where(torch.arange(n) == n - 1, 2.0**-70, randn(n, n)),
    "one_far_above": lambda n: torch.where(torch.arange(n) == n - 1, 2.0**70, randn(n, n)),
    "falling": lambda n: torch.ldexp(torch.ones(n), 127 - torch.arange(n) % 277),
    "zeros": lambda n: torch.zeros(n),
}


def lengths() -> list[int]:
    every = [0, 1, 5, 257, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 300]
    return by_speed(every, every, [0, 5, BLOCK + 257])


@pytest.mark.parametrize("name", NASTY)
def test_nasty_gradients(name: str) -> None:
    for n in lengths():
        twins = Twins.of(MEASURE, [torch.zeros(n)])
        twins.step([NASTY[name](n)])
        twins.check()


def test_tensors_of_every_size_in_one_list() -> None:
    """The window of one chunk is the first guess for another."""
    own = [make(n) for n, make in zip(itertools.cycle(lengths()), NASTY.values(), strict=False)]
    for order in (1, -1):
        twins = Twins.of(MEASURE, [torch.zeros(g.numel()) for g in own[::order]])
        twins.step(own[::order])
        twins.check()


def scales() -> Iterator[float]:
    yield from by_speed([3.0, 65536.0, 1e-3, 2.0**-100, 7e30, 1e-38], [3.0, 1e-3, 7e30], [3.0])


@parametrize("dtype", FLOATS)
def test_dtypes_and_scales(dtype: torch.dtype) -> None:
    for n, scale in itertools.product(by_speed((3, 700, CHUNK + 9), (700, CHUNK + 9), (700,)),
                                      scales()):  # fmt: skip
        twins = Twins.of(MEASURE, [torch.zeros(n, dtype=dtype), torch.zeros(5, dtype=dtype)])
        grads = [randn(n, n, dtype), randn(5, 5, dtype)]
        twins.step(grads, grad_scale=scale)
        twins.check()
        twins.step([shifted(grad, 3) for grad in grads], grad_scale=scale)  # of any alignment
        twins.check()


def test_layouts() -> None:
    for layout in by_speed([*LAYOUTS], [*LAYOUTS], ["with_gaps"]):
        twins = Twins.of(MEASURE, [torch.zeros(LAYOUT_SHAPE), torch.zeros(7, 30)])
        twins.step([LAYOUTS[layout](randn(LAYOUT_SHAPE, 3)), torch.randn(7, 1).expand(7, 30)])
        twins.check()


def test_pieces_of_any_length() -> None:
    whole = randn(by_speed(3 * CHUNK, 3 * CHUNK, CHUNK) + 100, 4)
    norms = set()
    for size in (len(whole), 5003, by_speed(77, 777, 2048)):
        twins = Twins.of(MEASURE, [torch.zeros(len(piece)) for piece in whole.split(size)])
        twins.step(list(whole.split(size)))
        twins.check()
        norms.add(twins.opt.grad_norm.item())
    assert len(norms) == 1


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_are_counted(bad: float) -> None:
    for n, at in by_speed([(5, 0), (CHUNK + 9, CHUNK)], [(5, 0), (CHUNK + 9, CHUNK)], [(700, 650)]):
        grads = [randn(9, 1), randn(n, n), torch.tensor([math.inf, math.nan])]
        grads[1][at] = bad
        twins = Twins.of(MEASURE, [torch.zeros_like(g) for g in grads], skip_nonfinite=True)
        for used in (grads, [*grads[:2], torch.ones(2)], [grads[0], torch.ones(n), torch.ones(2)]):
            twins.step(used)
            twins.check()
        assert twins.opt.skipped_steps.item() == 2


def test_the_option_may_change_between_steps() -> None:
    twins = Twins.of(MEASURE, [torch.zeros(n) for n in (700, 5)])
    grads = [randn(n, n, scale=n) for n in (700, 5)]
    for bits in (None, "exact", None, "exact"):
        twins.opt.norm_bits = twins.twin.norm_bits = bits
        twins.step(grads)
        twins.check()
    for optimizer, _ in twins.both:
        optimizer.norm_type = math.inf  # with which the option changes nothing
    twins.step(grads)
    twins.check()
