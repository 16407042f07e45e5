"""`python -m benchmarks.gpu.first_step [--dry-run]`: the first step of a process with Triton.

That is where the kernels are compiled, or read from Triton's cache. `measure_first_steps` starts
such processes with an empty cache, and then with the one that the last of them has filled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

import fusedopt
from benchmarks.gpu.cases import tiny
from benchmarks.gpu.machine import Cuda, DryRun, Machine
from benchmarks.param_sets import GRAD_SCALE, Gradients, equal, make_params
from benchmarks.pipelines import ADAMW, MAX_GRAD_NORM
from benchmarks.report import ROOT
from benchmarks.timing import Spread, spread

SAMPLES = {"empty": 1, "filled": 3}  # processes, by what is in the cache; in a dry run one
LIMIT_S = 120.0


@dataclass
class FirstSteps:
    cache: str  # empty or filled
    wall_ms: Spread
    samples: int
    numel: int
    tensors: int
    note: str


def measure_first_steps(machine: Machine) -> list[FirstSteps]:
    """Raises RuntimeError if a process fails."""
    measured = []
    with tempfile.TemporaryDirectory() as cache:
        for state, samples in SAMPLES.items():
            samples = 1 if machine.dry else samples
            results = [_in_a_process(cache, machine.dry) for _ in range(samples)]
            last = results[-1]
            note = (
                f"{last['compiled']} kernels compiled, {last['cached']} from the cache; "
                f"{last['import_ms']:.0f} ms of it import Triton; second step "
                f"{last['second_ms']:.3g} ms"
            )
            times = spread([result["first_ms"] for result in results])
            numel, tensors = last["numel"], last["tensors"]
            measured.append(FirstSteps(state, times, samples, numel, tensors, note))
    return measured


def _in_a_process(cache: str, dry: bool) -> dict[str, Any]:
    # the installed package, before the checkout is on the path
    program = (
        "import fusedopt, sys; sys.path.append(sys.argv.pop(1)); "
        "from benchmarks.gpu import first_step; first_step.main()"
    )
    command = [sys.executable, "-c", program, str(ROOT), *(["--dry-run"] if dry else [])]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env={**os.environ, "TRITON_CACHE_DIR": cache},
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the first step took more than {LIMIT_S:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"the first step failed: {lines[-1][:200]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class _Compilations:
    """Listens to Triton's compiler."""

    compiled = cached = 0

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        self.cached += cache_hit
        self.compiled += not cache_hit


def main() -> None:
    machine: Machine = DryRun() if sys.argv[1:] == ["--dry-run"] else Cuda()
    shapes = tiny() if machine.dry else equal(300, 1000)
    params = make_params(shapes, torch.float32, machine.device)
    optimizer = fusedopt.FusedAdamW(
        params, max_grad_norm=MAX_GRAD_NORM, backend=machine.backends["triton"], **ADAMW
    )
    device_type = machine.device.type
    scaler = fusedopt.GradScaler(device_type, init_scale=GRAD_SCALE)
    scaler.scale(torch.ones((), device=machine.device))
    grads = Gradients(shapes, torch.float32, "new", machine.device)

    def step() -> float:
        grads.backward(params)
        machine.synchronize()
        start = time.perf_counter()
        scaler.step(optimizer)
        scaler.update()
        machine.synchronize()
        return 1e3 * (time.perf_counter() - start)

    start = time.perf_counter()
    import triton

    import_ms = 1e3 * (time.perf_counter() - start)
    listener = triton.knobs.compilation.listener = _Compilations()
    result = {
        "import_ms": import_ms,
        "first_ms": import_ms + step(),
        "second_ms": step(),
        "compiled": listener.compiled,
        "cached": listener.cached,
        "numel": sum(param.numel() for param in params),
        "tensors": len(params),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
