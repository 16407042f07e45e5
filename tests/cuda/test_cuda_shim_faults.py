"""CUDA errors at every call of the runtime: reported in CUDA's words, and without a trace."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FULL_CASES, OptimizerCase, adamw, parametrize
from cuda_shim import CudaShim
from gpu_helpers import runners, two_devices
from gpu_twins import Twins, grads_like
from tolerances import assert_same_bits
from torch import Tensor

import fusedopt
from fusedopt.backends import cuda

ERRORS = {
    2: "cudaErrorMemoryAllocation: out of memory",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    999: "cudaErrorUnknown: unknown error",
}
CASES = [*FULL_CASES, adamw("unmeasured", lr=0.01, weight_decay=0.1)]
Snapshot = dict[str, Tensor]

shim = runners("shim")


@pytest.fixture(params=[0, 2], ids=["current_device", "other_device"])
def device(request: pytest.FixtureRequest, shim: CudaShim, monkeypatch: pytest.MonkeyPatch) -> int:
    """Where the parameters are; the caller's current device is 0."""
    shim.set(devices=3)
    monkeypatch.setattr(cuda.driver(), "index", lambda device: request.param, raising=False)
    number: int = request.param
    return number


def snapshot(twins: Twins) -> Snapshot:
    """Copies of everything that a failed step must leave alone."""
    found = {}
    for index, param in enumerate(twins.params):
        found[f"param {index}"] = param.detach()
        if param.grad is not None:
            found[f"grad {index}"] = param.grad
        for name, value in twins.opt.state.get(param, {}).items():
            found[f"{name} {index}"] = value
    return copy.deepcopy(found)


def assert_unmoved(old: Snapshot, new: Snapshot) -> None:
    """State that a failed first step has made must be what it is made as."""
    for name, value in new.items():
        kind, _, index = name.partition(" ")
        if name in old:
            assert_same_bits(value, old[name], name)
        elif kind == "master_param":
            assert_same_bits(value, old[f"param {index}"].float(), name)
        else:
            assert kind != "grad" and not value.any(), f"{name} was born moved"
    assert old.keys() <= new.keys()


def fail_everywhere(
    shim: CudaShim, twins: Twins, step: Callable[[], None], done: Callable[[], None]
) -> int:
    """`step` with its first call failing, then with its second, until none is left to fail.

    Returns how many there are. `done` is called whenever a step came through: at the end, and when
    only putting back the caller's device had failed, which stops nobody.
    """
    errors = itertools.cycle(ERRORS.items())
    for count in range(1, 50):
        error, text = next(errors)
        before, calls = snapshot(twins), shim.calls()
        shim.fail("", error, count)
        try:
            step()
        except RuntimeError as raised:
            assert str(raised).startswith("fusedopt: CUDA: ") and str(raised).endswith(text)
            assert_unmoved(before, snapshot(twins))
            assert shim.current_device() == 0
            continue
        shim.fail("", 0, 0)
        done()
        if shim.calls() - calls < count:
            return count - 1
        assert shim.current_device() != 0, f"call {count} failed and nobody noticed"
        shim.make_current(0)
    raise AssertionError("it never came through")


@parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize("case", CASES)
def test_every_call_of_a_step(
    case: OptimizerCase, dtype: torch.dtype, shim: CudaShim, device: int
) -> None:
    """A step with a new plan, one whose gradients have moved, one where nothing has changed."""
    twins = Twins.of_lengths(case, [300, 5, 0], dtype)
    used: list[Any] = []  # held, so that the next gradients lie elsewhere

    def move() -> None:
        used.append([p.grad for p in twins.params])
        for param in twins.params:
            assert param.grad is not None
            param.grad = param.grad.clone()

    def step_twin() -> None:
        twins.twin.step()
        twins.check()

    sites = []
    for prepare in (twins.opt._shared.drop_plans, move, lambda: None):
        twins.give(grads_like(twins.params, len(sites)))
        if len(sites) == 2:
            twins.opt.step()
            step_twin()

        def step(prepare: Callable[[], None] = prepare) -> None:
            prepare()
            twins.opt.step()

        sites.append(fail_everywhere(shim, twins, step, step_twin))
    # In a steady step each of the two kernels asks which device is current and is launched; on
    # another device there are two more, to make that current and the caller's again.
    assert sites[2] == (4 if device == 0 else 8), sites
    assert sites[0] > sites[1] > sites[2]


