"""The norm as integers: what the CUDA kernels add up is exact, in whatever order they add."""

from __future__ import annotations

import math
from fractions import Fraction

import cuda_shim
import numpy as np
import pytest
import torch
from cases import CHUNK, FLOATS, NONFINITE, parametrize
from conftest import require_cpu_backend
from harness import make_param, randn
from models.exact import LANES, Floats, fma, pair_tree
from torch import Tensor

import fusedopt

DIGITS, LOWEST, INF, NAN, LARGEST, WORDS = 20, -352, 20, 21, 22, 24  # csrc/words.h

_shim = pytest.fixture(cuda_shim.fixture)


@pytest.fixture(autouse=True)
def shim(_shim: cuda_shim.CudaShim) -> cuda_shim.CudaShim:
    require_cpu_backend()
    return _shim


class Reduced:
    """Parameters whose gradients have been reduced, by the kernels and by the CPU backend."""

    def __init__(
        self, grads: list[Tensor], norm_type: float = 2.0, grad_scale: float | None = None
    ) -> None:
        self.optimizers = []
        for backend in ("cuda", "cpu"):
            params = [make_param(torch.zeros(grad.shape)) for grad in grads]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            opt = fusedopt.FusedSGD(
                params, lr=0.0, max_grad_norm=1.0, norm_type=norm_type, backend=backend
            )
            if grad_scale is not None:
                opt.grad_scale = torch.tensor(grad_scale)
            opt.step()
            self.optimizers.append(opt)

    def tensors(self) -> dict[str, Tensor]:
        (part,) = self.optimizers[0]._shared.plan.parts
        found: dict[str, Tensor] = part.tensors
        return found

    def words(self) -> list[int]:
        """The same from both."""
        ours = self.tensors()["words"].view(torch.int64).tolist()
        theirs = self.optimizers[1]._shared.plan._tables["words"].tolist()
        assert len(ours) == WORDS and ours == theirs
        return ours


def sum_of(words: list[int]) -> Fraction:
    digits = sum(word << 32 * d for d, word in enumerate(words[:DIGITS]))
    return Fraction(digits) * Fraction(2) ** LOWEST


