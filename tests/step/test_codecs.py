"""Every codec for every stream: the rule runs in fp32, whatever memory holds.

No optimizer makes states of 16 bits yet, so plans are made here from rows that have some.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import FLOATS, HALVES, dtype_name
from conftest import require_cpu_backend
from harness import FUSED, assert_same_bits, randn
from torch import Tensor

from fusedopt.backends.cpu import CpuBackend
from fusedopt.options import Options
from fusedopt.plan.options_table import Line, pack
from fusedopt.plan.plan import GRAD_MULT, N_STEP_SCALARS, Plan, Row, StepInputs
from fusedopt.rules.declaration import Rule

N = 8192 + 517
# Options under which every state of a rule is there.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": True, "weight_decay": 0.1, "lr": 0.02},
    "sgd": {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.1},
    "lion": {"weight_decay": 0.1, "lr": 0.02},
}


class Streams:
    """One tensor's streams, of any dtypes, and one step over them."""

    def __init__(self, rule: Rule, param: Tensor, master: Tensor | None, states: list[Tensor]):
        self.rule, self.master, self.states = rule, master, states
        self.param = torch.nn.Parameter(param)
        self.step_count = torch.tensor(3.0)

    def step(self, grad: Tensor) -> None:
        cls = FUSED[self.rule.name]
        group = cls([self.param], **OPTIONS[self.rule.name]).param_groups[0]
        row = Row(self.param, "param", 0)
        row.set_state(self.states, self.master, self.step_count)
        layout = [Line(self.rule).state_names(group)]
        plan: Plan = CpuBackend().plan(self.rule, [row], layout)
        scalars = torch.zeros(N_STEP_SCALARS)
        table, numbers = pack([group], Line(self.rule), lambda t: False, lambda i, g: None)
        whole = Options(max_grad_norm=1.0, max_grad_value=0.5)
        inputs = StepInputs([group], table, whole, scalars, True, True, None, None, None, numbers)
        plan._use_grad(0, grad)
        plan.begin(inputs)
        plan.reduce()
        plan.finalize()
        plan.update()
        assert scalars[GRAD_MULT] != 0

    def tensors(self) -> list[Tensor]:
        masters = [] if self.master is None else [self.master]
        return [self.param.detach(), *masters, *self.states]


def streams(
    rule: Rule, param: torch.dtype, states: list[torch.dtype], master: torch.dtype | None
) -> Streams:
    values = [randn(N, k + 1).abs().to(dtype) for k, dtype in enumerate(states)]
    start = randn(N, 77)
    own = None if master is None else start.to(master)
    shown = start.to(param) if own is None else own.float().to(param)
    return Streams(rule, shown, own, values)


def in_float(one: Streams) -> Streams:
    """The same numbers, all of them fp32, in one stream for param and master."""
    param = one.param.detach() if one.master is None else one.master
    return Streams(one.rule, param.float().clone(), None, [s.float().clone() for s in one.states])


def check(one: Streams, grad: Tensor) -> None:
    wide = in_float(one)
    dtypes = [t.dtype for t in one.tensors()]
    one.step(grad)
    wide.step(grad)
    expected = [wide.param.detach(), *wide.states]
    if one.master is not None:
        expected.insert(0, wide.param.detach())
    for found, value, dtype in zip(one.tensors(), expected, dtypes, strict=True):
        assert found.dtype == dtype
        value = value.to(dtype)
        assert torch.equal(found.isnan(), value.isnan())  # whose payloads are nobody's promise
        assert_same_bits(found.nan_to_num(7.0), value.nan_to_num(7.0), str(dtype))
    assert one.step_count == 4.0


def states_of(rule: Rule) -> list[list[torch.dtype]]:
    """Every pairing of codecs for two states; the third takes turns."""
    n = len(rule.states)
    return [list(each) for each in itertools.product(FLOATS, repeat=n)]


CASES = [
    pytest.param(cls.rule, dtypes, id=f"{name}-{'-'.join(map(dtype_name, dtypes))}")
    for name, cls in FUSED.items()
    for dtypes in states_of(cls.rule)
]


@pytest.mark.parametrize("param", FLOATS, ids=dtype_name)
@pytest.mark.parametrize(("rule", "states"), CASES)
def test_states(rule: Rule, states: list[torch.dtype], param: torch.dtype) -> None:
    require_cpu_backend()
    check(streams(rule, param, states, None), randn(N, 5))


@pytest.mark.parametrize("master", FLOATS, ids=dtype_name)
@pytest.mark.parametrize("param", HALVES, ids=dtype_name)
@pytest.mark.parametrize(("rule", "states"), CASES[:: max(1, len(CASES) // 9)])
def test_masters(
    rule: Rule, states: list[torch.dtype], param: torch.dtype, master: torch.dtype
) -> None:
    require_cpu_backend()
    check(streams(rule, param, states, master), randn(N, 5, torch.bfloat16))


def test_what_no_number_survives() -> None:
    """inf, NaN and the largest numbers go through a state and come back as they went in."""
    require_cpu_backend()
    rule = FUSED["adamw"].rule
    one = streams(rule, torch.float32, [torch.bfloat16, torch.float16, torch.float32], None)
    one.states[0][:3] = torch.tensor([math.inf, math.nan, 3e38])
    one.states[1][:3] = torch.tensor([65504.0, math.inf, math.nan])
    check(one, randn(N, 5))
