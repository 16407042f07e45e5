"""What happens before the steps of a run of same_bits.py, by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from same_bits_training import Run

INF = math.inf
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def steady(run: Run, step: int) -> None:
    pass


def nonfinite(run: Run, step: int) -> None:
    if step % 5 == 2:
        for grad, value in zip(run.params[3:6], (math.nan, INF, -INF), strict=True):
            assert grad.grad is not None
            grad.grad[-1] = value


def unscaled(run: Run, step: int) -> None:
    """The user unscales."""
    if run.scaler is not None:
        run.scaler.unscale_(run.opt)


def extreme(run: Run, step: int) -> None:
    """Huge and denormal gradients, by turns and in one tensor."""
    for index, param in enumerate(run.params):
        scale = (1e30, 1e-41, 1.0, 1e-25)[(step + index) % 4]
        grad = param.grad.double() * scale
        grad[::3] *= 1e-30
        param.grad = rounded(grad, param.grad.dtype)


def schedule(run: Run, step: int) -> None:
    for group in run.opt.param_groups:
        group["lr"] *= 0.9
        group["weight_decay"] = 0.1 * (step % 3)


def lr_tensor(run: Run, step: int) -> None:
    for group in run.opt.param_groups:
        if step == 0:
            group["lr"] = torch.tensor(0.05)
        group["lr"].mul_(0.9)


def absent_grads(run: Run, step: int) -> None:
    for index, param in enumerate(run.params):
        if (step + index) % 3 == 0 or step == 3:
            param.grad = None


def dtypes_of_grads(run: Run, step: int) -> None:
    for index, param in enumerate(run.params):
        param.grad = param.grad.to(FLOATS[(step + index) % 3])


def switches(run: Run, step: int) -> None:
    """Terms of the rule come and go, with their states."""
    for group in run.opt.param_groups:
        group.update(maximize=step % 2 == 0, decoupled_weight_decay=step % 3 == 0)
        if "amsgrad" in group:
            group.update(amsgrad=step % 4 >= 2, betas=(0.9 * (step % 2), 0.99))
        else:
            group.update(momentum=0.9 * (step % 4 != 3), nesterov=False)


def amsgrad_later(run: Run, step: int) -> None:
    for group in run.opt.param_groups:
        if "amsgrad" in group:
            group["amsgrad"] = step >= 2


def writes(run: Run, step: int) -> None:
    """To params, also where nobody counts versions: masters follow."""
    for param in run.params[step % 3 :: 3]:
        param.data[::7] = 0.125
        param.data.clamp_(-1.0, 1.0)
    with torch.no_grad():
        run.params[2 + step % 2].mul_(1.5)


def added_group(run: Run, step: int) -> None:
    if step == 2:
        run.opt.add_param_group({"params": run.make_params(77), "lr": 0.3})
        run.give_grads(step)


def early_state(run: Run, step: int) -> None:
    if step == 0:
        run.opt.init_state()


def reloads(run: Run, step: int) -> None:
    if step % 2 == 1:
        run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))


SCENES: dict[str, Callable[[Run, int], None]] = {
    function.__name__: function
    for function in (
        steady, nonfinite, unscaled, extreme, schedule, lr_tensor, absent_grads, dtypes_of_grads,
        switches, amsgrad_later, writes, added_group, early_state, reloads,
    )
}  # fmt: skip