def chunk_sum(x: Floats) -> np.float32:
    padded = np.zeros(-(-x.size // LANES) * LANES, np.float32)
    padded[: x.size] = x
    lanes = np.zeros(LANES, np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for row in padded.reshape(-1, LANES):
            lanes = fma(row, row, lanes)
        total: np.float32 = pair_tree(lanes)
    return total


def partial(x: Floats) -> tuple[Fraction, bool]:
    """A chunk's sum of squares by the contract, and whether it had to be scaled for that."""
    total = chunk_sum(x)
    if 2.0**-80 <= total < math.inf:
        return Fraction(float(total)), False
    largest = float(np.abs(x).max(initial=0))
    if largest == 0:
        return Fraction(0), False
    exponent = min(max(math.frexp(largest)[1] - 1, -126), 126)
    scaled = chunk_sum(x * np.float32(2.0**-exponent))
    return Fraction(float(scaled)) * Fraction(4) ** exponent, True


def chunks_of(grad: Tensor) -> list[Floats]:
    values = grad.float().numpy()
    return [values[start : start + CHUNK] for start in range(0, values.size, CHUNK)]


# From the largest fp32 numbers to denormals; the sum of squares of some is out of fp32's range.
MAGNITUDES = (1e38, 1e30, 3e19, 2.0, 1e-3, 1e-12, 1e-20, 1e-30, 1e-38, 1e-41, 1e-45, 0.0)


@parametrize("dtype", FLOATS)
def test_the_sum_is_exact(dtype: torch.dtype) -> None:
    lengths = (5, CHUNK + 300, 257, 2 * CHUNK)
    grads = [
        randn(lengths[k % 4], k, scale=scale).clamp(-3e38, 3e38)
        for k, scale in enumerate(MAGNITUDES)
    ]
    if dtype == torch.float16:
        grads = [(g / max(scale, 1e-38)) * 10.0 ** (k % 8 - 6) for k, (g, scale) in
                 enumerate(zip(grads, MAGNITUDES, strict=True))]  # fmt: skip
    grads = [g.to(dtype) for g in grads]
    assert all(bool(g.isfinite().all()) for g in grads)
    found = [partial(chunk) for grad in grads for chunk in chunks_of(grad)]
    assert any(scaled for _, scaled in found) == (dtype != torch.float16)
    words = Reduced(grads).words()
    assert sum_of(words) == sum(value for value, _ in found)
    assert words[INF] == words[NAN] == words[LARGEST] == 0


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_each_magnitude_by_itself(magnitude: float) -> None:
    """A small one would not show beside a large one if its digits were wrong by rounding."""
    grad = randn(CHUNK + 9, 3, scale=magnitude).clamp(-3e38, 3e38)
    words = Reduced([grad]).words()
    assert sum_of(words) == sum(partial(chunk)[0] for chunk in chunks_of(grad))
    assert (sum_of(words) == 0) == (magnitude == 0.0)


def test_carries_are_kept() -> None:
    """More chunks in one digit than it has bits to spare below the next: the word grows instead."""
    grads = [torch.full((1,), 2.0 - 2.0**-23) for _ in range(2500)]
    words = Reduced(grads).words()
    assert max(words[:DIGITS]) >= 2**32
    assert sum_of(words) == 2500 * partial(grads[0].numpy())[0]


@pytest.mark.parametrize("value", NONFINITE)
@parametrize("dtype", FLOATS)
def test_inf_and_nan_are_counted_by_chunks(value: float, dtype: torch.dtype) -> None:
    grads = [randn(n, n, dtype) for n in (5, 3 * CHUNK, CHUNK + 1, 300)]
    clean = sum_of(Reduced(grads[:1]).words())
    for tensor, element in ((1, 0), (1, 1), (1, 2 * CHUNK + 7), (2, CHUNK), (3, -1)):
        grads[tensor][element] = value
    words = Reduced(grads).words()
    infs, nans = (4, 0) if math.isinf(value) else (0, 4)
    assert (words[INF], words[NAN]) == (infs, nans)
    finite = [c for g in grads for c in chunks_of(g) if np.isfinite(c).all()]
    assert sum_of(words) == sum(partial(c)[0] for c in finite) > clean
    grads[0][0] = math.inf
    grads[1][3] = math.nan  # beside an inf: the chunk counts as one with a NaN
    words = Reduced(grads).words()
    assert (words[INF], words[NAN]) == ((4, 1) if infs else (1, 4))


def test_the_largest_magnitude() -> None:
    grads = [randn(n, n) for n in (5, 2 * CHUNK + 9, 300)]
    for value in (-77.5, math.inf, math.nan):
        grads[1][CHUNK + 3] = value
        words = Reduced(grads, math.inf).words()
        bits = int(torch.tensor(value).abs().view(torch.int32))
        assert words == [*[0] * LARGEST, bits, 0]


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize(
    "schedule",
    [dict(threads_descending=1), dict(blocks_descending=1), dict(host_threads=3)],
    ids=lambda schedule: next(iter(schedule)),
)
def test_any_grid_and_order_of_blocks(
    shim: cuda_shim.CudaShim, schedule: dict[str, int], norm_type: float
) -> None:
    grads = [randn(n, k, scale=3.0 ** (k % 9)) for k, n in enumerate([300, CHUNK * 9 + 1, 5] * 9)]
    expected = Reduced(grads, norm_type, 7.0).words()
    threads = torch.get_num_threads()
    try:
        for processors, blocks in ((1, 1), (1, 3), (5, 1), (9, 8)):
            torch.set_num_threads(processors)  # of the CPU backend
            shim.reset()
            shim.set(processors=processors, blocks_per_processor=blocks, **schedule)
            assert Reduced(grads, norm_type, 7.0).words() == expected
            used = [e.blocks for e in shim.launches() if e.kernel.startswith("reduce_kernel")]
            assert used == [min(processors * blocks, 14)]  # 108 chunks, eight warps a block
    finally:
        torch.set_num_threads(threads)


def test_nothing_is_left_behind(shim: cuda_shim.CudaShim) -> None:
    """Between launches the sums are zero, after a failed one too."""
    grads = [randn(n, n) for n in (5, 2 * CHUNK + 9, 300)]
    reduced = Reduced(grads)
    expected, opt = reduced.words(), reduced.optimizers[0]
    for failing in ("", "reduce", "update"):
        if failing:
            shim.fail("cudaLaunchKernelEx", 2, {"reduce": 1, "update": 2}[failing])
            with pytest.raises(RuntimeError, match=failing):
                opt.step()
            assert not reduced.tensors()["sums"].any() and not reduced.tensors()["ticket"].any()
        opt.step()
        assert reduced.words() == expected
        assert not reduced.tensors()["sums"].any() and not reduced.tensors()["ticket"].any()
