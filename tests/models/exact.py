"""The numeric contract to the bit, in numpy: what every backend must compute.

Only float32 and float64 operations that IEEE 754 defines exactly, and a fused multiply-add.
Written from the contract, not from the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import model_of

CHUNK = 8192
LANES = 256
f32 = np.float32
ONE = f32(1)
Floats = NDArray[np.float32]


def fma(a: Any, b: Any, c: Any) -> Floats:
    """float32 a * b + c with a single rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd there (the last bit
    is set when something was lost), so that rounding it again to float32 is right.
    """
    product = np.multiply(np.float64(a), np.float64(b))
    addend = np.float64(c)
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    toward = np.where(lost > 0, np.inf, -np.inf)
    even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (lost != 0)
    total = np.where(inexact & even, np.nextafter(total, toward), total)
    return total.astype(np.float32)


def pair_tree(lanes: NDArray[Any]) -> Any:
    """Adjacent pairs, then pairs of the sums, down to one."""
    while lanes.size > 1:
        lanes = lanes[0::2] + lanes[1::2]
    return lanes[0]


def chunk_square_sum(x: Floats) -> np.float64:
    """One chunk; its sum must lie where no square under- or overflows to matter."""
    padded = np.zeros(-(-x.size // LANES) * LANES, np.float32)
    padded[: x.size] = x
    lanes = np.zeros(LANES, np.float32)
    for row in padded.reshape(-1, LANES):
        lanes = fma(row, row, lanes)
    total = pair_tree(lanes)
    assert total == 0 or 2.0**-80 <= total < np.inf
    return np.float64(total)


def grad_norm(grads: list[Floats], inv_scale: np.float32 = ONE) -> np.float64:
    """Not yet rounded to float32, as clip_coef takes it."""
    partials = (
        chunk_square_sum(grad[start : start + CHUNK] * inv_scale)
        for grad in grads
        for start in range(0, grad.size, CHUNK)
    )
    total = sum((Fraction(float(partial)) for partial in partials), Fraction(0))
    return np.float64(np.sqrt(float(total)))  # a fraction's float is the nearest, ties to even


def exact_norm(grads: list[Floats], inv_scale: np.float32 = ONE) -> np.float64:
    """Of ``norm_bits="exact"``: the squares of all elements, added up as whole numbers."""
    elements = np.concatenate([grad.ravel() * inv_scale for grad in grads])
    if not np.isfinite(elements).all():
        return np.float64(np.nan if np.isnan(elements).any() else np.inf)
    fractions, exponents = np.frexp(elements.astype(np.float64))
    wholes = (fractions * 2.0**24).astype(np.int64).tolist()  # element * 2^(24 - exponent)
    pairs = zip(wholes, exponents.tolist(), strict=True)
    total = sum(whole * whole << 2 * (exponent + 148) for whole, exponent in pairs)
    return np.float64(np.sqrt(float(Fraction(total, 2 ** (2 * (24 + 148))))))


def clip_coef(norm: np.float64, max_grad_norm: float) -> np.float32:
    return min(ONE, f32(max_grad_norm / (norm + 1e-6)))


def geometric_sum(base: float, count: int) -> Fraction:
    return sum((Fraction(base) ** i for i in range(count)), Fraction(0))


@dataclass
class ExactStep:
    """One tensor under one rule: float32 `master` and `state`, `step()` with float32 grads."""

    rule: str
    master: Floats
    hyper: dict[str, Any]
    state: dict[str, Floats] = field(default_factory=dict)
    count: int = 0

    def step(
        self, grad: Floats, grad_mult: np.float32 = ONE, max_grad_value: float | None = None
    ) -> None:
        hyper = self.hyper
        lr, weight_decay = hyper["lr"], hyper["weight_decay"]
        grad = grad * grad_mult
        if max_grad_value is not None:
            grad = np.clip(grad, f32(-max_grad_value), f32(max_grad_value))
        if hyper["maximize"]:
            grad = -grad
        if hyper["decoupled_weight_decay"]:
            self.master = fma(f32(-lr * weight_decay), self.master, self.master)
        else:
            grad = fma(f32(weight_decay), self.master, grad)
        self.count += 1
        model_of(self.rule).exact_update(self, grad)
