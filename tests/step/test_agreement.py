"""Bits that must not depend on threads, SIMD level, alignment or position; and which they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    BY_NAME,
    CHUNK,
    DTYPE_PAIRS,
    FLOATS,
    FULL_CASES,
    LENGTHS,
    PLAIN_CASES,
    OptimizerCase,
    parametrize,
)
from harness import FUSED, make_param, randn, scaler_attributes, set_grad
from models import exact, model_of
from tolerances import assert_same_bits
from torch import Tensor

with suppress(ImportError):  # where it is not built the fixtures skip
    from fusedopt import _cpu

CASES = FULL_CASES + PLAIN_CASES + [BY_NAME["adamw-clip"], BY_NAME["sgd-nesterov"]]
RUN_LENGTHS = [0, 1, 7, 16, 31, 130, CHUNK + 9, 3 * CHUNK + 1, 260]
Result = dict[str, Tensor]


def run(
    case: OptimizerCase,
    params: list[Tensor],
    grads: list[list[Tensor]],
    backend: str = "cpu",
    **common: Any,
) -> Result:
    """Everything there is after the steps, by name."""
    opt = FUSED[case.rule](params, backend=backend, **case.hyper, **{**case.common, **common})
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            set_grad(param, grad)
        opt.step()
    result: Result = {}
    for index, param in enumerate(params):
        result[f"param {index}"] = param.detach().clone()
        result.update({f"{kind} {index}": value for kind, value in opt.state[param].items()})
    for name in ("grad_norm", "clip_coef"):
        value = getattr(opt, name)
        if value is not None:
            result[name] = value
    return result


def assert_agree(left: Result, right: Result, label: str) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert_same_bits(value, right[name], f"{label}: {name}")


def run_dtypes(case: OptimizerCase, **common: Any) -> Iterator[Result]:
    """All dtype pairings, lengths with tails and several chunks, three steps."""
    for param_dtype, grad_dtype in DTYPE_PAIRS:
        params = [make_param(randn(n, n, param_dtype)) for n in RUN_LENGTHS]
        grads = [
            [randn(n, 40 * step + k + 1, grad_dtype) for k, n in enumerate(RUN_LENGTHS)]
            for step in range(3)
        ]
        yield run(case, params, grads, **common)


@parametrize("case", CASES)
@pytest.mark.parametrize("master_weights", [None, False])
def test_thread_counts(
    case: OptimizerCase, master_weights: bool | None, cpu_backend: str, restore_threads: None
) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(list(run_dtypes(case, master_weights=master_weights)))
    for one, two, three in zip(*results, strict=True):
        assert_agree(one, two, "1 and 2 threads")
        assert_agree(one, three, "1 and 3 threads")


@parametrize("case", FULL_CASES)
@pytest.mark.parametrize(
    "lengths",
    [[300_001], [9] * 5_000, [3, 150_000, 0, 70_000, CHUNK, 5], list(range(700))],
    ids=["one", "tiny", "mixed", "growing"],
)
def test_thread_counts_on_large_plans(
    case: OptimizerCase, lengths: list[int], cpu_backend: str, restore_threads: None
) -> None:
    """Enough elements that no backend would stay on one thread."""
    flat = [randn(sum(lengths), seed) for seed in (1, 2)]
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        params = [make_param(v) for v in flat[0].clone().split(lengths)]
        results.append(run(case, params, [list(flat[1].split(lengths))] * 2))
    assert_agree(results[0], results[1], "1 and 2 threads")
    assert_agree(results[0], results[2], "1 and 5 threads")


@pytest.fixture
def flushing() -> Iterator[None]:
    """Denormals are flushed in this thread, and not in those that torch's pool has already."""
    (torch.randn(1_000_000) * 2.0).sum()
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@parametrize("case", FULL_CASES)
def test_flushing_denormals_changes_nothing(
    case: OptimizerCase, cpu_backend: str, restore_threads: None, flushing: None
) -> None:
    """It is a thread's own flag: half of the elements would be computed otherwise."""
    values, grads = randn(200_000, 1), [randn(200_000, 2 + k) * 1e-20 for k in range(2)]
    assert not torch.any(torch.tensor([1e-40]) * 0.5 != 0.0), "denormals are flushed"
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(case, [make_param(values.clone())], [[g] for g in grads]))
    torch.set_flush_denormal(False)
    results.append(run(case, [make_param(values.clone())], [[g] for g in grads]))
    assert_agree(results[0], results[1], "1 and 2 threads")
    assert_agree(results[0], results[2], "flushed and not")


