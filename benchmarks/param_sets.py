"""Named parameter lists, the gradients backward() would leave on them, and the table of cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

GRAD_SCALE = 65536.0
GRAD_NORM = 10.0  # of the unscaled gradients: well above max_grad_norm, so clipping really acts
PARAM_STD = 0.1

Shape = tuple[int, ...]


def one_tensor(numel: int) -> list[Shape]:
    return [(numel,)]


def gpt(numel: int, layers: int = 12) -> list[Shape]:
    """A decoder's 148 tensors: 12 layers of 12, two embeddings and the last norm."""
    width = max(8, int(math.sqrt(0.85 * numel / (12 * layers))) // 8 * 8)
    matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    vectors = [(3 * width,), (width,), (4 * width,)] + [(width,)] * 5
    shapes: list[Shape] = [*matrices, *vectors] * layers + [(128, width), (width,)]
    rest = numel - sum(math.prod(shape) for shape in shapes)
    rows = rest // width - 1
    if rows < 1:
        raise ValueError(f"numel={numel} is too small for {layers} layers; use at least 100,000")
    # The last norm's bias takes what the embedding cannot, so that the total is exact.
    return [(rows, width), *shapes, (rest - rows * width,)]


def tiny(count: int, numel_each: int = 8) -> list[Shape]:
    return [(numel_each,)] * count


def make_params(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """The same values at every call: pipelines that are compared start from the same params."""
    rng = torch.Generator(device).manual_seed(0)
    return [
        torch.nn.Parameter(
            torch.randn(shape, generator=rng, device=device).mul_(PARAM_STD).to(dtype)
        )
        for shape in shapes
    ]


class Gradients:
    """Scaled gradients, handed out as backward() does.

    `new`, as after zero_grad(): new tensors every step, at new addresses and without a Python
    object yet, so that looking them up is part of the step. `kept`, as after
    zero_grad(set_to_none=False): other values in the same tensors. `bucket`, as DDP's
    gradient_as_bucket_view=True leaves them: kept views into one buffer, here all off alignment.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        kind: str = "new",
        device: torch.device | str = "cpu",
    ) -> None:
        self.kind = kind
        numels = [math.prod(shape) for shape in shapes]
        offsets = [8 * i % 4096 for i in range(len(shapes))]  # equal shapes get different values
        rng = torch.Generator(device).manual_seed(1)
        std = GRAD_SCALE * GRAD_NORM / math.sqrt(sum(numels))
        pool = torch.randn(max(numels) + 4096, generator=rng, device=device)
        self._pool = pool.mul_(std).to(dtype)
        self._sources = [
            self._pool[offset : offset + numel].view(shape)
            for shape, numel, offset in zip(shapes, numels, offsets, strict=True)
        ]

    def backward(self, params: Sequence[Tensor]) -> None:
        kept = [param.grad for param in params if param.grad is not None]
        if self.kind == "bucket" and not kept:
            kept = self._bucket_views(params)
        if self.kind != "new" and kept:
            torch._foreach_copy_(kept, self._sources)
            return
        del kept
        for param in params:
            param.grad = None
        torch.autograd.backward(params, self._sources)

    def use(self, sources: Sequence[Tensor]) -> None:
        """Hand out these gradients instead, the same on every device."""
        self._sources = list(sources)

    def _bucket_views(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Sets the params' gradients to views into one new buffer, the first at its element 1."""
        numels = [param.numel() for param in params]
        bucket = torch.empty(1 + sum(numels), dtype=self._pool.dtype, device=self._pool.device)
        views = bucket[1:].split(numels)
        for param, view in zip(params, views, strict=True):
            param.grad = view.view(param.shape)
        return [param.grad for param in params if param.grad is not None]

    def multiply(self, power_of_two: float) -> None:
        self._pool.mul_(power_of_two)


@dataclass(frozen=True)
class Comparison:
    """`pipeline` is timed between samples of `reference`; the figure is how many times faster."""

    pipeline: str
    reference: str
    target: float | None = None


@dataclass(frozen=True)
class Case:
    name: str
    label: str
    shapes: Callable[[], list[Shape]]
    dtype: torch.dtype
    comparisons: tuple[Comparison, ...]

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes())


# What is not named here is measured for information.
_TARGETS: dict[str, dict[tuple[str, str], float]] = {
    "adamw-gpt-1M": {("fusedopt_adamw", "adamw_fused"): 10.0},
    "adamw-one-1M": {("fusedopt_adamw", "adamw_fused"): 3.5},
    "adamw-gpt-10M": {("fusedopt_adamw", "adamw_fused"): 2.4},
    "adamw-one-10M": {("fusedopt_adamw", "adamw_fused"): 1.7},
    "adamw-gpt-100M": {
        ("fusedopt_adamw", "adamw_fused"): 1.7,
        ("fusedopt_adamw", "adamw_foreach"): 4.0,
        ("fusedopt_adamw", "adamw_deepspeed"): 1.7,
        ("fusedopt_adamw", "stream_huge"): 0.95,
    },
    "sgd-gpt-100M": {("fusedopt_sgd", "sgd_fused"): 1.65},
    "bf16-gpt-100M": {("fusedopt_adamw_bf16", "adamw_bf16_torch_ops"): 2.0},
    "adamw-tiny": {("fusedopt_adamw", "adamw_fused"): 25.0},
}

_AGAINST_FUSED = (
    ("fusedopt_adamw", "adamw_fused"),
    ("fusedopt_adamw_stock_scaler", "adamw_fused"),
)
_ADAMW_MANY = (
    *_AGAINST_FUSED,
    ("adamw_foreach", "adamw_fused"),
    ("adamw_deepspeed", "adamw_fused"),
    ("fusedopt_adamw", "adamw_foreach"),
    ("fusedopt_adamw", "adamw_deepspeed"),
    ("fusedopt_adamw", "stream_huge"),
    ("fusedopt_adamw", "stream_4k"),
)
_ADAMW_ONE = (*_AGAINST_FUSED, ("fusedopt_adamw", "stream_huge"))
_SGD = (("fusedopt_sgd", "sgd_fused"),)
_BF16 = (("fusedopt_adamw_bf16", "adamw_bf16_torch_ops"),)
_SIZES = {"1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}


def _case(
    name: str,
    label: str,
    shapes: Callable[[], list[Shape]],
    pairs: Sequence[tuple[str, str]],
    dtype: torch.dtype = torch.float32,
) -> Case:
    targets = _TARGETS.get(name, {})
    comparisons = tuple(Comparison(*pair, targets.get(pair)) for pair in pairs)
    return Case(name, label, shapes, dtype, comparisons)


def all_cases() -> dict[str, Case]:
    cases = [
        _case("adamw-tiny", "AdamW fp32, 1,000 tensors of 8", partial(tiny, 1000), _AGAINST_FUSED)
    ]
    for size, numel in _SIZES.items():
        many, one = partial(gpt, numel), partial(one_tensor, numel)
        in_148 = f"{size} in 148 tensors"
        cases += [
            _case(f"adamw-gpt-{size}", f"AdamW fp32, {in_148}", many, _ADAMW_MANY),
            _case(f"adamw-one-{size}", f"AdamW fp32, {size} in 1 tensor", one, _ADAMW_ONE),
            _case(f"sgd-gpt-{size}", f"SGD momentum fp32, {in_148}", many, _SGD),
            _case(
                f"bf16-gpt-{size}",
                f"AdamW bf16 with fp32 masters, {in_148}",
                many,
                _BF16,
                torch.bfloat16,
            ),
        ]
    return {case.name: case for case in cases}


QUICK_CASES = ("adamw-tiny", "adamw-gpt-1M", "adamw-one-1M", "sgd-gpt-1M", "bf16-gpt-1M")
