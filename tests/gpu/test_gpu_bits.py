"""The kernels of every backend against the CPU backend, bit for bit: options, dtypes, lengths,
absent gradients, groups, masters."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from cases import (
    ALL_CASES,
    CHUNK,
    DTYPE_PAIRS,
    FLOATS,
    FULL_CASES,
    HALVES,
    KERNEL_CASES,
    LENGTHS,
    PLAIN_CASES,
    SHAPES,
    OptimizerCase,
    around,
    parametrize,
)
from gpu_helpers import by_speed, device, moved, runners
from gpu_twins import Twins, grads_like, shaped, values_of
from harness import FUSED, make_param, randn
from torch import Tensor
from triton_interpreter import BLOCK

runner = runners()

Pair = tuple[torch.dtype, torch.dtype]  # of a param and of its gradient
FEW_LENGTHS = [0, 1, 7, 31, 256, 300, CHUNK + 9, 2 * CHUNK + 1, 260]
# Around a row of lanes, the wide step of reduce, the blocks and tail steps of update, and a chunk.
EDGES = [*around(256), 511, 768, *around(BLOCK), BLOCK + 257, 2 * BLOCK + 700]
OF_INTERPRETER = [0, 1, 2, 3, *EDGES, CHUNK - 1, CHUNK + 1]


def lengths_for(case: OptimizerCase, has_masters: bool) -> list[int]:
    if case in FULL_CASES:
        return by_speed(LENGTHS, LENGTHS, OF_INTERPRETER if has_masters else [1, 1300])
    if case in KERNEL_CASES:
        return by_speed(LENGTHS, FEW_LENGTHS, [1, 1300])
    return by_speed(LENGTHS, [700, 5, 0], [260, 7] if has_masters else [17])


def combined(lengths: list[int], pairs: list[Pair]) -> list[tuple[int, Pair]]:
    """Each length with each pair; in the interpreter by turns, and no more than it takes."""
    every = list(itertools.product(lengths, pairs))
    n = max(len(lengths), min(len(pairs), 2))
    turns = [(lengths[k % len(lengths)], pairs[::-1][5 * k % len(pairs)]) for k in range(n)]
    return by_speed(every, every, turns)


@functools.cache
def inputs(own: tuple[tuple[int, Pair], ...]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Of params, and gradients of four steps, every other scaled; only read, so made once."""
    values = [randn(n, k, dtype) for k, (n, (dtype, _)) in enumerate(own)]
    dtypes = [dtype for _, (_, dtype) in own]
    return values, [grads_like(values, k, dtypes, (1.0, 128.0)[k % 2]) for k in range(4)]


@pytest.mark.parametrize(
    ("pairs", "master_weights"),
    [
        (DTYPE_PAIRS[:1], None),
        (DTYPE_PAIRS, None),
        ([pair for pair in DTYPE_PAIRS if pair[0] in HALVES], False),
    ],
    ids=["float32", "masters", "without_masters"],
)
@parametrize("case", [*ALL_CASES, *KERNEL_CASES[3:]])
def test_options_lengths_and_dtypes(
    case: OptimizerCase, pairs: list[Pair], master_weights: bool | None
) -> None:
    """All in one optimizer: neighbours in the list differ in dtype, length and alignment."""
    values, grads = inputs(tuple(combined(lengths_for(case, master_weights is None), pairs)))
    twins = Twins.of(case, values, master_weights=master_weights)
    lr = float(case.hyper.get("lr", 1e-3))
    for step in range(by_speed(4, 3, 2 if master_weights is None else 1)):
        twins.set(lr=lr * (1.0, 0.5, 2.0, 1.25)[step])
        twins.step(grads[step], grad_scale=128.0 if step % 2 else None)
        twins.check()


