"""``norm_bits="exact"``: the sum of the squares of all elements, rounded once, in any pieces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import CHUNK, FLOATS, LAYOUT_SHAPE, LAYOUTS, LENGTHS, ODD_LENGTHS, parametrize
from harness import FUSED, make_param, randn, scaler_attributes, set_grad
from models.exact import clip_coef, exact_norm
from torch import Tensor

from fusedopt.backends.records import DIGITS, INF_CHUNKS, LOWEST, NAN_CHUNKS
from fusedopt.backends.squares import root_of, sum_of_squares

Make = Callable[[int], Tensor]
LIMIT = torch.finfo(torch.float32)
BLOCK = 512  # elements that a CPU adds up together (kBlock)
CUTS = sorted({0, 1, 2, 8191, 8192, 8193, BLOCK - 1, BLOCK, BLOCK + 1, *ODD_LENGTHS})


def spread(low: int, high: int) -> Make:
    """Exponents between the two, in any order."""

    def make(n: int) -> Tensor:
        exponents = torch.randint(low, high, (n,), generator=torch.manual_seed(n))
        return torch.ldexp(randn(n, n).clamp(-1.9, 1.9), exponents)

    return make


def starting(n: int, *first: float) -> Tensor:
    return torch.tensor([*first[:n], *[0.0] * (n - len(first))], dtype=torch.float32)


NASTY: dict[str, Make] = {
    "normal": lambda n: randn(n, n),
    "smallest": lambda n: torch.full((n,), 2.0**-149),
    "denormal": lambda n: torch.ldexp(torch.arange(n) + 1.0, torch.tensor(-149)),
    "largest": lambda n: torch.full((n,), LIMIT.max),
    "all_bits": lambda n: torch.full((n,), 2.0 - 2.0**-23),
    "every_exponent": spread(-149, 127),
    "one_window": spread(-10, 10),  # of the CPU's, and a little more
    "two_windows": spread(-25, 0),
    "far_apart": lambda n: torch.where(torch.arange(n) % 2 == 0, 2.0**127, 2.0**-149),
    "one_far_below": lambda n: torch.where(torch.arange(n) == n - 1, 2.0**-40, randn(n, n)),
    "falling": lambda n: torch.ldexp(torch.ones(n), 127 - torch.arange(n) % 277),
    "zeros": lambda n: torch.zeros(n),
    "mostly_zeros": lambda n: torch.where(torch.arange(n) % 100 == 7, randn(n, n), 0.0),
    # Norms of 1 + 2^-24 and 1 + 3 * 2^-24, halfway between two fp32 numbers, and one beside it.
    "tie_down": lambda n: starting(n, 1.0, 2.0**-12, 2.0**-12, 2.0**-24),
    "tie_up": lambda n: starting(n, 3 * 2.0**-24, *[2.0**-12] * 6, 1.0),
    "beside_a_tie": lambda n: starting(n, 1.0, 2.0**-12, 2.0**-12, 2.0**-24, 2.0**-25),
}


def optimizer(grads: list[Tensor], backend: str, **options: Any) -> Any:
    params = [make_param(torch.zeros(g.shape)) for g in grads]
    options = {"max_grad_norm": math.inf, "norm_bits": "exact", **options}
    opt = FUSED["sgd"](params, lr=0.0, backend=backend, **options)
    for param, grad in zip(params, grads, strict=True):
        set_grad(param, grad)
    return opt


def measure(
    grads: list[Tensor], backend: str, grad_scale: float | None = None, **options: Any
) -> Any:
    """A step that measures and moves nothing."""
    opt = optimizer(grads, backend, **options)
    with scaler_attributes(opt, grad_scale, None):
        opt.step()
    return opt


def assert_exact(grads: list[Tensor], backend: str, grad_scale: float | None = None) -> None:
    opt = measure(grads, backend, grad_scale, max_grad_norm=1.0)
    inv_scale = np.float32(1.0 if grad_scale is None else 1.0 / float(np.float32(grad_scale)))
    with np.errstate(over="ignore"):  # beyond fp32, the norm is inf there
        norm = exact_norm([g.float().numpy() for g in grads], inv_scale)
        found = opt.grad_norm.item(), opt.clip_coef.item()
        assert found == (np.float32(norm), clip_coef(norm, 1.0)), [tuple(g.shape) for g in grads]


def words_of(opt: Any) -> np.ndarray:
    words: np.ndarray = opt._shared.plan._tables["words"].numpy().view(np.uint64).copy()
    return words


def value(words: np.ndarray) -> Fraction:
    digits = (int(word) * Fraction(2) ** (32 * d + LOWEST) for d, word in enumerate(words[:DIGITS]))
    return sum(digits, Fraction(0))


def squares(grads: list[Tensor]) -> Fraction:
    elements = torch.cat([grad.flatten() for grad in grads]).tolist()
    return sum((Fraction(x) ** 2 for x in elements), Fraction(0))


# ---- the value -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NASTY)
def test_norm_is_rounded_once(name: str, backend: str) -> None:
    for n in CUTS:
        assert_exact([NASTY[name](n)], backend)
    assert_exact([NASTY[name](n) for n in CUTS if n < 1000], backend)


@pytest.mark.parametrize("grad_scale", [65536.0, 3.0, 1e-3, 2.0**-100, 7e30, 1e-38])
def test_unscaled_elements_are_rounded_before_they_are_squared(
    grad_scale: float, backend: str
) -> None:
    for make in NASTY.values():
        assert_exact([make(300), make(CHUNK + 1)], backend, grad_scale)


@parametrize("dtype", FLOATS)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    for n, grad_scale in itertools.product((0, 1, 700, CHUNK + 3), (None, 1000.0)):
        assert_exact([randn(n, n, dtype), randn(5, 5, dtype)], backend, grad_scale)
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    if dtype != torch.float32:
        every = bits.view(dtype)
        assert_exact([torch.where(every.isfinite(), every, 0.0)], backend)


def test_the_words_are_the_exact_sum(cpu_backend: str, simd_levels: list[str]) -> None:
    """To the last bit, which fp32 does not show; and each chunk adds less than 2^32 to a word."""
    from fusedopt import _cpu

    for level, (name, make) in itertools.product(simd_levels, NASTY.items()):
        _cpu.set_simd(level)
        grads = [make(n) for n in (1, 15, 17, BLOCK + 1, CHUNK + 700)]
        words = words_of(measure(grads, cpu_backend))
        assert value(words) == squares(grads), f"{name} on {level}"
        assert max(map(int, words)) < len(LENGTHS) << 32
        one_chunk = words_of(measure([make(CHUNK)], cpu_backend))
        assert max(map(int, one_chunk)) < 1 << 32, f"{name} on {level}"


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(threads: int, cpu_backend: str, restore_threads: None) -> None:
    torch.set_num_threads(threads)
    grads = [spread(-60, 60)(n) for n in (9 * CHUNK + 5, 1, 400, 3 * CHUNK)]
    assert value(words_of(measure(grads, cpu_backend))) == squares(grads)


@pytest.mark.parametrize("threads", [1, 4])
def test_denormals_whatever_the_flags(
    threads: int, cpu_backend: str, restore_threads: None
) -> None:
    torch.set_num_threads(threads)
    grads = [NASTY["denormal"](n) for n in (5, 9 * CHUNK)]
    expected = squares(grads)
    try:
        torch.set_flush_denormal(True)
        opt = measure(grads, cpu_backend)
    finally:
        torch.set_flush_denormal(False)
    assert value(words_of(opt)) == expected


# ---- how it is cut -------------------------------------------------------------------------------


def test_pieces_of_any_length(backend: str) -> None:
    """As shards, whose ends fall anywhere; the sums of chunks do differ."""
    whole = randn(3 * CHUNK + 1000, 4)
    found: dict[str | None, set[float]] = {"exact": set(), None: set()}
    for size in (len(whole), CHUNK, 5003, 4097, 1024, 77):
        for bits, norms in found.items():
            pieces = list(whole.clone().split(size))
            norms.add(measure(pieces, backend, norm_bits=bits).grad_norm.item())
            norms.add(measure(pieces[::-1], backend, norm_bits=bits).grad_norm.item())
    assert len(found["exact"]) == 1
    assert backend == "reference" or len(found[None]) > 1, "the test has no power"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: str) -> None:
    values = randn(LAYOUT_SHAPE, 3)
    assert_exact([LAYOUTS[layout](values)], backend)
    assert_exact([torch.randn(7, 1).expand(7, 300), torch.tensor(0.3).expand(5, 5)], backend)


# ---- around it -----------------------------------------------------------------------------------


def test_inf_and_nan_are_counted_as_before(cpu_backend: str) -> None:
    grads = [torch.ones(3 * CHUNK), torch.ones(7), torch.ones(7)]
    grads[0][CHUNK], grads[1][3], grads[2][0], grads[2][1] = -math.inf, math.nan, math.inf, math.nan
    words = words_of(measure(grads, cpu_backend))
    assert (words[INF_CHUNKS], words[NAN_CHUNKS]) == (1, 2)
    assert value(words) == 2 * CHUNK


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_with_a_bad_element_is_skipped(bad: float, backend: str) -> None:
    for n, at in ((1, 0), (BLOCK + 3, BLOCK), (CHUNK + 9, CHUNK - 1), (CHUNK + 9, CHUNK + 8)):
        grad = randn(n, n)
        grad[at] = bad
        opt = measure([randn(9, 1), grad], backend, skip_nonfinite=True)
        assert opt.skipped_steps.item() == 1
        assert opt.grad_norm.isnan().item() == math.isnan(bad)
        assert not opt.grad_norm.isfinite().item()


def test_the_largest_norm_is_what_it_was(backend: str) -> None:
    for make in NASTY.values():
        grads = [make(700), make(3)]
        norms = [
            measure(grads, backend, norm_type=math.inf, norm_bits=bits).grad_norm.item()
            for bits in (None, "exact")
        ]
        assert norms[0] == norms[1]


def test_without_a_norm_nothing_is_added_up(backend: str) -> None:
    opt = measure([randn(9, 1)], backend, max_grad_norm=None)
    assert opt.grad_norm is None


def test_the_option_may_change_between_steps(backend: str) -> None:
    grads = [randn(n, n) for n in (5003, CHUNK - 5, 77)]
    opt = optimizer(grads, backend, norm_bits=None)
    norms = {}
    for bits in (None, "exact", None, "exact"):
        opt.norm_bits = bits
        opt.step()
        norms.setdefault(bits, set()).add(opt.grad_norm.item())
    assert all(len(found) == 1 for found in norms.values())
    assert norms["exact"] == {np.float32(exact_norm([g.numpy() for g in grads]))}


# ---- fp64, which the reference alone serves ------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200, 1e-310, 5e-324])
def test_fp64_of_any_size(scale: float) -> None:
    grad = randn(1000, 1, torch.float64) * scale
    total = sum_of_squares(grad)
    assert total == squares([grad]) * 2**2252
    root = Fraction(root_of(total))
    error = max(root * Fraction(2) ** -52, Fraction(2) ** -1074)
    assert (root - error) ** 2 <= squares([grad]) <= (root + error) ** 2


def test_fp64_beyond_the_largest_number() -> None:
    assert root_of(sum_of_squares(torch.full((9,), 1.7e308, dtype=torch.float64))) == math.inf
    assert root_of(0) == 0.0