@parametrize("case", CASES)
@pytest.mark.parametrize("master_weights", [None, False])
def test_simd_levels(
    case: OptimizerCase, master_weights: bool | None, simd_levels: list[str]
) -> None:
    results: dict[str, list[Result]] = {}
    for level in simd_levels:
        _cpu.set_simd(level)
        results[level] = list(run_dtypes(case, master_weights=master_weights))
    assert_levels_agree(results)


def assert_levels_agree(results: dict[str, list[Result]]) -> None:
    for level, others in results.items():
        for index, (one, other) in enumerate(zip(results["generic"], others, strict=True)):
            assert_agree(one, other, f"generic and {level}, run {index}")


def test_simd_levels_on_hard_norms(simd_levels: list[str]) -> None:
    """Rescanned chunks, denormals, and halves at the ends of their range."""
    grads = [randn(CHUNK + 77, k, scale=scale) for k, scale in enumerate((1e30, 1e-30, 1e-41, 1.0))]
    grads += [torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)]
    grads += [grads[4].view(torch.bfloat16)]
    grads = [torch.where(g.isfinite(), g, 1.0) for g in grads]
    results: dict[str, list[Result]] = {}
    for level in simd_levels:
        _cpu.set_simd(level)
        results[level] = [
            run(
                OptimizerCase("measure", "sgd", {"lr": 0.125}),
                [make_param(torch.zeros(g.numel()))], [[g]], max_grad_norm=2.0, norm_type=norm_type,
            )
            for g in grads
            for norm_type in (2.0, math.inf)
        ]  # fmt: skip
    assert_levels_agree(results)


@parametrize("case", FULL_CASES)
@parametrize("dtype", FLOATS)
def test_alignment(case: OptimizerCase, dtype: torch.dtype, cpu_backend: str) -> None:
    """The same numbers at storage offsets 0 to 15, params and grads moving against each other."""
    for length in (1, 16, 67, CHUNK + 3):
        values, grad = randn(length, 1, dtype), randn(length, 2, dtype)
        first: Result | None = None
        for offset in range(16):
            buffers = torch.zeros(length + 16, dtype=dtype), torch.zeros(length + 16, dtype=dtype)
            at = buffers[0][offset : offset + length], buffers[1][5 * offset % 16 :][:length]
            at[0].copy_(values)
            at[1].copy_(grad)
            result = run(case, [make_param(at[0])], [[at[1]]] * 2)
            first = first or result
            assert_agree(first, result, f"offset {offset} of {length}")


@parametrize("case", PLAIN_CASES + [BY_NAME["adamw-amsgrad"], BY_NAME["sgd-nesterov"]])
def test_position_in_the_list(case: OptimizerCase, cpu_backend: str) -> None:
    """With clipping off a tensor does not notice its neighbours."""
    lengths = [n for n in LENGTHS if n <= 600] + [CHUNK + 1]
    values = [randn(n, n) for n in lengths]
    grads = [[randn(n, 50 * step + n + 1) for n in lengths] for step in range(2)]
    together = run(case, [make_param(v.clone()) for v in values], grads)
    backwards = run(case, [make_param(v.clone()) for v in values[::-1]], [g[::-1] for g in grads])
    for index, length in enumerate(lengths):
        alone = run(case, [make_param(values[index].clone())], [[g[index]] for g in grads])
        for name in (kind.removesuffix(" 0") for kind in alone if kind.endswith(" 0")):
            value, mirrored = alone[f"{name} 0"], len(lengths) - 1 - index
            label = f"{name} of length {length}"
            assert_same_bits(value, together[f"{name} {index}"], label)
            assert_same_bits(value, backwards[f"{name} {mirrored}"], label)


@parametrize("case", PLAIN_CASES + [BY_NAME["adamw-amsgrad"]])
def test_place_of_an_element(case: OptimizerCase, cpu_backend: str) -> None:
    """One tensor and the same numbers cut into pieces of odd lengths: body and tail round alike."""
    length = CHUNK + 300
    values, grad = randn(length, 1), randn(length, 2)
    whole = run(case, [make_param(values.clone())], [[grad], [grad]])
    cuts = [0, 1, 4, 20, 51, 130, 400, CHUNK - 3, CHUNK + 20, length]
    spans = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    pieces = run(
        case, [make_param(values[s].clone()) for s in spans], [[grad[s] for s in spans]] * 2
    )
    for kind in ("param", *(k.removesuffix(" 0") for k in whole if k.startswith("exp"))):
        joined = torch.cat([pieces[f"{kind} {k}"] for k in range(len(spans))])
        assert_same_bits(whole[f"{kind} 0"], joined, kind)


