"""Masters of half params, and writes to the param that did not come from the optimizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import FULL_CASES, HALVES, PLAIN_CASES, OptimizerCase, parametrize
from harness import Trio, make_param, randn
from tolerances import assert_same_bits
from torch import Tensor

SHAPES = [(5,), (33, 3), (300,)]
Write = Callable[[Tensor], None]


def make_trio(case: OptimizerCase, dtype: torch.dtype, backend: str, steps: int = 3) -> Trio:
    """Some steps on, so that the masters hold what the params cannot."""
    params = [make_param(randn(shape, k, dtype)) for k, shape in enumerate(SHAPES)]
    trio = Trio.of(case, params, backend)
    for step in range(steps):
        trio.step(grads_of(trio, step))
    trio.check()
    return trio


def grads_of(trio: Trio, step: int) -> list[Tensor]:
    return [randn(tuple(p.shape), 100 * step + k + 50, p.dtype) for k, p in enumerate(trio.params)]


def edit_first(param: Tensor) -> None:
    with torch.no_grad():
        param.view(-1)[0] = 3.25


def edit_last(param: Tensor) -> None:
    with torch.no_grad():
        param.view(-1)[-1] = -3.25


def edit_some(param: Tensor) -> None:
    with torch.no_grad():
        param.view(-1)[1::3] *= 1.5


def edit_data(param: Tensor) -> None:
    param.data[0].zero_()


def copy_all(param: Tensor) -> None:
    param.data.copy_(randn(tuple(param.shape), 4321, param.dtype))


def replace_data(param: Tensor) -> None:
    param.data = randn(tuple(param.shape), 4322, param.dtype)


def load_a_model(param: Tensor) -> None:
    model = torch.nn.ParameterDict({"weight": param})
    model.load_state_dict({"weight": randn(tuple(param.shape), 4323, param.dtype)})


WRITES: list[Write] = [edit_first, edit_last, edit_some, edit_data, copy_all, replace_data]
WRITES += [load_a_model]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@parametrize("dtype", [torch.float32, *HALVES])
@parametrize("case", FULL_CASES + PLAIN_CASES)
def test_master_follows_external_writes(
    case: OptimizerCase, dtype: torch.dtype, write: Write, backend: str
) -> None:
    trio = make_trio(case, dtype, backend)
    with trio.writing(1) as param:
        write(param)
    for step in range(3, 5):
        trio.step(grads_of(trio, step))
        trio.check()


@parametrize("dtype", HALVES)
def test_written_elements_restart_and_others_keep_every_bit(
    dtype: torch.dtype, backend: str
) -> None:
    """With lr = 0 a step shows the re-seeded master itself."""
    trio = make_trio(PLAIN_CASES[0], dtype, backend)
    trio.set(lr=0.0)
    param = trio.params[2]
    before = trio.opt.state[param]["master_param"].clone()
    assert not torch.equal(before, param.float()), "the master holds no more than the param"
    written = torch.arange(param.numel()) % 7 == 2
    with trio.writing(2), torch.no_grad():
        param[written] += 1.0
    trio.step(grads_of(trio, 9))
    master = trio.opt.state[param]["master_param"]
    assert_same_bits(master[~written], before[~written], "elements nobody wrote")
    assert_same_bits(master[written], param.detach().float()[written], "written elements")
    trio.check()


@pytest.mark.parametrize("skipped", [True, False])
@parametrize("dtype", HALVES)
@parametrize("case", FULL_CASES)
def test_write_before_a_step_that_leaves_the_param_alone(
    case: OptimizerCase, dtype: torch.dtype, skipped: bool, backend: str
) -> None:
    """Skipped, or without a gradient of this param."""
    trio = make_trio(case, dtype, backend)
    with trio.writing(1) as param:
        copy_all(param)
    written = param.detach().clone()
    first, second, third = grads_of(trio, 3)
    if skipped:
        third[150] = torch.inf
        trio.step([first, second, third], grad_scale=1.0, found_inf=1.0)
    else:
        trio.step([first, None, third])
    assert_same_bits(param.detach(), written, "the write")
    trio.step(grads_of(trio, 4))
    trio.check()


@parametrize("dtype", [torch.float32, *HALVES])
def test_write_before_the_first_step(dtype: torch.dtype, backend: str) -> None:
    """Masters are made at the first step, from what the params hold then."""
    trio = make_trio(PLAIN_CASES[0], dtype, backend, steps=0)
    with trio.writing(0) as param:
        copy_all(param)
    trio.step(grads_of(trio, 0))
    trio.check()


@parametrize("dtype", HALVES)
def test_param_is_master_rounded_to_nearest_even(dtype: torch.dtype, backend: str) -> None:
    """SGD with lr = 1 puts any wanted value into the master: ties and their neighbours."""
    half = randn(4000, 5, dtype)
    bits = half.view(torch.int16)
    neighbour = (bits + 1).view(dtype)
    tie = (half.float() + neighbour.float()) / 2
    wanted = torch.cat([tie, torch.nextafter(tie, half.float()), torch.nextafter(tie, tie * 9)])
    edges = torch.tensor([6e-8, 1e-7, 65519.0, 65520.0, 7e4, 6.1e-5, 1e-39, -65519.996, 3.39e38])
    wanted = torch.cat([wanted, edges, -edges])
    param = make_param(torch.zeros(wanted.numel(), dtype=dtype))
    trio = Trio("sgd", [{"params": [param], "lr": 1.0}], backend)
    trio.step([-wanted])
    assert_same_bits(trio.opt.state[param]["master_param"], wanted, "master")
    assert_same_bits(param.detach(), wanted.to(dtype), "param")
