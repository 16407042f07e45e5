"""The CUDA kernels, compiled for the CPU, against the CPU backend: the same bits."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Sequence
from typing import Any

import cuda_shim
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
    LAYOUT_SHAPE,
    LAYOUTS,
    LENGTHS,
    NONFINITE,
    PLAIN_CASES,
    OptimizerCase,
    dtype_name,
    parametrize,
)
from conftest import require_cpu_backend
from cuda_twins import RUN_LENGTHS, ShimTwins
from gpu_twins import grads_like
from harness import FUSED, make_param, randn
from tolerances import assert_same_bits
from torch import Tensor

import fusedopt
from fusedopt.backends import cpu, device, records
from fusedopt.plan import state as plan_state

MEASURE = OptimizerCase("measure", "sgd", {"lr": 0.125}, {"max_grad_norm": 2.0})

_shim = pytest.fixture(cuda_shim.fixture)


@pytest.fixture(autouse=True)
def shim(_shim: cuda_shim.CudaShim) -> cuda_shim.CudaShim:
    require_cpu_backend()
    return _shim


# ---- the rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("master_weights", [None, False])
@parametrize("case", ALL_CASES)
def test_options(case: OptimizerCase, master_weights: bool | None) -> None:
    for dtype in FLOATS if master_weights is None else HALVES:
        ShimTwins.of_lengths(case, [700, 5, 0], dtype, master_weights=master_weights).run()


@pytest.mark.parametrize("master_weights", [None, False])
@parametrize("pair", DTYPE_PAIRS)
@parametrize("case", KERNEL_CASES)
def test_dtypes(
    case: OptimizerCase, pair: tuple[torch.dtype, torch.dtype], master_weights: bool | None
) -> None:
    ShimTwins.of_lengths(case, RUN_LENGTHS, pair[0], master_weights=master_weights).run(pair[1])


@parametrize("pair", DTYPE_PAIRS)
@parametrize("case", FULL_CASES)
def test_lengths(case: OptimizerCase, pair: tuple[torch.dtype, torch.dtype]) -> None:
    ShimTwins.of_lengths(case, LENGTHS, pair[0]).run(pair[1], steps=2)


@parametrize("dtype", FLOATS)
@parametrize("case", KERNEL_CASES)
def test_alignment(case: OptimizerCase, dtype: torch.dtype) -> None:
    """Params and gradients at storage offsets 0 to 8, moving against each other."""
    offsets = [(p, g) for p, g in itertools.product(range(9), repeat=2) if p in (0, 3, 4) or g == 5]
    lengths = [(3, 256, 517)[k % 3] for k in range(len(offsets))]

    def shifted(values: Tensor, offset: int) -> Tensor:
        buffer = torch.full((values.numel() + 16,), 77.0, dtype=values.dtype)
        view = buffer[offset : offset + values.numel()]
        return view.copy_(values)

    values = [shifted(randn(n, n, dtype), p) for n, (p, _) in zip(lengths, offsets, strict=True)]
    twins = ShimTwins.of(case, values)
    for step in range(2):
        grads = grads_like(twins.params, step, dtype)
        twins.step([shifted(g, at) for g, (_, at) in zip(grads, offsets, strict=True)])
        twins.check()


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids=" ".join)
def test_layouts(layouts: tuple[str, str]) -> None:
    of_param, of_grad = (LAYOUTS[name] for name in layouts)
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.bfloat16)):
        twins = ShimTwins.of(case, [of_param(randn(LAYOUT_SHAPE, 1, dtype)), randn(5, 2, dtype)])
        for step in range(2):
            grads = grads_like(twins.params, step)
            twins.step([of_grad(grads[0]), grads[1]])
            twins.check()


@parametrize("dtype", HALVES)
def test_masters_follow_external_writes(dtype: torch.dtype) -> None:
    for case in KERNEL_CASES:
        twins = ShimTwins.of_lengths(case, [1, 300, CHUNK + 300], dtype)
        twins.run(steps=1)
        for step in range(1, 4):
            for params in (twins.params, twins.twin_params):
                for index, param in enumerate(params):
                    with torch.no_grad():
                        param[:: 1 + 2 * step].mul_(1.5)
                        param[-1] = float(index + step)
            twins.step(grads_like(twins.params, step))
            twins.check()


def test_groups_have_their_own_options() -> None:
    """One launch for groups of every kind."""
    hypers: dict[str, list[dict[str, Any]]] = {
        rule: [case.hyper for case in ALL_CASES if case.rule == rule and not case.common]
        for rule in FUSED
    }
    for rule, own in hypers.items():
        for dtype in FLOATS:
            groups = [
                {**hyper, "params": [randn(300 + k, k, dtype), randn(3, k, dtype)]}
                for k, hyper in enumerate(own)
            ]
            twins = ShimTwins(rule, groups, max_grad_norm=5.0)
            twins.run()
            twins.set(1, lr=0.5, weight_decay=0.01)
            twins.run()


def test_absent_gradients() -> None:
    for case in KERNEL_CASES:
        twins = ShimTwins.of_lengths(case, [5, CHUNK + 5, 300, 0, 1])
        for step, present in enumerate(["01234", "134", "", "0", "1", "01234", "2"]):
            grads = grads_like(twins.params, step)
            twins.step([g if str(k) in present else None for k, g in enumerate(grads)])
            twins.check()


def test_thousands_of_tensors() -> None:
    for case in PLAIN_CASES:
        twins = ShimTwins.of_lengths(case, [1 + k % 13 for k in range(2500)], max_grad_norm=1.0)
        twins.run(steps=2)


def lazily_zero(n: int) -> Tensor:
    """bf16 zeros that take memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 2 * n, flags=flags), dtype=torch.bfloat16)


