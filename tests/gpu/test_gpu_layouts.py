"""Gradients, params and states wherever they lie in memory: the bits of the CPU backend."""

from __future__ import annotations

import gpu_helpers
import pytest
import torch
from cases import (
    CHUNK,
    DTYPE_PAIRS,
    FLOATS,
    FULL_CASES,
    LAYOUT_SHAPE,
    LAYOUTS,
    PLAIN_CASES,
    OptimizerCase,
    parametrize,
)
from gpu_helpers import by_speed, moved
from gpu_twins import Twins, grads_like, values_of
from harness import make_param, randn
from tolerances import assert_same_bits

pytestmark = gpu_helpers.on_gpu
device = gpu_helpers.device_fixture()


@parametrize("case", PLAIN_CASES)
@parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts(
    case: OptimizerCase, dtype: torch.dtype, param_layout: str, grad_layout: str
) -> None:
    values = [LAYOUTS[param_layout](randn(LAYOUT_SHAPE, 1, dtype)), randn(33, 2, dtype)]
    twins = Twins.of(case, values, max_grad_norm=1.0)
    for step in range(3):
        first, second = grads_like(twins.twin_params, step)
        twins.step([LAYOUTS[grad_layout](first), second])
        twins.check()


@parametrize("case", FULL_CASES)
@parametrize("pair", DTYPE_PAIRS)
def test_gradients_at_every_offset(
    case: OptimizerCase, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    """Views of one buffer, as a bucket of a data-parallel wrapper hands them out."""
    param_dtype, grad_dtype = pair
    lengths = by_speed([1, 7, 16, 67, 257, CHUNK + 3], [1, 7, 16, 67, 257], [17])
    offsets = range(17)
    twins = Twins.of(case, [randn(n, k, param_dtype) for k in offsets for n in lengths])
    for step in range(2):
        grads = []
        for k in offsets:
            for n in lengths:
                buffer = torch.full((n + 32,), 77.0, dtype=grad_dtype)
                grads.append(buffer[k : k + n].copy_(randn(n, 99 * step + k + n, grad_dtype)))
        twins.step(grads)
        twins.check()


@parametrize("case", PLAIN_CASES)
@parametrize("dtype", FLOATS)
def test_params_at_odd_offsets(case: OptimizerCase, dtype: torch.dtype) -> None:
    """Params that are views of a flat buffer, and nothing between them is touched."""
    buffer = randn(3000, 1, dtype)
    values = [buffer[start : start + n] for start, n in ((1, 17), (19, 1), (23, 700), (731, 2000))]
    whole = make_param(moved(buffer, gpu_helpers.DEVICE))
    twins = Twins.of(case, values)
    # `moved` gives every view a storage of its own; here they share one
    shared = [whole.detach()[v.storage_offset() :][: v.numel()] for v in values]
    for param, view in zip(twins.params, shared, strict=True):
        param.data = view
    for step in range(2):
        twins.step(grads_like(twins.twin_params, step))
        twins.check()
    between = torch.ones(3000, dtype=torch.bool)
    for value in values:
        between[value.storage_offset() :][: value.numel()] = False
    assert_same_bits(whole.detach().cpu()[between], buffer[between], "memory between the params")


def test_expanded_gradient() -> None:
    """What sum().backward() leaves: one element seen many times."""
    twins = Twins.of(PLAIN_CASES[0], [randn((30, 7), 1)], max_grad_norm=0.5)
    for value in (2.0, -3.0):
        twins.step([torch.tensor(value).expand(30, 7)])
        twins.check()


@parametrize("dtype", FLOATS)
def test_gradient_that_changes_its_layout_and_dtype(dtype: torch.dtype) -> None:
    twins = Twins.of(PLAIN_CASES[0], [randn(LAYOUT_SHAPE, 1, dtype)], max_grad_norm=1.0)
    order = ["contiguous", "transposed", None, "with_gaps", "contiguous", "channels_last"]
    for step, layout in enumerate(order):
        grad = randn(LAYOUT_SHAPE, step + 5, FLOATS[step % 3])
        twins.step([None if layout is None else LAYOUTS[layout](grad)])
        twins.check()


def test_states_at_odd_offsets() -> None:
    """A user's own state tensors: neither aligned nor allocated together."""
    twins = Twins.of(PLAIN_CASES[0], values_of([17, CHUNK + 700], torch.bfloat16))
    for step in range(4):
        twins.step(grads_like(twins.twin_params, step))
        twins.check()
        for optimizer, params in ((twins.opt, twins.params), (twins.twin, twins.twin_params)):
            name = ("exp_avg", "exp_avg_sq", "master_param", "exp_avg")[step]
            state = optimizer.state[params[1]]
            buffer = torch.zeros(state[name].numel() + 8, device=params[1].device)
            state[name] = buffer[step + 1 :][: state[name].numel()].copy_(state[name])
