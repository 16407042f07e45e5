"""What the host code of the Triton backend launches: which variant, and with which inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import FULL_CASES
from conftest import require_cpu_backend
from gpu_twins import grads_like
from harness import FUSED
from torch import Tensor
from triton_twins import TritonTwins

from fusedopt.backends import triton as backend


class NoKernels(triton_interpreter.Interpreter):
    """Notes what would be launched."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []
        self.refused = ""

    def launcher(
        self, device: torch.device, variant: backend.Key, values: dict[str, int]
    ) -> backend.Launch:
        name = "-".join(map(str, variant))
        if name == self.refused:
            raise RuntimeError("the compiler says no")
        self.made.append(name)
        return lambda programs, stream: self.launched.append((name, programs))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoKernels]:
    require_cpu_backend()
    driver = NoKernels()
    monkeypatch.setattr(backend.driver, "made", driver)
    yield driver


def step(twins: TritonTwins, grads: list[Tensor]) -> None:
    twins.give(grads)
    twins.opt.step()


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_the_variant_follows_the_gradients(driver: NoKernels, case: Any) -> None:
    twins = TritonTwins.of_lengths(case, [5, 3])
    states = len(FUSED[case.rule].rule.states)
    full, half = grads_like(twins.params, 0), grads_like(twins.params, 0, torch.bfloat16)
    steps = [
        (full, "float32"),
        (full, "float32"),
        ([full[0], half[1]], "any"),
        ([full[0], half[1]], "any"),
        (full, "float32"),
        ([half[0].half(), full[1]], "any"),
        (half, "any"),
        ([None, full[1]], "float32"),
    ]
    for grads, streams in steps:
        step(twins, grads)
        assert driver.launched[-1][0] == f"update-{case.rule}-{states}-{streams}"
    assert len([name for name in driver.made if name.startswith("update")]) == 5, driver.made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_params_need_no_switch(driver: NoKernels, dtype: torch.dtype) -> None:
    twins = TritonTwins.of_lengths(FULL_CASES[1], [5, 3], dtype)
    for k in range(3):
        step(twins, grads_like(twins.params, k, (dtype, torch.float32)[k % 2]))
    updates = [name for name, _ in driver.launched if name.startswith("update")]
    assert updates == ["update-sgd-1-any"] * 3


def test_a_variant_that_did_not_compile_is_tried_again(driver: NoKernels) -> None:
    """Rather than the other one used, which would misread the gradients."""
    twins = TritonTwins.of_lengths(FULL_CASES[1], [5, 3])
    step(twins, grads_like(twins.params, 0))
    halves = grads_like(twins.params, 1, torch.bfloat16)
    driver.refused = "update-sgd-1-any"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="says no"):
            step(twins, halves)
    driver.refused = ""
    step(twins, halves)
    assert driver.launched[-1][0] == "update-sgd-1-any"


def test_a_step_with_nothing_new_copies_nothing(
    driver: NoKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = TritonTwins.of_lengths(FULL_CASES[0], [5, 3])
    grads = grads_like(twins.params, 0)
    copies = []
    run = backend._Upload.run

    def counted(self: Any, capturing: bool) -> None:
        copies.append(capturing)
        run(self, capturing)

    monkeypatch.setattr(backend._Upload, "run", counted)
    twins.give(grads)
    twins.opt.step()
    before = len(copies)
    for _ in range(3):
        twins.opt.step()
    assert len(copies) == before

    def copied_once() -> None:
        nonlocal before
        twins.opt.step()
        twins.opt.step()
        assert len(copies) == before + 1
        before += 1

    twins.opt.param_groups[0]["lr"] = 0.123
    copied_once()
    twins.params[0].grad = twins.params[0].grad.clone()
    copied_once()
    twins.params[1].grad = None
    copied_once()
    twins.opt.max_grad_norm = 0.5
    copied_once()
    monkeypatch.setattr(driver, "capturing", lambda device: True)
    twins.opt.step()
    monkeypatch.undo()
    assert copies[-1] is True
