"""`python -m benchmarks.gpu.first_step [--dry-run]`: the first step of a process with Triton.

That is where the kernels are compiled, or read from Triton's cache. `add_first_steps` starts
such processes with an empty cache, and then with the one that the last of them has filled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

import fusedopt
from benchmarks.cases import tiny
from benchmarks.goals import FIRST_STEP, FIRST_STEP_MS
from benchmarks.gpu.machine import DryRun, Machine
from benchmarks.param_sets import GRAD_SCALE, Gradients, equal, make_params
from benchmarks.pipelines import ADAMW, MAX_GRAD_NORM
from benchmarks.rows import ROOT, Report

SAMPLES = {"empty": 1, "filled": 3}  # processes, by what is in the cache; in a dry run one
LIMIT_S = 120.0


def add_first_steps(machine: Machine, report: Report) -> None:
    """Raises RuntimeError if a process fails."""
    with tempfile.TemporaryDirectory() as cache:
        for state, samples in SAMPLES.items():
            times = 1 if machine.dry else samples
            found = [_in_a_process(cache, machine.dry) for _ in range(times)]
            last = found[-1]
            note = f"predicted {FIRST_STEP_MS[state]:g} ms; {last['compiled']} kernels compiled, "
            note += f"{last['cached']} from the cache; {last['import_ms']:.0f} ms of it import "
            note += f"Triton; second step {last['second_ms']:.3g} ms"
            report.add("wall", "ms", [one["first_ms"] for one in found], case=FIRST_STEP,
                       pipeline=f"fusedopt_adamw_triton:{state}", params=last["numel"],
                       tensors=last["tensors"], dtype="float32", grads="new", ceiling_gb_s="",
                       note=note)  # fmt: skip


def _in_a_process(cache: str, dry: bool) -> dict[str, Any]:
    # the installed package, before the checkout is on the path
    program = (
        "import fusedopt, sys; sys.path.append(sys.argv.pop(1)); "
        "from benchmarks.gpu import first_step; first_step.main()"
    )
    command = [sys.executable, "-c", program, str(ROOT), *(["--dry-run"] if dry else [])]
    env = {**os.environ, "TRITON_CACHE_DIR": cache}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=env)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the first step took more than {LIMIT_S:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"the first step failed: {lines[-1][:200]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    machine = DryRun() if sys.argv[1:] == ["--dry-run"] else Machine()
    shapes = tiny() if machine.dry else equal(300, 1000)
    params = make_params(shapes, torch.float32, machine.device)
    backend = machine.backends["triton"]
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=MAX_GRAD_NORM, backend=backend, **ADAMW)
    scaler = fusedopt.GradScaler(machine.device.type, init_scale=GRAD_SCALE)
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
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    times = {"import_ms": import_ms, "first_ms": import_ms + step(), "second_ms": step()}
    counts = {"compiled": hits.count(False), "cached": hits.count(True), "tensors": len(params)}
    print(json.dumps(times | counts | {"numel": sum(param.numel() for param in params)}))


if __name__ == "__main__":
    main()