def test_more_elements_than_an_int_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last chunks of a tensor of 2^31 elements and more; the rest stays away."""
    n, near, far = 2**31 + 5000, slice(0, CHUNK), slice(-2 * CHUNK, None)
    for module in (cpu, device):
        chunks = records.chunk_table([n])
        few = torch.cat([chunks[:1], chunks[-3:]])
        monkeypatch.setattr(module, "chunk_table", lambda numels, few=few: few)
    params = [make_param(lazily_zero(n)) for _ in range(2)]
    grad = lazily_zero(n)
    grad[near], grad[far] = randn(CHUNK, 1, grad.dtype), randn(2 * CHUNK, 2, grad.dtype)
    for param, backend in zip(params, ("cuda", "cpu"), strict=True):
        param.grad = grad
        fusedopt.FusedSGD(
            [param], lr=0.5, master_weights=False, max_grad_norm=1.0, backend=backend
        ).step()
    for part in (near, far):
        assert params[0][part].any()
        assert_same_bits(params[0][part], params[1][part], str(part))


# ---- states of 16 bits --------------------------------------------------------------------------


def narrow_states(twins: ShimTwins, codecs: Sequence[torch.dtype]) -> None:
    """Every state and master gets one of `codecs` in turn, the same in both optimizers."""
    turn = itertools.count()
    for param, other in zip(twins.params, twins.twin_params, strict=True):
        for name in sorted(twins.opt.state[param].keys() - {"step"}):
            dtype = codecs[next(turn) % len(codecs)]
            for optimizer, key in ((twins.opt, param), (twins.twin, other)):
                optimizer.state[key][name] = optimizer.state[key][name].to(dtype)


@pytest.mark.parametrize("master_weights", [None, False])
@parametrize("dtype", FLOATS)
@parametrize("case", KERNEL_CASES)
def test_half_states(
    case: OptimizerCase,
    dtype: torch.dtype,
    master_weights: bool | None,
    shim: cuda_shim.CudaShim,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No option makes such states yet: they are put in the place of those that are there."""
    fits = plan_state.fits

    def fits_narrow(value: object, like: Tensor) -> bool:
        return fits(value.float() if isinstance(value, Tensor) else value, like)

    monkeypatch.setattr(plan_state, "fits", fits_narrow)
    for codecs in ([torch.bfloat16], [torch.float16], [*FLOATS, torch.bfloat16]):
        twins = ShimTwins.of_lengths(case, RUN_LENGTHS, dtype, master_weights=master_weights)
        twins.run(steps=1)
        has_states = any(twins.opt.state[p].keys() - {"step"} for p in twins.params)
        narrow_states(twins, codecs)
        shim.reset()
        for grad_dtype in (dtype, torch.float32, torch.float16):
            twins.run(grad_dtype, steps=1)
        updates = {e.kernel for e in shim.launches() if e.kernel.startswith("update_kernel")}
        assert all(kernel.endswith("true>") == has_states for kernel in updates), updates
        found = {
            s.dtype for p in twins.params for n, s in twins.opt.state[p].items() if n != "step"
        }
        assert found == (set(codecs) if has_states else set())


# ---- norm, clipping, skipping -------------------------------------------------------------------


@parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_norm(dtype: torch.dtype, norm_type: float) -> None:
    """The order of lanes and of chunks: magnitudes that differ from chunk to chunk show it."""
    lists = [[n] for n in (1, 2, 67, 255, 256, 257, 513, 5000, CHUNK, CHUNK + 1, 3 * CHUNK + 700)]
    lists += [[5, 300, CHUNK + 3, 0, 17], list(range(300)), [2 * CHUNK + 1, 1, CHUNK - 1]]
    lists.append([9] * 700)
    for lengths in lists:
        twins = ShimTwins.of(MEASURE, [torch.zeros(n) for n in lengths], norm_type=norm_type)
        grads = [randn(n, n + k, dtype, 3.0 ** (k % 7)) for k, n in enumerate(lengths)]
        twins.step(grads, grad_scale=7.0)
        twins.check()


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_hard_norms(norm_type: float) -> None:
    """Squares that over- or underflow, denormals, and halves at the ends of their range."""
    scales = (1e38, 1e30, 1e19, 1e-12, 1e-30, 1e-41, 0.0)
    grads = [randn(CHUNK + 77, k, scale=scale) for k, scale in enumerate(scales)]
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in HALVES:
        every = halves.view(dtype)
        grads.append(torch.where(every.isfinite(), every, 1.0))
    grads.append(torch.cat([grads[1], grads[4]]))
    for grad, grad_scale in itertools.product(grads, (None, 65536.0, 3e-5)):
        twins = ShimTwins.of(MEASURE, [torch.zeros(grad.numel())], norm_type=norm_type)
        twins.step([grad], grad_scale)
        twins.check()


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("skip", [True, False])
def test_nonfinite_gradients(value: float, skip: bool) -> None:
    lengths = [3, CHUNK + 300, 260]
    places = [(0, 0), (0, 2), (1, 0), (1, 255), (1, CHUNK - 1), (1, CHUNK), (1, -1), (2, 100)]
    for case, dtype in itertools.product(FULL_CASES, (torch.float32, torch.float16)):
        twins = ShimTwins.of_lengths(case, lengths, dtype, skip_nonfinite=skip)
        twins.run(steps=1)
        for step, (tensor, element) in enumerate(places):
            grads = grads_like(twins.params, step)
            grads[tensor][element] = value
            twins.step(grads)
            twins.check()
        assert bool(twins.opt.skipped_steps) == skip
        if skip:
            twins.run(steps=1)


@parametrize("case", KERNEL_CASES)
def test_what_a_scaler_sets(case: OptimizerCase) -> None:
    twins = ShimTwins.of_lengths(case, [300, 3], torch.float16)
    given = itertools.product((None, 1.0, 1000.0, 7.0, 0.25), (None, 0.0, 1.0, 2.0, math.nan))
    for step, (grad_scale, found_inf) in enumerate(given):
        twins.step(grads_like(twins.params, step), grad_scale, found_inf)
        twins.check()


def test_loss_scale_goes_up_and_down() -> None:
    """Our GradScaler, which asks the optimizer for the flag; its scale is on the device as well."""
    for case in KERNEL_CASES:
        twins = ShimTwins.of_lengths(case, [300, CHUNK + 1])
        scalers = [fusedopt.GradScaler("cpu", 512.0, growth_interval=2) for _ in range(2)]
        for step in range(8):
            grads = grads_like(twins.params, step)
            if step in (0, 3, 4):
                grads[step % 2][-1] = math.inf
            twins.give(grads)
            for scaler, optimizer in zip(scalers, (twins.opt, twins.twin), strict=True):
                scaler.scale(torch.ones(()))
                scaler.step(optimizer)
                scaler.update()
            twins.check()
            assert scalers[0].get_scale() == scalers[1].get_scale()


# ---- options and state ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_options_in_tensors(rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the kernels, when they run: as on a GPU, where the host does not look at them."""

    def hyper(k: int) -> dict[str, Any]:
        own: dict[str, Any] = {"lr": 0.1 / k, "weight_decay": 0.3 / k}
        if rule == "adamw":
            own["betas"] = (torch.tensor(0.7, dtype=dtype), torch.tensor(0.8, dtype=dtype))
        return {n: v if n == "betas" else torch.tensor(v, dtype=dtype) for n, v in own.items()}

    groups = [{"params": [randn(300, k), randn(5, k)], **hyper(k)} for k in (1, 2, 3)]
    groups.append({"params": [randn(7, 1)], "lr": 0.01, "weight_decay": 0.1})
    twins = ShimTwins(rule, groups, max_grad_norm=1.0)
    monkeypatch.setattr(
        fusedopt.optimizer.FusedOptimizer, "_stays_on_device", lambda self, value: self is twins.opt
    )
    twins.run()
    for optimizer in (twins.opt, twins.twin):
        for group in optimizer.param_groups[:3]:
            group["lr"].mul_(0.5)
    twins.run()


def test_state_moves_between_backends() -> None:
    for case in FULL_CASES:
        twins = ShimTwins.of_lengths(case, RUN_LENGTHS, torch.bfloat16)
        twins.run()
        saved, other = twins.opt.state_dict(), twins.twin.state_dict()
        twins.opt.load_state_dict(other)
        twins.twin.load_state_dict(saved)
        twins.run()
