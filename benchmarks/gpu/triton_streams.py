"""The stream that no single torch operation is; imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _step_kernel(grad_ptr, param_ptr, exp_avg_ptr, exp_avg_sq_ptr, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    grad = tl.load(grad_ptr + at, inside)
    param = tl.load(param_ptr + at, inside)
    exp_avg = tl.load(exp_avg_ptr + at, inside)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, inside)
    tl.store(param_ptr + at, 0.5 * param + grad, inside)
    tl.store(exp_avg_ptr + at, 0.5 * exp_avg + grad, inside)
    tl.store(exp_avg_sq_ptr + at, 0.5 * exp_avg_sq + grad, inside)


def step(grad: Tensor, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    arrays, numel = (grad, param, exp_avg, exp_avg_sq), grad.numel()
    _step_kernel[(triton.cdiv(numel, BLOCK),)](*arrays, numel, BLOCK=BLOCK, num_warps=8)
