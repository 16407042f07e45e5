"""Norm, clipping, skipping and scalers: against the CPU backend, and each element by itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import (
    CHUNK,
    FLOATS,
    FULL_CASES,
    HALVES,
    KERNEL_CASES,
    LENGTHS,
    NONFINITE,
    ODD_LENGTHS,
    PLAIN_CASES,
    OptimizerCase,
    around,
    parametrize,
)
from gpu_helpers import backend, by_speed, device, runners
from gpu_twins import Twins, grads_like, shifted
from harness import FUSED, make_param, randn, set_grad
from tolerances import assert_norm
from torch import Tensor
from triton_interpreter import BLOCK

import fusedopt

runner = runners()
every_norm = pytest.mark.parametrize("norm_type", [2.0, math.inf])
MEASURE = OptimizerCase("measure", "sgd", {"lr": 0.125}, {"max_grad_norm": 2.0})


LISTS = [[n] for n in (1, 2, 67, 255, 256, 257, 513, 5000, CHUNK, CHUNK + 1, 3 * CHUNK + 700)]
LISTS += [[5, 300, CHUNK + 3, 0, 17], [2 * CHUNK + 1, 1, CHUNK - 1], list(range(300)), [9] * 700]
LISTS_OF_INTERPRETER = [[n] for n in (1, 255, 257, 513, BLOCK + 1, BLOCK + 257)]
LISTS_OF_INTERPRETER += [[CHUNK + 1, 5, 0, 300], [1 + k % 4 for k in range(9)]]


def unlike(n: int, seed: int, dtype: torch.dtype, scale: float) -> Tensor:
    """Magnitudes that differ from lane to lane and from row to row of lanes: their order shows."""
    powers = torch.arange(n) * 7 % 11 - 5.0
    return (randn(n, seed, torch.float32) * 2.0**powers * scale).to(dtype)


@parametrize("dtype", FLOATS)
@every_norm
def test_norm(dtype: torch.dtype, norm_type: float) -> None:
    """The order of lanes and of chunks: magnitudes that differ from one to the next show it."""
    lists = by_speed([*([n] for n in LENGTHS), *LISTS], LISTS, LISTS_OF_INTERPRETER)
    if norm_type != 2.0:
        lists = by_speed(lists, lists, LISTS_OF_INTERPRETER[::3])
    for lengths in lists:
        twins = Twins.of(
            MEASURE, [torch.zeros(n, dtype=dtype) for n in lengths], norm_type=norm_type
        )
        grads = [unlike(n, n + k, dtype, 3.0 ** (k % 7)) for k, n in enumerate(lengths)]
        if sum(lengths) % 2:  # rows of lanes are taken two at a time where the data is aligned
            grads = [shifted(grad, 3) for grad in grads]
        twins.step(grads, grad_scale=7.0)
        twins.check()


def test_norm_of_many_chunks() -> None:
    """More than a GPU has blocks at work."""
    n = by_speed(10_000, 7, 4) * CHUNK + 5
    twins = Twins.of(MEASURE, [torch.zeros(n)])
    grad = torch.empty(n).normal_(generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        twins.step([grad])
        twins.check()
    assert_norm(twins.opt.grad_norm.cpu(), grad.double().square().sum().sqrt())


def positions(length: int) -> list[int]:
    """All of them in short tensors; in long ones those at the edges of lanes, blocks and chunks."""
    if length <= by_speed(67, 17, 4):
        return list(range(length))
    edges = [32, 64, 256, 2048, CHUNK, 2 * CHUNK]
    edges = around(*by_speed(edges, edges, [256, 512, BLOCK, BLOCK + 256, CHUNK]))
    return sorted({0, length // 2, length - 1, *(k for k in edges if k < length)})


def measured(
    norm_type: float, lengths: list[int], dtype: torch.dtype, lr: float
) -> tuple[Any, Any]:
    """An optimizer over zeros, whose gradients are zeros, too."""
    params = [make_param(torch.zeros(n, device=device())) for n in lengths]
    for param in params:
        set_grad(param, torch.zeros(param.numel(), dtype=dtype, device=device()))
    common = {"max_grad_norm": math.inf, "norm_type": norm_type, "skip_nonfinite": True}
    return FUSED["sgd"](params, lr=lr, backend=backend(), **common), params


@every_norm
def test_one_element_is_the_whole_norm(norm_type: float) -> None:
    """All others are zero: a dropped lane, tail or chunk shows as a norm of exactly zero."""
    lengths = [1, 2, 3, 4, 5, 8, 9, 33, 67, 257, CHUNK, CHUNK + 1, 2 * CHUNK + 257]
    for length in by_speed(lengths, lengths, [4, BLOCK + 300]):
        opt, (param,) = measured(norm_type, [length], torch.float32, 0.0)
        for position in positions(length):
            param.grad[position] = -3.0
            opt.step()
            assert opt.grad_norm.item() == 3.0, f"element {position} of {length}"
            param.grad[position] = 0.0


# ---- gradients that are not finite --------------------------------------------------------------


@parametrize("dtype", FLOATS)
@every_norm
def test_nonfinite_element_anywhere(dtype: torch.dtype, norm_type: float) -> None:
    lengths = by_speed([17, *ODD_LENGTHS, 0, 33], [17, 0, CHUNK + 1, 33], [3, 0, 1500])
    opt, params = measured(norm_type, lengths, dtype, 0.5)
    for param in params:
        param.grad.fill_(1.0)
    places = [(k, at) for k, param in enumerate(params) for at in positions(param.numel())]
    every = list(itertools.product(places, NONFINITE))
    found = by_speed(
        every, every, every[::4]
    )  # of which each place has one, and by turns each value
    for skipped, ((index, position), value) in enumerate(found, start=1):
        params[index].grad[position] = value
        opt.step()
        label = f"element {position} of tensor {index}"
        assert_norm(opt.grad_norm, abs(value), label)
        assert (opt.found_inf.item(), opt.skipped_steps.item()) == (1.0, skipped), label
        params[index].grad[position] = 1.0
    assert not any(bool(p.any()) for p in params), "a skipped step moved a param"
    opt.step()
    assert opt.found_inf.item() == 0.0 and opt.skipped_steps.item() == len(found)
    assert all(bool((p == -0.5).all()) for p in params)


# How a step comes to be skipped: by the optimizer's own check, or because a scaler is in charge.
CLIP = {"max_grad_norm": 1.0}
SKIPPERS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "own_check": ({"skip_nonfinite": True}, {}),
    "own_check_with_clip": ({"skip_nonfinite": True, **CLIP}, {}),
    "scaler": ({}, {"grad_scale": 64.0, "found_inf": 1.0}),
    "scaler_with_clip": (CLIP, {"grad_scale": 64.0, "found_inf": 1.0}),
    "own_check_overrules": (CLIP, {"grad_scale": 64.0, "found_inf": 0.0}),
}


def mixed(case: OptimizerCase, **common: Any) -> Twins:
    """Tensors of every dtype, one of them longer than a chunk where that takes no time."""
    own = [
        (17, torch.float16),
        (0, torch.float32),
        (CHUNK + 5, torch.float32),
        (33, torch.bfloat16),
    ]
    own = by_speed(own, own, [own[0], own[1], own[3]])
    values = [randn(n, n, dtype) for n, dtype in own]
    return Twins.of(case, values, **common)  # type: ignore[no-any-return]


@pytest.mark.parametrize("skipper", SKIPPERS)
@parametrize("case", PLAIN_CASES)
def test_skipped_steps_move_nothing(case: OptimizerCase, skipper: str) -> None:
    """And the first momentum step is the first applied one."""
    common, given = SKIPPERS[skipper]
    twins = mixed(case, **common)
    good = {name: 0.0 if name == "found_inf" else value for name, value in given.items()}
    for step in range(7):
        grads = grads_like(twins.params, step)
        if step in (2, 3, 6):
            twins.step(grads, **good)
        else:
            before = [p.detach().clone() for p in twins.params]
            grads[(0, 2, -1)[step % 3]][-1 if step % 2 else 0] = NONFINITE[step % 3]
            twins.step(grads, **given)
            assert twins.opt.found_inf.item() == 1.0
            assert all(torch.equal(p, old) for p, old in zip(twins.params, before, strict=True))
        twins.check()
    assert twins.opt.skipped_steps.item() == 4


@pytest.mark.parametrize(
    "common",
    [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 0.5},
     {"max_grad_norm": 1.0, "max_grad_value": 0.5, "norm_type": math.inf}],
    ids=["plain", "clip", "clip_value", "both"],
)  # fmt: skip
@parametrize("case", [*PLAIN_CASES, FULL_CASES[2]])
def test_without_skipping_nonfinite_values_go_their_way(
    case: OptimizerCase, common: dict[str, Any]
) -> None:
    for value in by_speed(NONFINITE, NONFINITE, [None]):
        twins = mixed(case, **{**common, "skip_nonfinite": False})
        for step in range(3):
            grads = grads_like(twins.params, step)
            if step == 1:
                for k, tensor in enumerate((0, 2, -1)):
                    one = NONFINITE[k] if value is None else value
                    grads[tensor][grads[tensor].numel() // 2] = one
            twins.step(grads)
            twins.check()


# ---- gradients of any size ----------------------------------------------------------------------


def hard_gradients() -> list[Tensor]:
    """Squares that over- or underflow, denormals, and every finite number of 16 bits."""
    n = by_speed(CHUNK + 77, CHUNK + 77, BLOCK + 300)
    limit = torch.finfo(torch.float32)
    scales = (3e38, 1e38, 1e30, 1e19, 1e-12, 1e-19, 1e-25, 1e-30, 1e-41, 0.0)
    grads = [
        (randn(n, k, torch.float64) * scale).clamp(-limit.max, limit.max).float()
        for k, scale in enumerate(by_speed(scales, scales, scales[1::2]))
    ]
    grads.append(torch.cat([grads[1][:77], grads[-2]]))  # chunks read again: large among small
    grads.append(torch.cat([randn(500, 1), torch.tensor([3e38]), randn(500, 2)]))
    grads.append(torch.full((n,), limit.max))
    grads.append(torch.full((600,), limit.smallest_normal * 2.0**-23))
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)[:: by_speed(1, 1, 61)]
    for every in (bits.view(HALVES[0]), bits.view(HALVES[1]), bits.view(HALVES[0]).float()):
        grads.append(torch.where(every.isfinite(), every, 1.0))
    return grads


@every_norm
def test_hard_norms(norm_type: float) -> None:
    scales = [None, 2.0**-10, 1e-3, 3e-5, 1.0, 7.0, 65536.0, 2.0**100]
    scales = by_speed(scales, scales, [65536.0, 3e-5] if norm_type == 2.0 else [3e-5])
    for grad, grad_scale in itertools.product(hard_gradients(), scales):
        twins = Twins.of(MEASURE, [torch.zeros(grad.numel())], norm_type=norm_type)
        twins.step([grad], grad_scale)
        twins.check()


@pytest.mark.parametrize(
    ("case", "norm_type"),
    [*((case, 2.0) for case in KERNEL_CASES[:4]), (FULL_CASES[0], math.inf)],
    ids=str,
)
def test_hard_gradients_are_applied(case: OptimizerCase, norm_type: float) -> None:
    """Through the whole rules: infinities and NaN that come of finite gradients, and no skips."""
    grads = [grad[-2 * CHUNK :] for grad in hard_gradients()]
    options = {"norm_type": norm_type, "max_grad_norm": 1.0, "skip_nonfinite": True}
    twins = Twins.of_lengths(case, [grad.numel() for grad in grads], **options)
    for _ in range(by_speed(2, 2, 1)):
        twins.step(grads)
        twins.check()
    assert twins.opt.skipped_steps.item() == 0, "finite gradients were skipped"


@parametrize("dtype", HALVES)
def test_every_rounding_to_half(dtype: torch.dtype) -> None:
    """SGD with lr = 1 puts any wanted value into the master: ties, neighbours, overflow."""
    half = randn(4000, 5, dtype)
    neighbour = (half.view(torch.int16) + 1).view(dtype)
    tie = (half.float() + neighbour.float()) / 2
    wanted = torch.cat([tie, torch.nextafter(tie, half.float()), torch.nextafter(tie, tie * 9)])
    edges = torch.tensor([6e-8, 1e-7, 65519.0, 65520.0, 7e4, 6.1e-5, 1e-39, -65519.996, 3.39e38])
    wanted = torch.cat([wanted, edges, -edges])
    plain = OptimizerCase("plain", "sgd", {"lr": 1.0})
    twins = Twins.of(plain, [torch.zeros(wanted.numel(), dtype=dtype)])
    twins.step([-wanted])
    twins.check()
    param = twins.params[0].detach().cpu()
    assert torch.equal(param.view(torch.int16), wanted.to(dtype).view(torch.int16))


def test_nothing_to_measure() -> None:
    """No gradient at all; only empty tensors; and a clip that does nothing, or everything."""
    twins = Twins.of_lengths(PLAIN_CASES[0], [17, 0], max_grad_norm=1.0)
    twins.step([None, None])
    twins.check()
    assert twins.opt.grad_norm.item() == 0.0
    twins.run(steps=1)
    twins = Twins.of(PLAIN_CASES[0], [torch.empty(0, 4), torch.empty(0)], max_grad_norm=1.0)
    twins.run(steps=1)
    assert twins.opt.grad_norm.item() == 0.0 and twins.opt.clip_coef.item() == 1.0
    for max_grad_norm in (0.0, math.inf):
        Twins.of_lengths(PLAIN_CASES[0], [17, 300], max_grad_norm=max_grad_norm).run(steps=2)


# ---- scalers ------------------------------------------------------------------------------------


@parametrize("case", KERNEL_CASES)
def test_what_a_scaler_sets(case: OptimizerCase) -> None:
    twins = Twins.of_lengths(case, by_speed([300, 3], [300, 3], [33]), torch.float16)
    scales, flags = (None, 1.0, 1000.0, 7.0, 0.25), (None, 0.0, 1.0, 2.0, math.nan)
    given = list(itertools.product(scales, flags))
    given = given[:: by_speed(1, 1, 5)] + [(None, 0.0), (7.0, 0.0)]
    given += [(0.0, None), (math.inf, 0.0), (math.nan, None), (1e-42, None), (0.0, 0.0)]
    for step, (grad_scale, found_inf) in enumerate(given):
        twins.step(grads_like(twins.params, step), grad_scale, found_inf)
        twins.check()


@pytest.mark.parametrize("scaler_class", [fusedopt.GradScaler, torch.amp.GradScaler])
@parametrize("case", FULL_CASES)
def test_loss_scale_goes_up_and_down(
    case: OptimizerCase, scaler_class: type[torch.amp.GradScaler]
) -> None:
    """Ours asks the optimizer for the flag, torch's looks through the gradients itself."""
    twins = Twins.of_lengths(case, [300, by_speed(CHUNK + 1, CHUNK + 1, 35)])
    scalers = [
        scaler_class(d.type, 512.0, growth_interval=2) for d in (device(), torch.device("cpu"))
    ]
    for step in range(6):
        grads = grads_like(twins.params, step)
        if step in (0, 3, 4):
            grads[step % 2][-1] = math.inf
        twins.give(grads)
        for scaler, (optimizer, params) in zip(scalers, twins.both, strict=True):
            scaler.scale(torch.ones((), device=params[0].device))
            scaler.step(optimizer)
            scaler.update()
        twins.check()
        assert scalers[0].get_scale() == scalers[1].get_scale()
