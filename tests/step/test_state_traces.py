"""Long traces of gradients: states of fewer bits neither stall, nor jump, nor drift away."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import (
    DECAYED,
    LARGEST_UPDATE,
    STANDS_STILL,
    UPDATE_ERROR,
    UPDATE_ERROR_OF_ANY_SIZE,
)
from torch import Tensor

import fusedopt
import fusedopt.codecs as codecs

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
traces = pytest.importorskip("benchmarks.traces")

SETTING = traces.Setting(n=4096)
OTHER_SIZES = (1e-17, 1e7)  # elsewhere between two powers of two, where cells are coarser or finer
FORMS = ("bf16", "8bit")


@pytest.fixture(autouse=True)
def _one_thread(restore_threads: None) -> None:
    """So few elements gain nothing from a second one."""
    torch.set_num_threads(1)


def adamw(form: Any) -> Any:
    return partial(fusedopt.FusedAdamW, state_dtype=form, min_8bit_size=0, backend="cpu")


@pytest.mark.parametrize("trace", traces.TRACES)
def test_updates_are_those_of_float64(trace: str, cpu_backend: str) -> None:
    makes = {form: adamw(form) for form in FORMS}
    for form, found in traces.follow(traces.TRACES[trace](SETTING), makes, SETTING).items():
        assert found.error <= UPDATE_ERROR[form], form
        assert found.largest <= LARGEST_UPDATE, form


@pytest.mark.parametrize("size", [2.0**-56, 2.0**-30, 1.0, 2.0**23, *OTHER_SIZES])
def test_the_size_of_gradients_does_not_matter(size: float, cpu_backend: str) -> None:
    """Scales of fp16 would end at 1e-7 and at 1e7."""
    gradients = traces.homogeneous(SETTING)
    found = traces.follow(gradients, {"8bit": adamw("8bit")}, SETTING, size)["8bit"]
    bound = UPDATE_ERROR["8bit"] if size in OTHER_SIZES else UPDATE_ERROR_OF_ANY_SIZE
    assert found.error <= bound and found.largest <= LARGEST_UPDATE


def values_of(own: dict[str, Tensor], name: str) -> Tensor:
    if name in own:
        return own[name].float()
    scales = own[f"{name}_log8_scale"]
    return codecs.decode(codecs.LOG8_POSITIVE, own[f"{name}_log8"], scales, None)


@pytest.mark.parametrize("form", FORMS)
def test_an_average_of_squares_decays_to_the_end(form: str, cpu_backend: str) -> None:
    """To nearest it would stand still: beta2 moves it by a thousandth, less than half a step."""
    param = torch.nn.Parameter(torch.zeros(4096))
    opt = adamw(form)([param])
    size = torch.exp(torch.randn(4096))
    expected = torch.zeros(4096, dtype=torch.float64)
    for step in range(3000):
        grad = size if step < 200 else torch.zeros(4096)
        param.grad = grad.clone()
        expected = 0.999 * expected + 0.001 * grad.double().square()
        opt.step()
    share = (values_of(opt.state[param], "exp_avg_sq") / expected).mean().item()
    low, high = DECAYED[form]
    assert low <= share <= high


@pytest.mark.parametrize("squares", ["8bit", "bf16"])
def test_elements_whose_gradients_stop_stand_still(squares: str, cpu_backend: str) -> None:
    """Their exp_avg becomes zero: what is left of it would be divided by what is left of
    exp_avg_sq, which decays as well."""
    n = 1024
    alive = (torch.arange(n) % 2).float()
    param = torch.nn.Parameter(torch.zeros(n))
    opt = adamw({"exp_avg": "8bit", "exp_avg_sq": squares})([param], lr=1.0, weight_decay=0.0)
    for step in range(200 + 10_000):
        param.detach().zero_()
        param.grad = torch.randn(n) * (alive if step >= 200 else 1.0)
        opt.step()
    dead, living = param.detach()[alive == 0].abs(), param.detach()[alive == 1].abs()
    assert dead.max() <= STANDS_STILL < living.mean()
