"""States and masters of every codec: the interpreted kernels against the CPU backend, to the bit.

No option makes such states yet: they are put in the place of those that are there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import triton_interpreter
from cases import FLOATS, FULL_CASES, HALVES, OptimizerCase, parametrize
from conftest import require_cpu_backend
from gpu_twins import grads_like
from harness import randn
from torch import Tensor
from triton_twins import TritonTwins, shifted

from fusedopt.plan import state as plan_state

_interpreter = pytest.fixture(triton_interpreter.fixture)
LENGTHS = [5, 1400]  # whole blocks, and a tail
ADAMW, SGD, _ = FULL_CASES
MASTER = "master_param"


@pytest.fixture(autouse=True)
def interpreter(_interpreter, monkeypatch):
    require_cpu_backend()
    fits = plan_state.fits

    def fits_narrow(value: object, *like: Tensor) -> bool:
        return fits(value.float() if isinstance(value, Tensor) else value, *like)

    monkeypatch.setattr(plan_state, "fits", fits_narrow)
    return _interpreter


def twins_of(
    case: OptimizerCase,
    dtype: torch.dtype,
    codec: Callable[[str], torch.dtype],
    has_master: bool,
    offset: int = 0,
) -> TritonTwins:
    """With params, and states and masters of the codec of their name, that begin at ``offset``."""
    values = [shifted(randn(n, n, dtype), offset) for n in LENGTHS]
    twins = TritonTwins.of(case, values, master_weights=has_master)
    both = ((twins.opt, twins.params), (twins.twin, twins.twin_params))
    for optimizer, params in both:
        optimizer.init_state()
        for param in params:
            state = optimizer.state[param]
            for seed, name in enumerate(sorted(state.keys() - {"step"})):
                made = state[name] if name == MASTER else randn(param.numel(), seed).abs()
                state[name] = shifted(made.to(codec(name)), offset)
    return twins


PARAMS = [(torch.float32, None), (torch.bfloat16, None), *itertools.product(HALVES, FLOATS)]


@pytest.mark.parametrize(("dtype", "of_master"), PARAMS, ids=str)
@parametrize("case", [ADAMW, SGD])
def test_codecs(case, dtype, of_master, interpreter):
    """Each state has each codec once, beside other codecs."""
    names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"] if case is ADAMW else ["momentum_buffer"]
    for k, of_grads in enumerate(FLOATS):
        codecs = {name: FLOATS[(k + i) % 3] for i, name in enumerate(names)}
        codecs |= {} if of_master is None else {MASTER: of_master}
        halves = set(HALVES) & {*codecs.values()}
        streams = "float32" if {dtype, of_grads} == {torch.float32} else "any"
        twins = twins_of(case, dtype, codecs.__getitem__, has_master=of_master is not None)
        twins.run(of_grads, steps=1)
        expected = f"update-{case.rule}-{len(names)}-{'any-states' if halves else streams}"
        assert interpreter.launched[-1][0] == expected
        for param in twins.params:
            state = twins.opt.state[param]
            assert {name: state[name].dtype for name in state if name != "step"} == codecs


@parametrize("dtype", HALVES)
def test_what_is_not_aligned(dtype, interpreter):
    for offset, of_param in itertools.product((1, 4, 8), (torch.float32, dtype)):
        twins_of(SGD, of_param, lambda _: dtype, of_param == dtype, offset).run(steps=1)
    for of_grads in FLOATS:
        twins = twins_of(SGD, torch.float32, lambda _: dtype, has_master=False)
        twins.step([shifted(grad, 3) for grad in grads_like(twins.params, 0, of_grads)])
        twins.check()
    assert {name for name, _ in interpreter.launched if name.startswith("update")} == {
        "update-sgd-1-any-states"
    }