def test_a_table_in_pieces(shim: CudaShim) -> None:
    """Any of the launches that write it may fail."""
    twins = Twins.of_lengths(adamw("default"), [1] * 300)
    for piece in (1, 2):
        twins.give(grads_like(twins.params, piece))
        shim.fail("cudaLaunchKernelEx", 2, piece)
        with pytest.raises(RuntimeError, match="write"):
            twins.opt.step()
        twins.opt.step()
        twins.twin.step()
        twins.check()


def test_a_launch_that_ran_but_reports_an_earlier_error(shim: CudaShim) -> None:
    """CUDA may do so. The table on the device is then the new one, though the step has failed."""
    twins = Twins.of_lengths(adamw("default"), [300, 5])
    twins.step(grads_like(twins.params, 0))
    twins.check()
    first = [param.grad for param in twins.params]
    twins.give(grads_like(twins.params, 1))
    second = [param.grad for param in twins.params]
    shim.set(late_errors=1)
    shim.fail("cudaLaunchKernelEx", 2)
    with pytest.raises(RuntimeError, match="write"):
        twins.opt.step()
    assert all(a is not b for a, b in zip(first, second, strict=True))
    for param, twin, grad in zip(twins.params, twins.twin_params, first, strict=True):
        param.grad = twin.grad = grad  # where they were when the table was last known
    twins.step()
    twins.check()


def test_an_update_that_fails_on_one_device(
    shim: CudaShim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has moved, so this one follows before the error is raised."""
    two_devices(monkeypatch)
    twins = Twins.of_lengths(FULL_CASES[0], [300, 5])
    twins.run(steps=2)
    shim.fail("cudaLaunchKernelEx", 2, 6)  # after two of each verb but one
    with pytest.raises(RuntimeError, match="update"):
        twins.opt.step()
    twins.twin.step()
    twins.check()


@parametrize("case", FULL_CASES)
def test_under_a_scaler(case: OptimizerCase, shim: CudaShim) -> None:
    """The step may be tried again; then the scale goes on as if nothing had happened, and a skipped
    step counts once."""
    twins = Twins.of_lengths(case, [300, 5], torch.float16)
    scalers = [fusedopt.GradScaler("cpu", 512.0, growth_interval=2) for _ in range(2)]
    for step in range(4):
        grads = grads_like(twins.params, step)
        if step == 1:
            grads[0][7] = math.nan
        twins.give(grads)
        for scaler in scalers:
            scaler.scale(torch.ones(()))
        steps = [
            lambda pair=pair: pair[0].step(pair[1])
            for pair in zip(scalers, (twins.opt, twins.twin), strict=True)
        ]
        fail_everywhere(shim, twins, *steps)
        for scaler in scalers:
            scaler.update()
        twins.check()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert twins.opt.skipped_steps == 1


def test_the_error_names_the_call(shim: CudaShim) -> None:
    """And leaves nothing behind: neither sums, nor CUDA's last error for whoever asks next."""
    twins = Twins.of_lengths(FULL_CASES[0], [300])
    twins.run(steps=1)
    for count, verb in enumerate(("reduce", "update"), start=1):
        shim.fail("cudaLaunchKernelEx", 719, count)
        with pytest.raises(RuntimeError, match=f"{verb}.*cudaErrorLaunchFailure"):
            twins.opt.step()
        assert shim.last_error() == 0
        twins.check()
        twins.step()
        twins.check()


def test_no_room_for_a_block(shim: CudaShim) -> None:
    shim.set(blocks_per_processor=0)
    twins = Twins.of_lengths(FULL_CASES[0], [300])
    twins.give(grads_like(twins.params, 0))
    with pytest.raises(RuntimeError, match="block"):
        twins.opt.step()
    shim.set(blocks_per_processor=1)
    twins.opt.step()


def test_no_gpu_and_old_driver(shim: CudaShim) -> None:
    count = shim.module.device_count
    assert count() == 1
    shim.set(devices=0)
    with pytest.raises(RuntimeError, match="cudaErrorNoDevice: no CUDA-capable device"):
        count()
    shim.set(devices=1)
    shim.fail("cudaGetDeviceCount", 35)
    with pytest.raises(RuntimeError, match="driver version is insufficient"):
        count()
    assert shim.module.versions() == {"driver": 13000, "runtime": 13000}
    shim.fail("cudaDriverGetVersion", 35)
    assert shim.module.versions() == {"runtime": 13000}