EXACT_CASES = [case for case in BY_NAME.values() if not case.common]


@parametrize("case", EXACT_CASES)
@parametrize("pair", DTYPE_PAIRS)
def test_update_is_the_contract(
    case: OptimizerCase, pair: tuple[torch.dtype, torch.dtype], cpu_backend: str
) -> None:
    param_dtype, grad_dtype = pair
    values, length = randn(67, 1, param_dtype), 67
    hyper = {**model_of(case.rule).DEFAULTS, "decoupled_weight_decay": True, **case.hyper}
    step = exact.ExactStep(case.rule, values.float().numpy(), hyper)
    grads = [randn(length, k + 9, grad_dtype) for k in range(5)]
    result = run(case, [make_param(values.clone())], [[g] for g in grads])
    for grad in grads:
        step.step(grad.float().numpy())
    master = torch.from_numpy(step.master)
    assert_same_bits(result["param 0"], master.to(param_dtype), "param")
    for kind, expected in step.state.items():
        assert_same_bits(result[f"{kind} 0"], torch.from_numpy(expected), kind)
    if param_dtype != torch.float32:
        assert_same_bits(result["master_param 0"], master, "master_param")


@pytest.mark.parametrize("grad_scale", [1.0, 1000.0, 7.0])
@parametrize("case", PLAIN_CASES)
def test_clipped_update_is_the_contract(
    case: OptimizerCase, grad_scale: float, cpu_backend: str
) -> None:
    """From gradients of several tensors and chunks to params: norm, coefficient, clamp, update."""
    lengths, limit = [5, CHUNK + 300, 700], 0.75
    values = [randn(n, n) for n in lengths]
    hyper = {**model_of(case.rule).DEFAULTS, "decoupled_weight_decay": True, **case.hyper}
    steps = [exact.ExactStep(case.rule, v.numpy().copy(), hyper) for v in values]
    params = [make_param(v.clone()) for v in values]
    opt = FUSED[case.rule](params, max_grad_value=limit, backend="cpu", **case.hyper)
    inv_scale = np.float32(1.0 / grad_scale)
    for count in range(6):
        max_grad_norm = opt.max_grad_norm = (0.3, 50.0, 1e9)[count % 3] / (1 + count)
        grads = [randn(n, n + count, scale=grad_scale * (1 + count)) for n in lengths]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        with scaler_attributes(opt, grad_scale, None):
            opt.step()
        norm = exact.grad_norm([g.numpy() for g in grads], inv_scale)
        coef = exact.clip_coef(norm, max_grad_norm)
        assert opt.grad_norm.item() == np.float32(norm)
        assert opt.clip_coef.item() == coef, f"clip_coef of step {count}"
        for index, step in enumerate(steps):
            step.step(grads[index].numpy(), np.float32(coef * inv_scale), limit)
            label = f"param {index} after step {count}"
            assert_same_bits(params[index].detach(), torch.from_numpy(step.master), label)


@parametrize("dtype", FLOATS)
def test_norm_is_the_contract(dtype: torch.dtype, cpu_backend: str) -> None:
    """Lanes, their tree, and the order of chunks: 299 of them fold over the 256 of the total."""
    lists = [[n] for n in (1, 2, 67, 255, 256, 257, 513, 5000, CHUNK, CHUNK + 1, 3 * CHUNK + 700)]
    lists += [[5, 300, CHUNK + 3, 0, 17], list(range(300)), [2 * CHUNK + 1, 1, CHUNK - 1]]
    for lengths in lists:
        # Magnitudes that differ from chunk to chunk make the order of their sum visible.
        grads = [randn(n, n + k, dtype, 3.0 ** (k % 7)) for k, n in enumerate(lengths)]
        params = [make_param(torch.zeros(n)) for n in lengths]
        case = OptimizerCase("measure", "sgd", {"lr": 0.0}, {"max_grad_norm": math.inf})
        result = run(case, params, [grads])
        expected = exact.grad_norm([g.float().numpy() for g in grads])
        assert result["grad_norm"].item() == np.float32(expected), f"lengths {lengths[:5]}"
