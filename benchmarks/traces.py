"""Traces of gradients, and how far the updates of AdamW with stored states lie from float64's.

A trace is a sequence of gradients of one matrix, the same for every way to store the states. The
update is what lr is multiplied with. It is taken from the parameter itself, which is zero before
every step and has no decay: with lr=1 it is then the negative of the update, not rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8
SIZE = 1e-4  # of gradients in training, beside which eps is what it is there
N, STEPS, LAST = 16_384, 3_000, 1_000  # elements, steps, and those of them that count
COLUMNS = 128
Gradients = Iterator[Tensor]


class Setting(NamedTuple):
    """How a trace is made. Elements lie in a matrix of 128 columns, a row is a block of ours."""

    n: int = N
    steps: int = STEPS
    seed: int = 0

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def student_t(n: int, generator: torch.Generator) -> Tensor:
    """Of three degrees of freedom: tails as gradients have them."""
    normal = torch.randn((4, n), generator=generator)
    return normal[0] / (normal[1:].square().sum(0) / 3).sqrt()


def spread(setting: Setting, generator: torch.Generator, width: float = 1.0) -> Tensor:
    """A size of each row times one of each column, both lognormal."""
    rows = torch.randn((setting.n // COLUMNS, 1), generator=generator)
    columns = torch.randn((1, COLUMNS), generator=generator)
    return torch.exp(width * (rows + columns)).flatten()


def stationary(setting: Setting) -> Gradients:
    own = setting.generator
    sizes = spread(setting, own)
    for _ in range(setting.steps):
        yield sizes * student_t(setting.n, own)


def decay(setting: Setting) -> Gradients:
    """Gradients end at 0.03 of their first size."""
    for step, grad in enumerate(stationary(setting)):
        yield grad * 0.03 ** (step / setting.steps)


def sparse_rows(setting: Setting) -> Gradients:
    """As of an embedding: each row has a gradient in a share of the steps, from 1/2 to 1/200."""
    own = torch.Generator().manual_seed(setting.seed + 1)
    shares = 0.5 * 0.01 ** torch.rand((setting.n // COLUMNS, 1), generator=own)
    for grad in stationary(setting):
        there = torch.rand(shares.shape, generator=own) < shares
        yield (grad.view(-1, COLUMNS) * there).flatten()


def sign_flips(setting: Setting) -> Gradients:
    """Gradients of one size whose sign changes every 50 steps, each element's at a time of its
    own: exp_avg goes through zero and exp_avg_sq stays where it is."""
    own = setting.generator
    sizes = spread(setting, own)
    phases = torch.randint(100, (setting.n,), generator=own)
    for step in range(setting.steps):
        signs = 1 - 2 * ((step + phases) % 100 >= 50).float()
        yield sizes * signs * (1 + 0.1 * torch.randn(setting.n, generator=own))


def outliers(setting: Setting) -> Gradients:
    """One element of every 128 is 100 times as large."""
    places = torch.arange(setting.n) % COLUMNS == torch.arange(setting.n) // COLUMNS % COLUMNS
    factor = torch.where(places, 100.0, 1.0)
    for grad in stationary(setting):
        yield grad * factor


def independent(setting: Setting) -> Gradients:
    """Each element has a size of its own, e^N(0, 1.5)."""
    own = setting.generator
    sizes = torch.exp(1.5 * torch.randn(setting.n, generator=own))
    for _ in range(setting.steps):
        yield sizes * student_t(setting.n, own)


def homogeneous(setting: Setting) -> Gradients:
    """Gaussian gradients of one size: a codec of small range is at its best."""
    own = setting.generator
    for _ in range(setting.steps):
        yield torch.randn(setting.n, generator=own)


TRACES: dict[str, Callable[[Setting], Gradients]] = {
    "stationary": stationary,
    "decay": decay,
    "sparse_rows": sparse_rows,
    "sign_flips": sign_flips,
    "outliers": outliers,
    "independent": independent,
    "homogeneous": homogeneous,
}
Make = Callable[..., Any]  # an optimizer of params with lr, betas, eps, weight_decay


class Outcome(NamedTuple):
    error: float  # of the update, over the last steps: ||u - u64|| / ||u64||
    largest: float  # magnitude of an update in any step


class InDouble:
    """The update in float64, of the same gradients."""

    def __init__(self, n: int, eps: float) -> None:
        self.mean, self.squares = torch.zeros(2, n, dtype=torch.float64)
        self.step, self.eps = 0, eps

    def update(self, grad: Tensor) -> Tensor:
        self.step += 1
        wide = grad.double()
        self.mean.lerp_(wide, 1 - BETAS[0])
        self.squares.mul_(BETAS[1]).addcmul_(wide, wide, value=1 - BETAS[1])
        denom = (self.squares / (1 - BETAS[1] ** self.step)).sqrt_().add_(self.eps)
        return self.mean / (1 - BETAS[0] ** self.step) / denom


def follow(
    gradients: Gradients,
    makes: Mapping[str, Make],
    setting: Setting,
    size: float = SIZE,
    last: int = LAST,
) -> dict[str, Outcome]:
    """What becomes of the same gradients, times ``size``, with each optimizer. eps goes with it."""
    eps = EPS * size / SIZE
    params = {name: torch.nn.Parameter(torch.zeros(setting.n)) for name in makes}
    own = {"lr": 1.0, "betas": BETAS, "eps": eps, "weight_decay": 0.0}
    optimizers = {name: make([params[name]], **own) for name, make in makes.items()}
    oracle, norm = InDouble(setting.n, eps), 0.0
    errors, largest = dict.fromkeys(makes, 0.0), dict.fromkeys(makes, 0.0)
    for step, grad in enumerate(gradients):
        scaled = grad * size
        expected = oracle.update(scaled)
        counts = step >= setting.steps - last
        norm += counts * expected.square().sum().item()
        for name, optimizer in optimizers.items():
            param = params[name]
            param.detach().zero_()
            param.grad = scaled
            optimizer.step()
            update = param.detach().neg()
            largest[name] = max(largest[name], update.abs().max().item())
            if counts:
                errors[name] += (update - expected).square().sum().item()
    return {name: Outcome((errors[name] / norm) ** 0.5, largest[name]) for name in makes}