@parametrize("case", FULL_CASES + PLAIN_CASES)
def test_fifty_steps(case: OptimizerCase) -> None:
    """Nothing is left behind that would show later: step counts, bias corrections, rounding."""
    shapes = by_speed([*SHAPES, (CHUNK + 9,)], [*SHAPES, (CHUNK + 9,)], [(17,)])
    dtypes = by_speed(FLOATS, FLOATS, FLOATS[::2])
    twins = Twins.of(case, [v for dtype in dtypes for v in shaped(shapes, dtype)])
    for step in range(by_speed(50, 50, 8)):
        twins.set(lr=0.01 * (1.0 + step % 5))
        twins.step(grads_like(twins.params, step))
        if step in (0, 1, 2, 7, 9, 49):
            twins.check()


def test_the_comparison_would_notice_one_bit() -> None:
    twins = Twins.of_lengths(PLAIN_CASES[0], [17, CHUNK + 1], max_grad_norm=1.0)
    twins.run(steps=1)
    for value in (twins.params[1], twins.opt.state[twins.params[1]]["exp_avg"]):
        with torch.no_grad():
            last = value[-1:].clone()
            value[-1:] = torch.nextafter(last, 2 * last + 1)
            with pytest.raises(AssertionError, match="1 of"):
                twins.check()
            value[-1:] = last
    twins.check()


# ---- which tensors take part --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "frozen"), [(c, False) for c in KERNEL_CASES] + [(FULL_CASES[0], True)],
    ids=str,
)  # fmt: skip
def test_absent_gradients(case: OptimizerCase, frozen: bool) -> None:
    """Step counts drift apart; states come into being at different steps."""
    lengths = [5, by_speed(CHUNK + 5, CHUNK + 5, 35), by_speed(300, 300, 2), 0, 1]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float16]
    twins = Twins.of(case, [randn(n, n, d) for n, d in zip(lengths, dtypes, strict=True)])
    for step, present in enumerate(["034", "134", "", "0", "01234", "2"]):
        grads = grads_like(twins.params, step)
        for _, params in twins.both:
            for index, param in enumerate(params):
                param.requires_grad_(not frozen or str(index) in present)
        twins.step([g if str(k) in present else None for k, g in enumerate(grads)])
        twins.check()


def test_groups_come_and_go() -> None:
    groups: list[dict[str, Any]] = [{"params": []}, {"params": values_of([17])}, {"params": []}]
    twins = Twins("adamw", groups, max_grad_norm=1.0)
    for step in range(4):
        if step > 1:
            for optimizer, params in twins.both:
                param = make_param(moved(randn(50 * step, step), params[0].device))
                optimizer.add_param_group({"params": [param], "lr": 0.1 * step})
                params.append(param)
        twins.run(steps=1, first=step)


@parametrize("case", PLAIN_CASES)
def test_many_tensors(case: OptimizerCase) -> None:
    """More rows than a kernel's parameters hold, or than are prepared at once; counts differ."""
    n = by_speed(5000, 2500, 150)
    longest = by_speed(5000, 13, 0)
    of_interpreter = [int(k % 64 in (0, 1, 63)) for k in range(n)]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()
    lengths = [1 + k % longest for k in order] if longest else of_interpreter
    flat = randn(sum(lengths), 2)
    twins = Twins.of(case, list(flat.split(lengths)), max_grad_norm=1.0)
    for step in range(3):
        grads = randn(sum(lengths), 3 + step).split(lengths)
        twins.step([g if k % 3 or step else None for k, g in enumerate(grads)])
        twins.check()


# ---- masters ------------------------------------------------------------------------------------


@parametrize("case", KERNEL_CASES)
def test_masters_follow_external_writes(case: OptimizerCase) -> None:
    """Of the param; and of the master, below and above half an ulp of the param, which decides who
    is believed."""
    lengths = by_speed([1, 300, CHUNK + 300], [1, 300, CHUNK + 300], [BLOCK + 300])
    twins = Twins.of(case, [v for dtype in HALVES for v in values_of(lengths, dtype)])
    twins.run(steps=1)
    for step in range(1, 4):
        for optimizer, params in twins.both:
            for index, param in enumerate(params):
                with torch.no_grad():
                    if step < 3:
                        param[:: 1 + 2 * step].mul_(1.5)
                        param.data[-1] = float(index + step)
                    else:
                        master = optimizer.state[param]["master_param"]
                        master[::3] *= 1 + 2.0**-20
                        master[1::3] *= 1.25
        twins.run(steps=1, first=step)


