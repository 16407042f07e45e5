"""Steps with states and masters of fewer bits: decode, rule, encode, wherever elements lie."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from cases import CHUNK, dtype_name
from harness import FUSED, randn
from models import codecs as model
from models.adamw import DEFAULTS
from models.codecs import HALF, MOMENT, SQUARES
from models.exact import ExactStep
from tolerances import assert_same_bits
from torch import Tensor

import fusedopt

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MIXED = {"exp_avg": "8bit", "exp_avg_sq": "bf16"}
# The parameter's dtype, and what is asked for.
MODES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (FP32, {"state_dtype": "8bit"}),
    (FP32, {"state_dtype": "bf16"}),
    (FP32, {"state_dtype": MIXED}),
    (BF16, {"state_dtype": "8bit"}),
    (BF16, {"state_dtype": "8bit", "master_weights": "remainder"}),
    (BF16, {"state_dtype": "8bit", "master_weights": "remainder8"}),
    (BF16, {"state_dtype": "bf16", "master_weights": "dither"}),
    (BF16, {"master_weights": "remainder8"}),
    (FP16, {"state_dtype": "8bit", "master_weights": "remainder"}),
]
# Every length up to a few blocks of 128, and around a chunk.
LENGTHS = [*range(301), CHUNK - 1, CHUNK, CHUNK + 1]


def name_of(mode: Any) -> str:
    if isinstance(mode, torch.dtype):
        return dtype_name(mode)
    asked = {"mixed" if value == MIXED else str(value) for value in mode.values()}
    return "-".join(sorted(asked))


modes = pytest.mark.parametrize(("dtype", "options"), MODES, ids=name_of)
Tensors = dict[str, Tensor]


def tensors(opt: torch.optim.Optimizer, param: Tensor) -> Tensors:
    return {"param": param.detach().clone()} | {k: v.clone() for k, v in opt.state[param].items()}


def trained(
    rule: str, dtype: torch.dtype, options: dict[str, Any], order: list[int], steps: int = 3
) -> list[Tensors]:
    """What is there after a few steps over a tensor of each length, in the order of LENGTHS."""
    # A view in the middle of a larger tensor: any alignment.
    values = {n: randn(n + 5, n, dtype)[n % 5 :][:n] for n in LENGTHS}
    params = {n: torch.nn.Parameter(values[n]) for n in order}
    opt = FUSED[rule](
        list(params.values()), lr=1e-2, weight_decay=0.1, max_grad_norm=100.0, backend="cpu",
        min_8bit_size=0, **options,
    )  # fmt: skip
    for step in range(steps):
        for n, param in params.items():
            param.grad = randn(n, 1000 * step + n, dtype)
        opt.step()
    return [tensors(opt, params[n]) for n in LENGTHS]


def assert_agree(ones: list[Tensors], others: list[Tensors], label: str) -> None:
    for n, one, other in zip(LENGTHS, ones, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert_same_bits(one[name], other[name], f"{label}: {name} of {n} elements")


def of_rule(rule: str, options: dict[str, Any]) -> dict[str, Any]:
    """The same for a rule that has other states."""
    if rule == "adamw" or options.get("state_dtype") != MIXED:
        return options
    return options | {"state_dtype": "8bit"}


@modes
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_simd_levels_threads_and_places(
    rule: str, dtype: torch.dtype, options: dict[str, Any], simd_levels: list[str],
    restore_threads: None,
) -> None:  # fmt: skip
    from fusedopt import _cpu

    own = of_rule(rule, options)
    shuffled = random.Random(0).sample(LENGTHS, len(LENGTHS))
    torch.set_num_threads(1)
    _cpu.set_simd("generic")
    expected = trained(rule, dtype, own, LENGTHS)
    for level in simd_levels:
        _cpu.set_simd(level)
        for threads, order in ((1, LENGTHS), (2, shuffled), (3, LENGTHS[::-1])):
            torch.set_num_threads(threads)
            found = trained(rule, dtype, own, order)
            assert_agree(expected, found, f"generic and {level} with {threads} threads")


@modes
def test_the_reference_backend_stores_what_the_cpu_stores(
    dtype: torch.dtype, options: dict[str, Any], cpu_backend: str
) -> None:
    """In the first step, whose states differ by a rounding at most; codes by one cell."""
    found = {}
    for backend in ("cpu", "reference"):
        param = torch.nn.Parameter(randn(1000, 1, dtype))
        opt = FUSED["adamw"]([param], backend=backend, min_8bit_size=0, **options)
        param.grad = randn(1000, 2, dtype)
        opt.step()
        found[backend] = tensors(opt, param)
    for name, ours in found["cpu"].items():
        theirs = found["reference"][name]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if ours.dtype == torch.uint8:
            assert (ours.int() - theirs.int()).abs().max() <= 1, name


def test_a_step_is_that_of_the_model(cpu_backend: str) -> None:
    """Decoded, stepped as the contract says and encoded, with the dither of the element's place,
    of the step that is applied and of the stream: masters 0, then one for each state."""
    n, rng = 1000, np.random.default_rng(0)
    param = torch.nn.Parameter(randn(n, 1, BF16))
    opt = FUSED["adamw"](
        [param], lr=1e-2, weight_decay=0.1, backend="cpu", min_8bit_size=0,
        state_dtype=MIXED, master_weights="remainder8",
    )  # fmt: skip
    squares_only = torch.nn.Parameter(randn(n, 1))
    second = FUSED["adamw"](
        [squares_only], lr=1e-2, weight_decay=0.1, backend="cpu", min_8bit_size=0,
        state_dtype={"exp_avg": "bf16", "exp_avg_sq": "8bit"},
    )  # fmt: skip
    hyper = DEFAULTS | {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True,
                        "maximize": False}  # fmt: skip
    zeros = {"exp_avg": np.zeros(n, np.float32), "exp_avg_sq": np.zeros(n, np.float32)}
    first = ExactStep("adamw", param.detach().float().numpy().copy(), hyper, dict(zeros))
    other = ExactStep("adamw", squares_only.detach().numpy().copy(), hyper, dict(zeros))
    for step in range(1, 6):
        grad = (rng.standard_normal(n) * np.exp2(rng.uniform(-20, 0, n))).astype(np.float32)
        param.grad = torch.from_numpy(grad).to(BF16)
        squares_only.grad = torch.from_numpy(grad)
        opt.step(), second.step()
        first.step(param.grad.float().numpy())
        other.step(grad)
        t = [model.dither(range(n), step, stream) for stream in range(3)]
        bits, rest = model.bf16_split8(first.master, t[0])
        first.master = model.bf16_joined8(bits, rest)
        codes, scales = model.log8_encoded(MOMENT, first.state["exp_avg"], t[1])
        first.state["exp_avg"] = model.log8_values(MOMENT, codes, model.per_element(scales, n))
        halves = model.bf16_dithered(first.state["exp_avg_sq"], t[2])
        first.state["exp_avg_sq"] = model.bf16_values(halves)
        mean = model.bf16_dithered(other.state["exp_avg"], t[1])
        other.state["exp_avg"] = model.bf16_values(mean)
        squares, own = model.log8_encoded(SQUARES, other.state["exp_avg_sq"], t[2])
        values = model.log8_values(SQUARES, squares, model.per_element(own, n))
        other.state["exp_avg_sq"] = values
        state, of_second = opt.state[param], second.state[squares_only]
        for found, expected in (
            (param.detach().view(torch.int16).numpy().view(np.uint16), bits),
            (state["master_remainder"], rest),
            (state["exp_avg_log8"], codes),
            (state["exp_avg_log8_scale"], scales),
            (state["exp_avg_sq"].view(torch.int16).numpy().view(np.uint16), halves),
            (of_second["exp_avg"].view(torch.int16).numpy().view(np.uint16), mean),
            (of_second["exp_avg_sq_log8"], squares),
            (of_second["exp_avg_sq_log8_scale"], own),
            (squares_only.detach(), other.master),
        ):
            np.testing.assert_array_equal(found, expected)


@modes
@pytest.mark.parametrize("by", ["scaler", "own check"])
def test_a_skipped_step_moves_no_byte(
    dtype: torch.dtype, options: dict[str, Any], by: str, backend: str
) -> None:
    """And the next step is what it would have been without it."""
    runs = []
    for skips in (False, True):
        params = [torch.nn.Parameter(randn(n, n, dtype)) for n in (300, 7, 0)]
        opt = FUSED["adamw"](
            params, backend=backend, min_8bit_size=0, skip_nonfinite=by != "scaler", **options
        )
        for step in range(4):
            for k, param in enumerate(params):
                param.grad = randn(param.numel(), 10 * step + k, dtype)
            opt.step()
            if skips and step == 2:
                skip(opt, params, by)
        runs.append([tensors(opt, param) for param in params])
    for one, other in zip(*runs, strict=True):
        for name in one:
            assert_same_bits(one[name], other[name], name)


def skip(opt: Any, params: list[Any], by: str) -> None:
    before = [tensors(opt, param) for param in params]
    params[0].grad[5] = float("nan")
    if by == "scaler":
        opt.grad_scale, opt.found_inf = torch.tensor(64.0), torch.tensor(1.0)
    opt.step()
    if by == "scaler":
        del opt.grad_scale, opt.found_inf
    assert opt.skipped_steps == 1
    for old, new in zip(before, (tensors(opt, param) for param in params), strict=True):
        for name in old:
            assert_same_bits(old[name], new[name], name)


def test_small_tensors_keep_fp32_states(backend: str) -> None:
    params = [torch.nn.Parameter(randn(n, n)) for n in (4095, 4096)]
    opt = fusedopt.FusedAdamW(params, state_dtype="8bit", backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    small, large = (opt.state[param] for param in params)
    assert small["exp_avg"].dtype == small["exp_avg_sq"].dtype == FP32
    assert large["exp_avg_log8"].dtype == large["exp_avg_sq_log8"].dtype == torch.uint8
    assert large["exp_avg_log8_scale"].shape == (4096 // model.BLOCK,)


def test_what_a_load_rounds_is_rounded_to_nearest(backend: str) -> None:
    """A state of fp32 that becomes codes has no dither: whoever loads twice has the same twice."""
    param = torch.nn.Parameter(randn(5000, 1))
    wide = fusedopt.FusedAdamW([param], backend=backend)
    param.grad = randn(5000, 2)
    wide.step()
    opt = fusedopt.FusedAdamW([param], state_dtype="8bit", backend=backend)
    opt.load_state_dict(wide.state_dict())
    opt.init_state()
    for name, kind in (("exp_avg", MOMENT), ("exp_avg_sq", SQUARES)):
        codes, scales = model.log8_encoded(kind, wide.state[param][name].numpy(), HALF)
        np.testing.assert_array_equal(opt.state[param][f"{name}_log8"], codes)
        np.testing.assert_array_equal(opt.state[param][f"{name}_log8_scale"], scales)
