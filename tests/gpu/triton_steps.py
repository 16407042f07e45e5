"""A process that takes steps of every kind with the Triton backend, for test_gpu_compiles.py.

Prints what was compiled and what came from Triton's cache, as JSON: {"compiled": [[kernels of the
first round], [of the second]], "cached": the same, "ran": variants, where they are counted}. The
second round has other values, lengths, counts and layouts of everything.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from cases import ALL_CASES, CHUNK
from gpu_helpers import CPU, GPU, STAND_IN, module_of
from harness import FUSED, make_param, randn

DEVICE = CPU if STAND_IN else GPU
ROUNDS: list[dict[str, Any]] = [
    {"lengths": [17], "values": {}, "grad_scale": None},
    {
        "lengths": [1, 0, 33, CHUNK + 1, 16],
        "values": {"lr": 1.0, "weight_decay": 0.0},
        "grad_scale": 4096.0,
    },
]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)]


class Compilations:
    """Listens to Triton's compiler."""

    def __init__(self) -> None:
        self.compiled: list[list[str]] = []
        self.cached: list[list[str]] = []

    def begin_round(self) -> None:
        self.compiled.append([])
        self.cached.append([])

    def __call__(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        own = self.cached if cache_hit else self.compiled
        own[-1].append(f"{src.fn.__name__} {sorted(map(str, src.constants.values()))}")


def take_steps(lengths: list[int], values: dict[str, Any], grad_scale: float | None) -> None:
    for case in ALL_CASES:
        for dtype, grad_dtype in DTYPES:
            params = [make_param(randn(n, n, dtype).to(DEVICE)) for n in lengths]
            options = {**case.hyper, **values, **case.common}
            opt = FUSED[case.rule](params, backend="triton", **options)
            for param in params:
                param.grad = randn(param.numel(), 1, grad_dtype).to(DEVICE)
            if grad_scale is not None:
                opt.grad_scale = torch.tensor(grad_scale, device=DEVICE)
            opt.step()


def main() -> None:
    import triton

    listener = triton.knobs.compilation.listener = Compilations()
    with contextlib.ExitStack() as stack:
        if STAND_IN:
            import triton_interpreter

            stack.enter_context(triton_interpreter.installed())
        for options in ROUNDS:
            listener.begin_round()
            take_steps(**options)
        launched = getattr(module_of("triton").driver(), "launched", [])
        ran = sorted({name for name, _ in launched})
    result = {"compiled": listener.compiled, "cached": listener.cached, "ran": ran}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
