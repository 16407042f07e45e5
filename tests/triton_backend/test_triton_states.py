"""Coded states, masters and params: the interpreted kernels against the CPU backend, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_interpreter
from cases import FLOATS, OptimizerCase, adamw, around, lion, sgd
from conftest import require_cpu_backend
from gpu_twins import grads_like
from harness import randn
from tolerances import same_bits
from torch import Tensor
from triton_twins import TritonTwins, shifted

from fusedopt.plan import rows

_interpreter = pytest.fixture(triton_interpreter.fixture)

ADAMW = adamw("plain", {"max_grad_norm": 3.0}, lr=0.02, weight_decay=0.1)
MOMENTUM = sgd("momentum", lr=0.05, momentum=0.9, dampening=0.4, weight_decay=0.1)
LION = lion("plain", {"max_grad_value": 0.3}, lr=0.01, weight_decay=0.1)
CASES = [
    ADAMW,
    adamw("amsgrad", lr=0.02, betas=(0.8, 0.9), amsgrad=True, maximize=True),
    sgd("plain", lr=0.1, weight_decay=0.3),
    MOMENTUM,
    sgd("nesterov", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    LION,
]
# Every dtype of params with every way to keep what it drops.
PRECISIONS: list[tuple[torch.dtype, Any]] = [
    (torch.float32, None),
    *((torch.float16, master) for master in (None, False, "remainder")),
    *((torch.bfloat16, master) for master in (None, False, "remainder", "remainder8", "dither")),
]
SMALL = (torch.bfloat16, "remainder8")
FEW = [(torch.float32, None), (torch.float16, "remainder"), SMALL]  # between them, all widths


@pytest.fixture(autouse=True)
def interpreter(_interpreter):
    require_cpu_backend()
    return _interpreter


LENGTHS = [5, 127, 513]  # of a param for each dtype of gradients


def forms_of(case: OptimizerCase) -> list[Any]:
    """Every way to keep the states, of which no two need be alike."""
    if case.name == "plain" and case.rule == "sgd":
        return [None]
    if case.hyper.get("amsgrad"):
        return [None, "bf16", {"exp_avg": "bf16"}, {"exp_avg_sq": "bf16", "max_exp_avg_sq": "bf16"}]
    mixed = [{"exp_avg": "8bit", "exp_avg_sq": "bf16"}, {"exp_avg_sq": "8bit"}]
    return [None, "bf16", "8bit", *(mixed if case.rule == "adamw" else [])]


def twins_of(
    case: OptimizerCase, values: list[Tensor], form: Any, master: Any = None
) -> TritonTwins:
    options = {"state_dtype": form, "master_weights": master, "min_8bit_size": 1}
    return TritonTwins.of(case, values, **options)


def all_tensors(twins: TritonTwins) -> list[Tensor]:
    """Params and all of their state."""
    states = (v for p in twins.params for v in twins.opt.state[p].values())
    return [*twins.params, *(value for value in states if isinstance(value, Tensor))]


MODES = [
    (case, *precision)
    for case in CASES
    for precision in (PRECISIONS if case is ADAMW else [*FEW[1:], (torch.bfloat16, "dither")])
]


@pytest.mark.parametrize(("case", "dtype", "master"), MODES, ids=str)
def test_every_mode(case, dtype, master, interpreter):
    """In one optimizer, so that every row is beside others: each form of the states is a group, and
    each dtype of gradients has a param in it."""
    forms = forms_of(case)
    groups = [
        {"params": [randn(n, n + k, dtype) for n in LENGTHS], "state_dtype": form, **case.hyper}
        for k, form in enumerate(forms)
    ]
    options = {"master_weights": master, "min_8bit_size": 1, **case.common}
    twins = TritonTwins(case.rule, groups, **options)
    for k in range(2 if (dtype, master) in FEW else 1):
        rotated = [FLOATS[(k + i + i // 3) % 3] for i in range(len(twins.params))]
        twins.run(rotated, steps=1, first=k)
    is_coded = len(forms) > 1 or master in ("remainder", "remainder8", "dither")
    assert interpreter.launched[-1][0].endswith("-coded") == is_coded


@pytest.mark.parametrize("precision", FEW, ids=str)
def test_lengths(precision):
    """Whole blocks and scales, their tails; once also a second chunk of a row."""
    dtype, master = precision
    lengths = [8193, 8192 + 129] if precision == SMALL else [*around(128, 256, 512)]
    twins_of(ADAMW, [randn(n, n, dtype) for n in lengths], "8bit", master).run(steps=2)


@pytest.mark.parametrize("precision", FEW[::2], ids=str)
def test_what_is_not_aligned(precision):
    """Params, states, masters, scales, or gradients alone."""
    dtype, master = precision
    for what, offset in [("params", 4), ("params", 1), ("states", 4), ("states", 1), ("grads", 1)]:
        by = {each: offset if each == what else 0 for each in ("params", "states", "grads")}
        values = [shifted(randn(n, n, dtype), by["params"]) for n in (5, 515)]
        twins = twins_of(ADAMW, values, {"exp_avg": "8bit", "exp_avg_sq": "bf16"}, master)
        for optimizer, params in twins.both:
            optimizer.init_state()
            for param in params:
                state = optimizer.state[param]
                for name in state.keys() - {"step"}:
                    state[name] = shifted(state[name], by["states"])
        for k in range(2):
            grads = grads_like(twins.params, k, torch.bfloat16)
            twins.step([shifted(grad, by["grads"]) for grad in grads])
            twins.check()


@pytest.mark.parametrize(("dtype", "master"), [*FEW, PRECISIONS[-1]], ids=str)
def test_no_byte_moves_in_a_skipped_step(dtype, master):
    twins = twins_of(ADAMW, [randn(n, n, dtype) for n in (3, 200)], "8bit", master)
    twins.run(steps=1)
    before = [tensor.clone() for tensor in all_tensors(twins)]
    twins.step(grads_like(twins.params, 1), found_inf=1.0)
    for old, new in zip(before, all_tensors(twins), strict=True):
        assert same_bits(old, new.detach())
    twins.run(steps=1, first=2)


@pytest.mark.parametrize(("dtype", "master"), FEW, ids=str)
def test_what_is_not_finite_and_what_nearly_is(dtype, master):
    """Blocks of scales with infinities, NaNs, and what is larger than the largest scale."""
    for case, form in ((ADAMW, "8bit"), (MOMENTUM, "8bit"), (LION, "bf16")):
        case = OptimizerCase(case.name, case.rule, case.hyper)
        twins = twins_of(case, [randn(n, n, dtype) for n in (9, 320)], form, master)
        most = torch.finfo(torch.float32).max
        for k, size in enumerate((1.0, 1e19, most, 1e-30)):
            grads = grads_like(twins.params, k, torch.float32)
            for grad in grads:
                grad.mul_(0.2 * size)
                grad[3::7] = most * (k == 2)
                grad[300:301] = torch.inf
                grad[301:302] = torch.nan if k == 1 else 0.0
            twins.step(grads)
            twins.check()


@pytest.mark.parametrize(("dtype", "master"), [PRECISIONS[1], *PRECISIONS[3:]], ids=str)
def test_what_others_write_to_params(dtype, master):
    twins = twins_of(MOMENTUM, [randn(n, n, dtype) for n in (9, 140)], "bf16", master)
    for k in range(3):
        twins.run(steps=1, first=k)
        for param in (*twins.params, *twins.twin_params):
            with torch.no_grad():
                param[k::3] = 0.7
                param[4] = (torch.inf, -0.0, torch.nan)[k]


def test_dithers_follow_the_count_of_steps_and_the_place_in_the_whole(monkeypatch):
    """Of a shard, which begins far into its tensor, after so many steps."""
    monkeypatch.setattr(rows, "first_element", lambda _: (1 << 40) + (1 << 31) + 12345)
    twins = twins_of(ADAMW, [randn(n, n, SMALL[0]) for n in (9, 200)], "8bit", SMALL[1])
    for optimizer, params in twins.both:
        optimizer.init_state()
        for param in params:
            optimizer.state[param]["step"].fill_(2.0**24 - 2)
    twins.run(steps=2)
    assert {row.first for row in twins.opt._shared.plan.rows} == {(1 << 40) + (1 << 31) + 12345}
