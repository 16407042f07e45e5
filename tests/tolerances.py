"""The tolerance policy, in one place: no test has a number of its own.

1. Where the result must not depend on anything, bits are compared (`same_bits`).
2. Against the float64 oracle the largest error is at most twice that of torch.optim on the same
   inputs and dtypes, and never has to be below one ulp. Errors are counted in ulps of the largest
   magnitude that entered an element's arithmetic and pooled over all tensors of a kind, so that
   one element on which torch happens to be exact does not set the bar.
   A step also has scalars common to all its elements (step size, bias corrections), each rounded
   to float32 once; on those one of the two may be lucky. They are worth one ulp of a param.
   (The clip coefficient is compared by itself.)
3. States of fewer bits are held to the error of the update against float64, over whole traces of
   gradients, and to the largest update: a state that stalls or becomes zero shows there.
4. A norm is right to a few eps. Chunk sums are added in float64, so the bound does not grow with
   the number of chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TORCH_FACTOR = 2.0
FLOOR_ULPS = 1.0
SCALAR_ULPS = 1.0
# Where torch itself is wrong (its norm overflows at 1e20) it is no yardstick.
TORCH_ULPS_AT_MOST = 64.0
NORM_EPS = 4.0
NORM_EPS_FLOAT32 = NORM_EPS * 2.0**-24
# float64 against float64: the oracle has rounding errors of the same size as what it judges.
FLOAT64_RTOL = 1e-12
# By how the states are stored: ||u - u64|| / ||u64||, and gradients of any size in the last.
UPDATE_ERROR = {"bf16": 0.02, "8bit": 0.13}
UPDATE_ERROR_OF_ANY_SIZE = 0.08
LARGEST_UPDATE = 4.0  # in units of lr; float32 has about 3
# exp_avg_sq over float64's after a long decay.
DECAYED = {"bf16": (0.97, 1.03), "8bit": (0.8, 1.05)}
STANDS_STILL = 1e-3  # the update of an element without gradients, in units of lr


def bits(tensor: Tensor) -> Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integer[tensor.element_size()])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and every bit: NaN payloads and signs of zero count."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(bits(left), bits(right))
    )


def assert_same_bits(left: Tensor, right: Tensor, label: str) -> None:
    if same_bits(left, right):
        return
    assert left.dtype == right.dtype and left.shape == right.shape, f"{label}: {left} vs {right}"
    different = (bits(left) != bits(right)).nonzero()
    where = tuple(different[0].tolist())
    raise AssertionError(
        f"{label}: {len(different)} of {left.numel()} elements differ, the first at {where}: "
        f"{left[where].item()!r} vs {right[where].item()!r}"
    )


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at float64 `magnitude`."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(magnitude.numpy())
    return torch.from_numpy(np.ldexp(info.eps, exponent - 1)).clamp(min=info.tiny * info.eps)


@dataclass
class Compared:
    """One tensor as fusedopt, torch.optim and the oracle have it; `scale` as the oracle says."""

    label: str
    ours: Tensor
    torchs: Tensor
    oracle: Tensor
    scale: Tensor


def assert_within_policy(kind: str, dtype: torch.dtype, compared: list[Compared]) -> None:
    for entry in compared:
        assert entry.ours.dtype == dtype, f"{kind} of {entry.label} is {entry.ours.dtype}"
        assert entry.ours.shape == entry.oracle.shape, f"{kind} of {entry.label}"
    flat = {
        name: torch.cat([getattr(entry, name).detach().flatten().double() for entry in compared])
        for name in ("ours", "torchs", "oracle", "scale")
    }
    # A value beyond the largest of a half dtype is its inf; in the oracle as well.
    oracle = flat["oracle"].to(dtype).double()
    finite = oracle.isfinite()
    oracle = torch.where(finite, flat["oracle"], oracle)
    assert_nonfinite_match(kind, compared, flat["ours"], oracle)
    unit = ulp(flat["scale"], dtype)
    errors = torch.where(finite, (flat["ours"] - oracle).abs() / unit, 0.0)
    torch_errors = torch.where(finite, (flat["torchs"] - oracle).abs() / unit, 0.0).nan_to_num(0.0)
    if errors.numel() == 0:
        return
    floor = FLOAT64_RTOL / torch.finfo(dtype).eps if dtype == torch.float64 else FLOOR_ULPS
    bound = max(floor, TORCH_FACTOR * min(torch_errors.max().item(), TORCH_ULPS_AT_MOST))
    if kind in ("param", "master_param"):
        bound += SCALAR_ULPS * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    worst = int(errors.argmax())
    assert errors[worst] <= bound, (
        f"{kind}: {int((errors > bound).sum())} of {errors.numel()} elements too far from the "
        f"oracle, the worst {locate(compared, worst)}: {flat['ours'][worst]:.17g}, oracle "
        f"{oracle[worst]:.17g}, {errors[worst]:.2f} ulp where {bound:.2f} are allowed"
    )


def assert_nonfinite_match(
    kind: str, compared: list[Compared], ours: Tensor, oracle: Tensor
) -> None:
    same = (
        (ours == oracle) | (ours.isnan() & oracle.isnan()) | (ours.isfinite() & oracle.isfinite())
    )
    if not bool(same.all()):
        where = int((~same).nonzero()[0])
        raise AssertionError(
            f"{kind}: {int((~same).sum())} elements are not finite where the oracle is, or the "
            f"reverse, the first {locate(compared, where)}: {ours[where]:.9g}, oracle "
            f"{oracle[where]:.9g}"
        )


def locate(compared: list[Compared], offset: int) -> str:
    for entry in compared:
        if offset < entry.ours.numel():
            return f"in {entry.label} at flat index {offset}"
        offset -= entry.ours.numel()
    raise IndexError(offset)


def assert_norm(actual: Tensor, expected: Tensor | float, label: str = "grad_norm") -> None:
    assert actual.dtype == torch.float32 and actual.dim() == 0, f"{label}: {actual!r}"
    expected = torch.as_tensor(expected, dtype=torch.float64)
    if expected.float().isinf():  # beyond float32, though all gradients may be finite
        expected = expected.float()
    assert_relative(actual.item(), float(expected), NORM_EPS_FLOAT32, label, atol=2.0**-149)


def assert_relative(
    actual: float, expected: float, rtol: float, label: str, atol: float = 0.0
) -> None:
    if math.isnan(expected):
        assert math.isnan(actual), f"{label}: {actual} instead of nan"
    elif math.isinf(expected):
        assert actual == expected, f"{label}: {actual} instead of {expected}"
    else:
        error = abs(actual - expected)
        assert error <= rtol * abs(expected) + atol, f"{label}: {actual!r} instead of {expected!r}"