# ---- hyper-parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtypes", "norm"), [(FLOATS[:1], None), (FLOATS, 5.0)], ids=str)
@pytest.mark.parametrize("rule", FUSED)
def test_groups_have_their_own_options(
    rule: str, dtypes: list[torch.dtype], norm: float | None
) -> None:
    """One launch for groups of every kind."""
    hypers = [case.hyper for case in ALL_CASES if case.rule == rule and not case.common]
    turn = itertools.cycle(dtypes)
    lengths = by_speed([300, 3], [300, 3], [30])
    groups = [
        {**hyper, "params": [randn(n + k, k, next(turn)) for n in lengths]}
        for k, hyper in enumerate(hypers)
    ]
    twins = Twins(rule, groups, max_grad_norm=norm)
    twins.run(steps=by_speed(3, 3, 1))
    twins.set(1, lr=0.5, weight_decay=0.01)
    twins.set(2, lr=0.02)
    twins.run(steps=by_speed(3, 3, 1), first=3)


@pytest.mark.parametrize("amsgrad", [(False, True, False), (True, False, True)])
def test_amsgrad_in_some_groups(amsgrad: tuple[bool, ...]) -> None:
    """An absent maximum is less than any second moment, also than one that a user has negated."""
    for dtype in FLOATS:
        values = values_of([100, 700, 9], dtype)
        groups = [{"params": [v], "amsgrad": a} for v, a in zip(values, amsgrad, strict=True)]
        twins = Twins("adamw", groups, max_grad_norm=1.0)
        twins.run(steps=1)
        for optimizer, params in twins.both:
            for param in params:
                optimizer.state[param]["exp_avg_sq"][::3] *= -1.0
        twins.run(steps=1, first=1)


def test_hundreds_of_groups() -> None:
    """More hyper-parameters than the parameters of a kernel can hold."""
    groups = [
        {"params": [randn(n % 40, n)], "lr": 1e-3 * (n + 1), "weight_decay": 0.01 * (n % 7)}
        for n in range(by_speed(700, 200, 40))
    ]
    twins = Twins("adamw", groups, max_grad_norm=1.0)
    for step in range(by_speed(3, 3, 2)):
        for index in range(0, len(groups), 3):
            twins.set(index, lr=0.02 * (step + 1))
        twins.run(steps=1, first=step)


# Both ways, also to and from values that switch a term of the rule off, whose states then wait.
CHANGES: dict[str, list[dict[str, Any]]] = {
    "adamw": [
        {"lr": 0.05}, {"betas": (0.5, 0.9)}, {"eps": 1e-2}, {"weight_decay": 0.0},
        {"maximize": True}, {"weight_decay": 0.3, "decoupled_weight_decay": False},
        {"amsgrad": True}, {"maximize": False}, {"amsgrad": False},
        {"betas": (0.0, 0.5), "maximize": True}, {"betas": (0.99, 0.0), "lr": 0.0},
        {"decoupled_weight_decay": True, "lr": 0.1},
    ],
    "sgd": [
        {"momentum": 0.0, "weight_decay": 0.0},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
        {"momentum": 0.0, "nesterov": False, "weight_decay": 0.2},
        {"momentum": 0.5, "dampening": 0.25, "decoupled_weight_decay": False},
        {"maximize": False, "lr": 0.0}, {"lr": 0.3},
    ],
}  # fmt: skip
CHANGES_OF_ALL: list[dict[str, Any]] = [
    {"max_grad_norm": 0.1}, {"max_grad_norm": None}, {"max_grad_value": 0.01},
    {"skip_nonfinite": True}, {"max_grad_norm": 5.0}, {"norm_type": math.inf},
    {"max_grad_value": None},
]  # fmt: skip


