"""Tables: optimizer configurations, lengths, positions, layouts and dtype pairings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

CHUNK = 8192
LANES = 256


@dataclass(frozen=True)
class OptimizerCase:
    """`hyper` goes into a param group, `common` are the options of the whole optimizer."""

    name: str
    rule: str
    hyper: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.rule}-{self.name}"


def adamw(name: str, common: dict[str, Any] | None = None, **hyper: Any) -> OptimizerCase:
    return OptimizerCase(name, "adamw", hyper, common or {})


def sgd(name: str, common: dict[str, Any] | None = None, **hyper: Any) -> OptimizerCase:
    return OptimizerCase(name, "sgd", hyper, common or {})


def lion(name: str, common: dict[str, Any] | None = None, **hyper: Any) -> OptimizerCase:
    return OptimizerCase(name, "lion", hyper, common or {})


# Decay, dampening and maximize are on in most of them: with zero decay, coupled is decoupled.
# With coupled decay the gradient and the decay may cancel to the last bit; AdamW with a tiny eps
# would make a full step of lr out of what is left, so eps is larger there.
ADAMW_CASES = [
    adamw("default"),
    adamw("decay", lr=0.03, weight_decay=0.3),
    adamw("no_decay", lr=0.01, weight_decay=0.0),
    adamw("coupled", lr=0.02, weight_decay=0.2, eps=1e-2, decoupled_weight_decay=False),
    adamw("maximize", lr=0.02, weight_decay=0.1, maximize=True),
    adamw("maximize_coupled", lr=0.02, weight_decay=0.2, eps=1e-2, maximize=True,
          decoupled_weight_decay=False),
    adamw("amsgrad", lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), amsgrad=True),
    adamw("amsgrad_coupled", lr=0.02, weight_decay=0.1, eps=1e-2, amsgrad=True,
          decoupled_weight_decay=False),
    adamw("betas", lr=0.01, betas=(0.5, 0.95), eps=1e-3),
    adamw("zero_betas", lr=0.01, betas=(0.0, 0.0), eps=1e-2),
    adamw("large_eps", lr=0.5, eps=0.1, weight_decay=0.05),
    adamw("clip", {"max_grad_norm": 0.7}, lr=0.02, weight_decay=0.1, eps=1e-2),
    adamw("clip_inf", {"max_grad_norm": 0.5, "norm_type": math.inf}, lr=0.02, eps=1e-2),
    adamw("clip_value", {"max_grad_value": 0.3}, lr=0.02, weight_decay=0.1, maximize=True),
    adamw(
        "all",
        {"max_grad_norm": 3.0, "max_grad_value": 0.1, "skip_nonfinite": True},
        lr=0.02, betas=(0.7, 0.8), eps=1e-4, weight_decay=0.1, amsgrad=True, maximize=True,
    ),
]  # fmt: skip
SGD_CASES = [
    sgd("default"),
    sgd("decay", lr=0.1, weight_decay=0.3),
    sgd("coupled", lr=0.1, weight_decay=0.3, decoupled_weight_decay=False),
    sgd("maximize", lr=0.1, weight_decay=0.1, maximize=True),
    sgd("momentum", lr=0.05, momentum=0.9, weight_decay=0.1),
    sgd("momentum_coupled", lr=0.05, momentum=0.9, weight_decay=0.1, decoupled_weight_decay=False),
    sgd("dampening", lr=0.05, momentum=0.8, dampening=0.4, weight_decay=0.1),
    sgd("dampening_one", lr=0.05, momentum=0.9, dampening=1.0),
    sgd("nesterov", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    sgd("nesterov_coupled_maximize", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.1,
        maximize=True, decoupled_weight_decay=False),
    sgd("clip", {"max_grad_norm": 0.7}, lr=0.3, momentum=0.9, weight_decay=0.1),
    sgd("clip_inf", {"max_grad_norm": 0.5, "norm_type": math.inf}, lr=0.3, weight_decay=0.1),
    sgd("clip_value", {"max_grad_value": 0.3}, lr=0.1, momentum=0.9, dampening=0.2, maximize=True),
    sgd(
        "all",
        {"max_grad_norm": 3.0, "max_grad_value": 0.1, "skip_nonfinite": True},
        lr=0.2, momentum=0.6, dampening=0.3, weight_decay=0.2, maximize=True,
    ),
]  # fmt: skip
LION_CASES = [
    lion("default"),
    lion("decay", lr=0.01, weight_decay=0.3),
    lion("coupled", lr=0.01, weight_decay=0.3, decoupled_weight_decay=False),
    lion("zero_betas", lr=0.01, betas=(0.0, 0.0), maximize=True),
    lion(
        "all",
        {"max_grad_norm": 3.0, "max_grad_value": 0.1, "skip_nonfinite": True},
        lr=0.02, betas=(0.7, 0.8), weight_decay=0.1, maximize=True,
    ),
]  # fmt: skip
ALL_CASES = ADAMW_CASES + SGD_CASES + LION_CASES
BY_NAME = {str(case): case for case in ALL_CASES}
# Those that exercise every term of each rule, for tests about something other than the rule.
FULL_CASES = [BY_NAME["adamw-all"], BY_NAME["sgd-all"], BY_NAME["lion-all"]]
PLAIN_CASES = [BY_NAME["adamw-decay"], BY_NAME["sgd-dampening"]]
# Those that between them run every branch of every kernel.
KERNEL_CASES = [
    *FULL_CASES,
    adamw("plain", {"max_grad_norm": 1.0}, lr=0.02, weight_decay=0.1),
    adamw("unmeasured", lr=0.01, eps=1e-2, weight_decay=0.1, decoupled_weight_decay=False),
    sgd("plain", {"max_grad_norm": 1.0}, lr=0.1, weight_decay=0.3),
    sgd("nesterov", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
]


def around(*lengths: int) -> list[int]:
    return [n + d for n in lengths for d in (-1, 0, 1)]


# Every length past three of the widest vectors, then around each block, lane and chunk size.
LENGTHS = sorted({*range(3 * 16 + 4), *around(64, 128, 256, 512, 1024, CHUNK, 2 * CHUNK)})
ODD_LENGTHS = [1, 7, 17, 65, 257, CHUNK + 1, 2 * CHUNK + 257]
SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 5), (17,), (0,), (4, 1, 7), (65, 9), (2, 3, 5, 4)]

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
DTYPE_PAIRS = list(itertools.product(FLOATS, FLOATS))
NONFINITE = [math.inf, -math.inf, math.nan]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def case_id(value: Any) -> str | None:
    """Readable ids for all the tables above."""
    if isinstance(value, OptimizerCase):
        return str(value)
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, tuple) and value and all(isinstance(v, torch.dtype) for v in value):
        return "-".join(dtype_name(v) for v in value)
    return None


def parametrize(name: str, values: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, values, ids=case_id)


Layout = Callable[[Tensor], Tensor]


def transposed(values: Tensor) -> Tensor:
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def with_gaps(values: Tensor) -> Tensor:
    """Every second element of the last dimension of a buffer."""
    buffer = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 77.0, dtype=values.dtype)
    view = buffer[..., ::2]
    view.copy_(values)
    return view


def sliced(values: Tensor) -> Tensor:
    """The inside of a larger buffer in all dimensions."""
    buffer = torch.full([n + 3 for n in values.shape], 77.0, dtype=values.dtype)
    view = buffer[tuple(slice(1, 1 + n) for n in values.shape)]
    view.copy_(values)
    return view


def at_odd_offset(values: Tensor) -> Tensor:
    buffer = torch.full((values.numel() + 8,), 77.0, dtype=values.dtype)
    view = buffer[3 : 3 + values.numel()].view(values.shape)
    view.copy_(values)
    return view


LAYOUTS: dict[str, Layout] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": transposed,
    "channels_last": channels_last,
    "with_gaps": with_gaps,
    "sliced": sliced,
    "at_odd_offset": at_odd_offset,
}
LAYOUT_SHAPE = (3, 6, 5, 7)  # four different odd and even sizes: no two axes can be mistaken
