"""Where tensors lie in memory: offsets, strides and gaps; nothing beside them is touched."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CHUNK,
    FULL_CASES,
    LAYOUT_SHAPE,
    LAYOUTS,
    ODD_LENGTHS,
    OptimizerCase,
    parametrize,
)
from harness import Trio, check_together, make_param, randn
from tolerances import assert_same_bits, bits
from torch import Tensor

GUARD = 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_guards(values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """`values` at `offset` inside a larger buffer: the view and the buffer."""
    buffer = randn(values.numel() + 2 * GUARD, 99, values.dtype)
    view = buffer[offset : offset + values.numel()]
    view.copy_(values)
    return view, buffer


@parametrize("case", FULL_CASES)
@parametrize("dtype", DTYPES)
def test_storage_offsets(case: OptimizerCase, dtype: torch.dtype, backend: str) -> None:
    """Params and grads at every offset within a vector, each at another one than its partner."""
    offsets = range(18)
    lengths = [(1, 15, 16, 17, 33, 64, 130)[n % 7] for n in offsets]
    views = [in_guards(randn(n, k, dtype), k) for k, n in enumerate(lengths)]
    trio = Trio.of(case, [make_param(view) for view, _ in views], backend)
    before = [buffer.clone() for _, buffer in views]
    for step in range(3):
        grads = [
            in_guards(randn(n, 50 * step + k, dtype), (7 * k + step) % 18)[0]
            for k, n in enumerate(lengths)
        ]
        trio.step(grads)
        trio.check()
    for (_, buffer), old, offset, length in zip(views, before, offsets, lengths, strict=True):
        assert_same_bits(buffer[:offset], old[:offset], f"before offset {offset}")
        rest = slice(offset + length, None)
        assert_same_bits(buffer[rest], old[rest], f"behind {length} elements at {offset}")


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(param_layout: str, grad_layout: str, dtype: torch.dtype, backend: str) -> None:
    """Every layout of the param with every layout of the grad, element by element."""
    for case in FULL_CASES:
        param = make_param(LAYOUTS[param_layout](randn(LAYOUT_SHAPE, 1, dtype)))
        trio = Trio.of(case, [param, make_param(randn(9, 2, dtype))], backend)
        for step in range(3):
            grad = LAYOUTS[grad_layout](randn(LAYOUT_SHAPE, step + 5, dtype))
            trio.step([grad, randn(9, step + 50, dtype)])
            trio.check()
        assert param.stride() == LAYOUTS[param_layout](torch.empty(LAYOUT_SHAPE)).stride()


@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_layout_changes_no_bit(param_layout: str, backend: str) -> None:
    """With clipping off an element's update depends on that element alone."""
    for case in FULL_CASES:
        common = {k: v for k, v in case.common.items() if k == "max_grad_value"}
        plain = OptimizerCase(case.name, case.rule, case.hyper, common)
        results = []
        for layout in (torch.Tensor.clone, LAYOUTS[param_layout]):
            trio = Trio.of(plain, [make_param(layout(randn(LAYOUT_SHAPE, 1)))], backend)
            for step in range(3):
                trio.step([randn(LAYOUT_SHAPE, step + 5)])
            results.append(trio.params[0].detach().contiguous())
        assert_same_bits(results[0], results[1], str(case))


@parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_has_gaps", [False, True])
def test_gaps_are_not_written(dtype: torch.dtype, grad_has_gaps: bool, backend: str) -> None:
    for case in FULL_CASES:
        trios = []
        for length in ODD_LENGTHS:
            buffer = randn(2 * length + 6, length, dtype)
            param = make_param(buffer[3 : 3 + 2 * length : 2])
            before = buffer.clone()
            trio = Trio.of(case, [param], backend)
            for step in range(2):
                stride = 3 if grad_has_gaps else 1
                trio.step([randn(stride * length, step, dtype)[::stride]])
            trios.append(trio)
            gaps = torch.ones_like(buffer, dtype=torch.bool)
            gaps[3 : 3 + 2 * length : 2] = False
            assert torch.equal(bits(buffer)[gaps], bits(before)[gaps]), f"length {length}"
            assert not torch.equal(buffer[~gaps], before[~gaps]), f"length {length} did not move"
        check_together(trios)


@parametrize("dtype", DTYPES)
def test_expanded_grads(dtype: torch.dtype, backend: str) -> None:
    """What backward() of a sum leaves: one element that stands for all."""
    for case in FULL_CASES:
        shapes: list[tuple[int, ...]] = [(7,), (CHUNK + 3,), (5, 33), (4, 3)]
        trio = Trio.of(
            case, [make_param(randn(s, k, dtype)) for k, s in enumerate(shapes)], backend
        )
        for step in range(3):
            one = randn(1, step, dtype)
            row = randn((1, 33), step + 10, dtype)
            column = randn((4, 1), step + 20, dtype)
            grads = [one.expand(7), one.expand(CHUNK + 3), row.expand(5, 33), column.expand(4, 3)]
            trio.step(grads)
            trio.check()


def test_grad_that_is_a_view_of_a_bucket(backend: str) -> None:
    """DDP and FSDP keep grads in one buffer and overwrite it: nothing may alias it."""
    for case in FULL_CASES:
        lengths = [5, 17, 64, 1]
        bucket = torch.empty(sum(lengths))
        trio = Trio.of(case, [make_param(randn(n, n)) for n in lengths], backend)
        for step in range(4):
            bucket.copy_(randn(bucket.numel(), step))
            trio.step(list(bucket.split(lengths)))
            bucket.fill_(float("nan"))
            trio.check()


def test_state_has_the_strides_of_the_param(backend: str) -> None:
    for rule, kinds in {"adamw": ["exp_avg", "exp_avg_sq"], "sgd": ["momentum_buffer"]}.items():
        for layout in ("contiguous", "transposed", "channels_last"):
            param = make_param(LAYOUTS[layout](randn(LAYOUT_SHAPE, 1, torch.bfloat16)))
            hyper = {"momentum": 0.9} if rule == "sgd" else {}
            trio = Trio(rule, [{"params": [param], **hyper}], backend)
            trio.step([randn(LAYOUT_SHAPE, 2, torch.bfloat16)])
            for kind in [*kinds, "master_param"]:
                assert trio.opt.state[param][kind].stride() == param.stride(), (kind, layout)