@pytest.mark.parametrize("rule", CHANGES)
def test_options_that_change_with_the_gradients_in_place(rule: str) -> None:
    """Each by itself, both ways: none is taken from the step before."""
    first = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.7} if rule == "sgd" else {})}
    values = [randn(n, n, d) for n, d in ((17, torch.float32), (300, torch.bfloat16))]
    twins = Twins(rule, [{"params": values, **first}], max_grad_norm=1.0)
    twins.run(steps=2)
    for change in CHANGES[rule]:
        twins.set(**change)
        twins.step()
        twins.check()
    for change in CHANGES_OF_ALL:
        for optimizer, _ in twins.both:
            for name, value in change.items():
                setattr(optimizer, name, value)
        twins.step()
        twins.check()


def test_a_tensor_takes_the_place_of_a_number_and_back() -> None:
    """The number that comes back may be the one that stood there before the tensor, or zero."""
    twins = Twins.of_lengths(PLAIN_CASES[0], [17, 300])
    twins.give(grads_like(twins.params, 0))
    for rate in [0.01, 0.01, (0.5,), 0.01, (0.25,), (0.0,), 0.0, (0.125,), 0.0, 0.03]:
        value = rate[0] if isinstance(rate, tuple) else rate
        twins.set(lr=value)
        if isinstance(rate, tuple):
            twins.opt.param_groups[0]["lr"] = torch.tensor(value, dtype=torch.float64).to(device())
        twins.step()
        twins.check()


@pytest.mark.parametrize("rule", FUSED)
def test_options_in_tensors(rule: str) -> None:
    """On the device, where the kernels read them when they run; a scheduler fills them in place."""

    def number(value: float, k: int) -> Tensor:
        return torch.full(
            ((), (1,))[k % 2], value, dtype=(torch.float32, torch.float64)[k // 2 % 2]
        )

    def hyper(k: int) -> dict[str, Any]:
        own: dict[str, Any] = {"lr": number(0.1 / k, k), "weight_decay": number(0.3 / k, k + 2)}
        return own if rule == "sgd" else {**own, "betas": (number(0.7, k), number(0.8, k))}

    n_groups = 17 if rule == "sgd" else 9  # more numbers than Triton's kernel fetches at once
    lengths = by_speed([300, 5], [300, 5], [3])
    groups = [
        {"params": [randn(n, k) for n in lengths], **hyper(k)} for k in range(1, n_groups + 1)
    ]
    groups.append({"params": [randn(7, 1)], "lr": 0.01, "weight_decay": 0.1})
    twins = Twins(rule, groups, max_grad_norm=1.0)
    rates = [group["lr"] for group in twins.opt.param_groups]
    twins.run(steps=2)
    for optimizer, _ in twins.both:
        for group in optimizer.param_groups[:-1]:
            group["lr"].mul_(0.5)
            if rule != "sgd":
                group["betas"][0].fill_(0.6)
    twins.run(steps=1)
    assert all(g["lr"] is rate for g, rate in zip(twins.opt.param_groups, rates, strict=True))
    assert {rate.device.type for rate in rates[:-1]} == {device().type}


def test_extreme_step_counts() -> None:
    """A count is fp32, as torch's: at 2^24 it stays, whatever the kernel counts in. It is read anew
    in every step, and a skipped one leaves it."""
    counts = (1.0, 999.0, 1e6, 2.0**24 - 2)
    for case in FULL_CASES:
        twins = Twins.of_lengths(case, [5, 30, 7, 33])
        twins.run(steps=1)
        for optimizer, params in twins.both:
            for param, count in zip(params, counts, strict=True):
                optimizer.state[param]["step"].fill_(count)
        bad = grads_like(twins.params, 1)
        bad[2][3] = math.nan
        twins.step(bad)
        twins.check()
        twins.run(steps=3)
        found = [twins.opt.state[p]["step"].item() for p in twins.params]
        assert found == [4.0, 1002.0, 1e6 + 3, 2.0**24]
        assert all(math.isfinite(p.sum().item()) for p in twins.params)
