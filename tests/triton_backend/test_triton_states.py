"""States and masters of every codec: the interpreted kernels against the CPU backend, to the bit.

No optimizer makes such states yet, so plans are made of rows as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import triton_interpreter
from cases import FLOATS, dtype_name, parametrize
from conftest import require_cpu_backend
from harness import randn
from tolerances import assert_same_bits
from torch import Tensor
from triton_twins import shifted

from fusedopt.backends.cpu import CpuBackend
from fusedopt.backends.records import CODECS, GRAD
from fusedopt.backends.triton import TritonBackend
from fusedopt.options import Options
from fusedopt.plan.plan import Row, StepInputs
from fusedopt.rules.declaration import Rule, declared

_interpreter = pytest.fixture(triton_interpreter.fixture)
LENGTHS = [5, 1400]  # whole blocks, and a tail
VALUES = {"lr": 0.1, "weight_decay": 0.01, "decoupled": 1, "eps": 1e-3}


@pytest.fixture(autouse=True)
def interpreter(_interpreter: triton_interpreter.Interpreter) -> triton_interpreter.Interpreter:
    require_cpu_backend()
    return _interpreter


class Kept:
    """Tensors of a few rows, and a plan over them."""

    def __init__(
        self, backend: CpuBackend | TritonBackend, rule: Rule, tensors: Sequence[Sequence[Tensor]]
    ) -> None:
        """``tensors``: of each row the param, the states, and the master if there is one."""
        self.tensors = [[shifted(t, t.storage_offset()) for t in own] for own in tensors]
        self.scalars = torch.zeros(8)
        self.steps = [torch.zeros(()) for _ in tensors]
        n = len(rule.states)
        rows = []
        for k, (param, *own) in enumerate(self.tensors):
            param.requires_grad_()
            row = Row(param, f"param {k}", 0)
            row.set_state(own[:n], own[n] if len(own) > n else None, self.steps[k])
            rows.append(row)
        names = tuple(state.name for state in rule.states)
        self.plan = backend.plan(rule, rows, [names])
        self.options = bytearray(
            rule.table.pack(
                *(
                    VALUES.get(name, 0.9 if kind == "d" else name != "maximize")
                    for name, kind in rule.options.items()
                )
            )
        )

    def step(self, grads: Sequence[Tensor]) -> None:
        inputs = StepInputs(
            groups=[],
            table=self.options,
            options=Options(max_grad_norm=1.0),
            scalars=self.scalars,
            measured=True,
            skip_nonfinite=True,
            grad_scale=None,
            found_inf=None,
            inf_flag=None,
            device_numbers=[],
        )
        self.grads = grads  # whose addresses follow
        for index, grad in enumerate(grads):
            at = self.plan.grads_at + index * GRAD.size
            GRAD.pack_into(self.plan._inputs, at, grad.data_ptr(), CODECS[grad.dtype], 1)
        self.plan.begin(inputs)
        self.plan.reduce()
        self.plan.exchange()
        self.plan.finalize()
        self.plan.update()


def rows_of(
    rule: Rule,
    dtype: torch.dtype,
    of_states: Sequence[torch.dtype],
    of_master: torch.dtype | None,
    offset: int = 0,
) -> list[list[Tensor]]:
    rows = []
    for n in LENGTHS:
        states = [randn(n, n + 1 + k, d).abs() for k, d in enumerate(of_states)]
        values = [randn(n, n, dtype), *states]
        if of_master is not None:
            values.append(values[0].to(of_master))
        rows.append([shifted(v, offset) for v in values])
    return rows


def run_twins(
    rule: Rule, tensors: list[list[Tensor]], of_grads: torch.dtype, streams: str,
    interpreter: triton_interpreter.Interpreter, grad_offset: int = 0,
) -> None:  # fmt: skip
    ours, twin = Kept(TritonBackend(), rule, tensors), Kept(CpuBackend(), rule, tensors)
    for step in range(2):
        grads = [shifted(randn(n, 7 * step + n, of_grads), grad_offset) for n in LENGTHS]
        ours.step(grads), twin.step(grads)
        assert interpreter.launched[-1][0] == f"update-{rule.name}-{len(rule.states)}-{streams}"
        assert ours.scalars.tolist() == twin.scalars.tolist()
        assert ours.steps == twin.steps == [step + 1] * len(LENGTHS)
        for k, both in enumerate(zip(ours.tensors, twin.tensors, strict=True)):
            for i, (a, b) in enumerate(zip(*both, strict=True)):
                assert_same_bits(a.detach(), b.detach(), f"row {k}, tensor {i}")
    for before, after in zip(tensors, ours.tensors, strict=True):
        assert all(not a.equal(b) for a, b in zip(before, after, strict=True))


PARAMS = [(torch.float32, None), (torch.bfloat16, None)] + [
    (dtype, master) for dtype in (torch.float16, torch.bfloat16) for master in FLOATS
]


@pytest.mark.parametrize(("dtype", "of_master"), PARAMS, ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_codecs(
    name: str, dtype: torch.dtype, of_master: torch.dtype | None,
    interpreter: triton_interpreter.Interpreter,
) -> None:  # fmt: skip
    """Each state has each codec once, beside other codecs."""
    rule = declared(name)
    for k, of_grads in enumerate(FLOATS):
        of_states = [FLOATS[(k + i) % 3] for i in range(len(rule.states))]
        halves = {*of_states, of_master} & {torch.float16, torch.bfloat16}
        streams = "any-states" if halves else "any"
        if not halves and {dtype, of_grads} == {torch.float32}:
            streams = "float32"
        run_twins(rule, rows_of(rule, dtype, of_states, of_master), of_grads, streams, interpreter)


@parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_not_aligned(
    dtype: torch.dtype, interpreter: triton_interpreter.Interpreter
) -> None:
    rule = declared("sgd")
    for offset, of_param in itertools.product((1, 4, 8), (torch.float32, dtype)):
        of_master = None if of_param == torch.float32 else dtype
        tensors = rows_of(rule, of_param, [dtype], of_master, offset)
        assert dtype_name(tensors[0][1].dtype) == dtype_name(dtype)
        run_twins(rule, tensors, torch.float32, "any-states", interpreter)
    for of_grads in FLOATS:
        tensors = rows_of(rule, torch.float32, [dtype], None)
        run_twins(rule, tensors, of_grads, "any-states", interpreter, grad_offset=3)
