"""The examples' training as cases of a benchmark: with torch.optim, and with fusedopt."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from benchmarks.pipelines import DifferentStep, Unavailable
from benchmarks.report import ROOT

OURS = "fusedopt"
PIPELINES = ("torch_fused", "torch_foreach", OURS)
WARM_UP = 3  # iterations; state is made in the first
MAX_WARM_UP = 20
# After the warm-up, of the loss: rounding to half multiplies differences in the last bits.
SAME_LOSS = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}
# In each example: its data, and its training with torch.optim and with fusedopt.
_PARTS = {
    "train_digits": ("Digits", "torch_training", "fused_training"),
    "train_char_transformer": ("Text", "TorchTraining", "FusedTraining"),
}


@dataclass(frozen=True)
class Case:
    example: str
    dtype: str
    rounds: int
    options: tuple[str, ...] = ()
    quick_options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.example}-{self.dtype}" + "".join(self.options).replace("--", "-")


_SMALL = ("--layers", "1", "--width", "64")


def all_cases(device: torch.device) -> dict[str, Case]:
    """On a CPU fp16 is left out: its convolutions and matrix products take seconds there."""
    on_gpu = device.type == "cuda"
    text = "train_char_transformer"
    cases = [
        Case("train_digits", "fp16" if on_gpu else "bf16", 80),
        Case(text, "fp32", 40, quick_options=_SMALL),
        Case(text, "fp32", 12, ("--batch", "32"), _SMALL),
        Case(text, "bf16", 20, quick_options=_SMALL),
    ]
    if on_gpu:
        cases.append(Case(text, "fp16", 40, quick_options=_SMALL))
    return {case.name: case for case in cases}


def start(case: Case, steps: int, device: torch.device, quick: bool) -> dict[str, Any]:
    """The example's training with every pipeline, from the same seed, for at most so many steps."""
    example = _load(case.example)
    data_class, *makers = (getattr(example, part) for part in _PARTS[case.example])
    options = [*case.options, *(case.quick_options if quick else ())]
    options += ["--dtype", case.dtype, "--device", str(device), "--steps", str(steps)]
    plain = example.parse_arguments(options)
    data = data_class(plain)
    runs = {}
    for pipeline in PIPELINES:
        if pipeline == OURS:
            runs[pipeline] = makers[1](plain, data)
            continue
        baseline = pipeline.removeprefix("torch_")
        runs[pipeline] = makers[0](
            example.parse_arguments([*options, "--baseline", baseline]), data
        )
    return runs


def _load(example: str) -> ModuleType:
    """The examples find each other as scripts do, by their folder on the path."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(example)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error}; pip install 'fusedopt[examples]'") from error


def warm_up(runs: Mapping[str, Any]) -> None:
    """A few iterations of each; more while steps are skipped, as a scaler's first ones may be."""
    in_a_row = 0
    for _ in range(MAX_WARM_UP):
        before = [run.scaler.get_scale() for run in runs.values()]
        for run in runs.values():
            run.step()
        skipped = before != [run.scaler.get_scale() for run in runs.values()]
        in_a_row = 0 if skipped else in_a_row + 1
        if in_a_row == WARM_UP:
            break


def check_same_training(runs: Mapping[str, Any], dtype: str) -> None:
    allowed = SAME_LOSS[dtype]
    first, *others = runs
    for other in others:
        pairs = zip(runs[first].losses, runs[other].losses, strict=True)
        if not all(abs(a - b) <= allowed * abs(a) for a, b in pairs):
            raise DifferentStep(f"{first} and {other} have different losses")
