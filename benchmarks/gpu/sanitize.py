"""`python -m benchmarks.gpu.sanitize BACKEND [--dry-run]`: steps for compute-sanitizer to watch.

Every rule and dtype, both norms, tails, a chunk and a bit, gradients off alignment and more tensors
than one launch can carry addresses of. The result is compared with the CPU backend's, bit for bit.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import fusedopt
from benchmarks.gpu.machine import DryRun, Machine
from benchmarks.param_sets import GRAD_SCALE, Gradients, Shape, make_params
from benchmarks.pipelines import ADAMW, SGD

STEPS = 2
SHAPES: list[Shape] = [(8192 + 3,), (1,), (17,), (257,), (3, 5, 7), (64, 128), (16384,)]
MANY: list[Shape] = [(1 + i % 7,) for i in range(700)]
INF_NORM = {**ADAMW, "norm_type": float("inf")}
CASES: list[tuple[str, type, dict[str, Any], torch.dtype, str, list[Shape]]] = [
    ("adamw", fusedopt.FusedAdamW, ADAMW, torch.float32, "new", SHAPES),
    ("amsgrad", fusedopt.FusedAdamW, {**ADAMW, "amsgrad": True}, torch.float32, "bucket", SHAPES),
    ("fp16", fusedopt.FusedAdamW, ADAMW, torch.float16, "bucket", SHAPES),
    ("bf16", fusedopt.FusedAdamW, INF_NORM, torch.bfloat16, "new", SHAPES),
    ("sgd", fusedopt.FusedSGD, {**SGD, "nesterov": True}, torch.float32, "bucket", SHAPES),
    ("sgd plain", fusedopt.FusedSGD, {"lr": 0.1}, torch.bfloat16, "new", SHAPES),
    ("many", fusedopt.FusedAdamW, ADAMW, torch.float32, "new", MANY),
]


def steps(optimizer: Any, params: list[Tensor], grads: Gradients) -> list[Tensor]:
    """The params after a few steps; the last one has a NaN gradient and is skipped."""
    device = params[0].device.type
    scaler = fusedopt.GradScaler(device, init_scale=GRAD_SCALE, growth_interval=1)
    scaler.scale(torch.ones((), device=device))
    for step in range(STEPS + 1):
        grads.backward(params)
        if step == STEPS:
            assert params[0].grad is not None
            params[0].grad.view(-1)[-1] = float("nan")
        scaler.step(optimizer)
        scaler.update()
    return [param.detach().cpu() for param in params]


def main() -> int:
    backend = sys.argv[1]
    machine = DryRun() if "--dry-run" in sys.argv[2:] else Machine()
    places = ((machine.device, machine.backends[backend]), (torch.device("cpu"), "cpu"))
    failed = 0
    for name, make, options, dtype, kind, all_shapes in CASES:
        results = []
        shapes = all_shapes[: 5 if machine.dry and backend == "triton" else None]
        values = [value.detach() for value in make_params(shapes, dtype)]
        sources = [torch.randn(value.shape, dtype=torch.float32) for value in values]
        for device, used in places:
            params: list[Tensor] = [torch.nn.Parameter(v.to(device, copy=True)) for v in values]
            grads = Gradients(shapes, dtype, kind, device)
            grads.use([source.mul(1024.0).to(device, dtype) for source in sources])
            optimizer = make(params, max_grad_norm=1.0, backend=used, **options)
            results.append(steps(optimizer, params, grads))
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        good = same and all(bool(value.isfinite().all()) for value in results[0])
        failed += not good
        print(f"{name}: {'same bits as the CPU backend' if good else 'DIFFERENT'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
