"""Losses and norms of the same training, computed in several ways: how far apart may they be?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import print_table

# The ranks and both processes compute the same sums and differ by rounding alone, so that the
# distances between any two of them are of one size. In 240 runs of a small model (2 to 4 ranks,
# both optimizers, fp32 and bf16, FSDP2 and DDP) the ranks were at most 4.1 times as far from the
# first process as the second was, and in the median as far. In fp32 a norm that is wrong by a
# thousandth is some thousand times as far.
ALLOWANCE = 10
# One unit in the last place of what is compared, fp32 numbers: processes that happen to agree to
# the last bit must not make the bound 0.
LEAST = 2.0**-23


@dataclass
class Curve:
    """What a run leaves behind."""

    name: str
    losses: list[float]
    norms: list[float]
    skipped: int
    iteration: float  # milliseconds
    optimizer: float

    @classmethod
    def of(cls, name: str, run: Any) -> Curve:
        skipped, whole = int(run.optimizer.skipped_steps), run.whole_watch.median
        return cls(name, run.losses, run.norms, skipped, whole, run.watch.median)

    def row(self, first: Curve, steps: int) -> tuple[str, ...]:
        numbers = statistics.fmean(self.losses[-steps:]), self.norms[-1]
        times = f"{self.iteration:.1f}", f"{self.optimizer:.2f}"
        off = (f"{distance:.1e}" for distance in self.distances(first))
        return (self.name, *(f"{n:.4f}" for n in numbers), str(self.skipped), *times, *off)

    def distances(self, first: Curve) -> tuple[float, float]:
        """The largest relative difference of a loss and of a norm from those of the same step."""
        start = len(first.losses) - len(self.losses)
        return (
            max(map(_distance, self.losses, first.losses[start:])),
            max(map(_distance, self.norms, first.norms[start:])),
        )


def _distance(one: float, other: float) -> float:
    if one == other or (math.isnan(one) and math.isnan(other)):  # a skipped step's norm
        return 0.0
    distance = abs(one - other) / abs(other)
    return math.inf if math.isnan(distance) else distance


def report_agreement(curves: Sequence[Curve]) -> int:
    """Print the table and the verdict; return the program's exit status."""
    first, second, ours = curves
    steps = min(10, len(ours.losses))
    print()
    header = "run,loss,grad norm,skipped,iteration ms,optimizer ms,loss off,norm off"
    print_table(header.split(","), [curve.row(first, steps) for curve in curves])
    print(f"loss: mean of the last {steps} steps; grad norm: last step, unscaled, before clipping;")
    print("off: how far a step's are from the first row's, relative to those, where it is most")
    bounds = [ALLOWANCE * max(distance, LEAST) for distance in second.distances(first)]
    pairs = list(zip(ours.distances(first), bounds, strict=True))
    agrees = all(distance <= bound for distance, bound in pairs)
    verdict = "agrees" if agrees else "does NOT agree"
    (loss, loss_bound), (norm, norm_bound) = pairs
    print(f"{ours.name}: {verdict} with one process: loss off {loss:.1e} of {loss_bound:.1e},")
    print(f"norm off {norm:.1e} of {norm_bound:.1e}, which is {ALLOWANCE} times what rounding does")
    return 0 if agrees else 1
