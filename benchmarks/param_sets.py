"""Named parameter lists, their params, and the gradients that backward() would leave on them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

GRAD_SCALE = 65536.0
GRAD_NORM = 10.0  # of the unscaled gradients: well above max_grad_norm, so clipping really acts
PARAM_STD = 0.1

Shape = tuple[int, ...]


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


def equal(count: int, numel: int) -> list[Shape]:
    return [(numel,)] * count


one_tensor = partial(equal, 1)


def resnet50() -> list[Shape]:
    """torchvision's resnet50: 161 tensors, 25,557,032 elements."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            if block == 0:  # the way past the block
                convolutions.append((out, channels, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, (convolution[0],), (convolution[0],)]
            channels = out
    return [*shapes, (1000, channels), (1000,)]


def gpt2() -> list[Shape]:
    """GPT-2 (small), output tied to the embedding: 148 tensors, 124,439,808 elements."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    layer = [*norm, *attention, *norm, *mlp]
    return [(50257, width), (1024, width), *layer * 12, *norm]


def llama_3_2_1b() -> list[Shape]:
    """Llama-3.2-1B, output tied to the embedding: 146 tensors, 1,235,814,400 elements."""
    width, kv_width, mlp_width = 2048, 512, 8192
    attention: list[Shape] = [(width, width), (kv_width, width), (kv_width, width), (width, width)]
    mlp: list[Shape] = [(mlp_width, width), (mlp_width, width), (width, mlp_width)]
    return [(128256, width), *[*attention, *mlp, (width,), (width,)] * 16, (width,)]


def ragged(count: int = 2000, longest: int = 5000) -> list[Shape]:
    rng = random.Random(0)
    return [(rng.randint(1, longest),) for _ in range(count)]


# What `--params` takes. Real models by the shapes of their parameters; nothing is downloaded.
LISTS: dict[str, Callable[[], list[Shape]]] = {
    "one-1M": partial(one_tensor, 1_000_000),
    "one-10M": partial(one_tensor, 10_000_000),
    "one-100M": partial(one_tensor, 100_000_000),
    "tiny-1000x8": partial(equal, 1000, 8),
    "equal-300x1k": partial(equal, 300, 1000),
    "ragged": ragged,
    "gpt-300k": partial(gpt, 300_000),
    "gpt-1M": partial(gpt, 1_000_000),
    "gpt-3M": partial(gpt, 3_000_000),
    "gpt-10M": partial(gpt, 10_000_000),
    "gpt-30M": partial(gpt, 30_000_000),
    "gpt-100M": partial(gpt, 100_000_000),
    "resnet50": resnet50,
    "gpt2-124M": gpt2,
    "llama-3.2-1B": llama_3_2_1b,
}


def make_params(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """The same values at every call: pipelines that are compared start from the same params."""
    rng = torch.Generator(device).manual_seed(0)
    values = (torch.randn(shape, generator=rng, device=device) for shape in shapes)
    return [torch.nn.Parameter(value.mul_(PARAM_STD).to(dtype)) for value in values]


class Gradients:
    """Scaled gradients, handed out as backward() does.

    `new`, as after zero_grad(): new tensors every step, at new addresses and without a Python
    object yet, so that looking them up is part of the step. `kept`, as after
    zero_grad(set_to_none=False): other values in the same tensors. `bucket`, as DDP's
    gradient_as_bucket_view=True leaves them: kept views into one buffer, here all off alignment.
    """

    def __init__(
        self, shapes: Sequence[Shape], dtype: torch.dtype, kind: str = "new",
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
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
        if self.kind == "bucket" and params[0].grad is None:
            self._give_bucket_views(params)
        if self.kind != "new" and params[0].grad is not None:
            torch._foreach_copy_([param.grad for param in params], self._sources)
            return
        for param in params:
            param.grad = None
        torch.autograd.backward(params, self._sources)

    def use(self, sources: Sequence[Tensor]) -> None:
        """Hand out these gradients instead, the same on every device."""
        self._sources = list(sources)

    def _give_bucket_views(self, params: Sequence[Tensor]) -> None:
        """Into one new buffer, the first at its element 1."""
        numels = [param.numel() for param in params]
        bucket = torch.empty(1 + sum(numels), dtype=self._pool.dtype, device=self._pool.device)
        for param, view in zip(params, bucket[1:].split(numels), strict=True):
            param.grad = view.view(param.shape)

    def multiply(self, power_of_two: float) -> None:
        self._pool.mul_(power_of_two)
