"""DDP, where all ranks have all gradients, and ZeRO, which deals out whole parameters."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import ranks
import torch
import torch.distributed as dist
from engines import (
    CLIP,
    MEASURE,
    STEPS,
    Beside,
    all_reduces,
    backward,
    make_model,
    norm_of,
    same_everywhere,
)
from tolerances import assert_norm, assert_same_bits
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import fusedopt
from fusedopt import FusedAdamW


def of_this_rank(model: nn.Module, step: int) -> None:
    """Each rank has a batch of its own."""
    backward(model, 10 * dist.get_rank() + step)


def accumulated(model: Any, step: int) -> None:
    with model.no_sync():
        of_this_rank(model, 100 + step)
    of_this_rank(model, step)


def plain(rank: int) -> None:
    """The step of one process with rank 0's gradients; nothing is sent."""
    engines: tuple[dict[str, Any], ...]
    engines = {}, {"gradient_as_bucket_view": True}, {"static_graph": True}
    for arguments in engines:
        wrap = functools.partial(DDP, **arguments)
        alike(Beside(wrap, MEASURE, run=of_this_rank, alone=None))
        if "static_graph" not in arguments:  # torch: not with no_sync
            alike(Beside(wrap, MEASURE, run=accumulated, alone=None))

    def compressed(model: nn.Module) -> DDP:
        engine = DDP(model)
        engine.register_comm_hook(None, fp16_compress_hook)
        return engine

    alike(Beside(compressed, MEASURE, run=of_this_rank, alone=None))
    alike(Beside(DDP, CLIP, run=of_this_rank, alone=None))


def alike(both: Beside, messages: int = 0) -> None:
    same_everywhere(both.train(messages))
    same_everywhere([param.detach().tolist() for param in both.model.parameters()])


class Replicated(Beside):
    group: ClassVar[dict[str, Any]] = {"replicated": True}


def with_a_group(rank: int) -> None:
    everybody = {"norm_group": dist.group.WORLD}
    alike(Replicated(DDP, CLIP, run=of_this_rank, alone=None, own=lambda _: everybody), 1)
    # the ranks' parameters are taken for different ones
    model = DDP(make_model())
    opt = FusedAdamW(model.parameters(), **MEASURE, **everybody)
    backward(model, 0)
    opt.step()
    assert_norm(opt.grad_norm, math.sqrt(2) * norm_of(model.parameters()))


# ---- ZeRO ----------------------------------------------------------------------------------------

OPTIONS = {
    "max_grad_norm": 0.05,
    "norm_type": 2.0,
    "max_grad_value": 0.01,
    "master_weights": False,
    "skip_nonfinite": True,
    "amp_scaling": False,
    "backend": "cpu",
}
TORCHS = {"lr": 0.01, "weight_decay": 0.1}


def zeros(params: Any, hidden: int, **more: Any) -> Any:
    """With the options as its defaults, or hidden in the class."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {**OPTIONS, "norm_group": dist.group.WORLD}
    if hidden:
        cls: Any = functools.partial(FusedAdamW, **options)
        return ZeroRedundancyOptimizer(params, cls, **more, **TORCHS)
    return ZeroRedundancyOptimizer(params, FusedAdamW, **more, **TORCHS, **options)


class One(nn.Module):
    """More ranks than parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: torch.Tensor) -> Any:
        return (x * self.weight).sum(1)


def deals_out(rank: int) -> None:
    """The bits of one process: each tensor's sum of squares is a whole one."""
    for whole in (make_model(), One()):
        for bucket_view in (False, True):
            for number in range(2):
                model, single = DDP(copy.deepcopy(whole)), copy.deepcopy(whole)
                opt = zeros(model.parameters(), number, parameters_as_bucket_view=bucket_view)
                one = FusedAdamW(single.parameters(), **TORCHS, **OPTIONS)
                for step in range(STEPS):
                    zero_step(opt, model, one, single, step, step == 1)
                assert int(opt.optim.skipped_steps) == 1
                saved_and_loaded(opt, model, one, single)


def zero_step(opt: Any, model: Any, one: Any, single: Any, step: int, bad: bool) -> None:
    backward(model, step)
    backward(single, step)
    if bad:  # in the gradients of one parameter, which one rank updates
        for each in (model, single):
            next(each.parameters()).grad.view(-1)[0] = math.nan
    with all_reduces(1):
        opt.step()
    one.step()
    same_everywhere(str(float(opt.optim.grad_norm)))
    assert_same_bits(opt.optim.grad_norm, one.grad_norm, "grad_norm")
    for param, twin in zip(model.parameters(), single.parameters(), strict=True):
        assert_same_bits(param, twin, "param")
    opt.zero_grad()
    one.zero_grad()


def saved_and_loaded(opt: Any, model: Any, one: Any, single: Any) -> None:
    """By ZeRO, through a file, into another ZeRO and into an optimizer of one process."""
    opt.consolidate_state_dict(to=0)
    file = io.BytesIO()
    if dist.get_rank() == 0:
        torch.save(opt.state_dict(), file)
    content = [file.getvalue()]
    dist.broadcast_object_list(content)

    def saved() -> Any:
        return torch.load(io.BytesIO(content[0]), weights_only=True)

    assert saved()["state"].keys() == one.state_dict()["state"].keys()
    for hidden in range(2):
        another = zeros(model.parameters(), hidden)
        another.load_state_dict(saved())
        alone = FusedAdamW(single.parameters(), **TORCHS, **OPTIONS)
        alone.load_state_dict(saved())
        zero_step(another, model, alone, single, 5, False)


def refused(rank: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for options in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        model = DDP(make_model())
        cls: Any = functools.partial(FusedAdamW, **options)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), cls, lr=0.1)
        backward(model, 0)
        with pytest.raises(RuntimeError, match="share of a ZeroRedundancyOptimizer") as caught:
            optimizer.step()
        for remedy in re.findall("`([^`]+)`", str(caught.value)):
            exec(remedy, {"optimizer": optimizer})
        optimizer.step()
        assert_norm(optimizer.optim.grad_norm, norm_of(model.parameters()))


def copies_are_refused(rank: int) -> None:
    """A copy or a pickle has the parameters of one rank's share, as what it was made of."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    cls: Any = functools.partial(FusedAdamW, max_grad_norm=1.0)
    optim = ZeroRedundancyOptimizer(make_model().parameters(), cls, lr=0.1).optim
    for other in (copy.deepcopy(optim), pickle.loads(pickle.dumps(optim))):
        for param in (param for group in other.param_groups for param in group["params"]):
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="share of a ZeroRedundancyOptimizer"):
            other.step()
        other.norm_group = dist.group.WORLD
        other.step()
        everything = sum(param.numel() for param in make_model().parameters())
        assert_norm(other.grad_norm, math.sqrt(everything))


def zero_with_scalers(rank: int) -> None:
    """ZeRO is no optimizer of ours, so that both scalers treat it as they treat any other."""
    for make in (torch.amp.GradScaler, fusedopt.GradScaler):
        model = DDP(make_model())
        opt = zeros(model.parameters(), 0)
        scaler = make("cpu", init_scale=4.0, growth_interval=2)
        scales = []
        for step in range(4):
            before = [param.detach().clone() for param in model.parameters()]
            scaler.scale(torch.zeros(()))
            backward(model, step)
            if step == 1:
                next(model.parameters()).grad.view(-1)[0] = math.inf
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            still = [torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)]
            assert all(still) if step == 1 else not any(still)
            scales.append(scaler.get_scale())
        assert scales == [4.0, 2.0, 2.0, 4.0]
        same_everywhere([param.detach().tolist() for param in model.parameters()])


@pytest.mark.parametrize(
    "function",
    [plain, with_a_group, deals_out, refused, copies_are_refused, zero_with_scalers],
)
def test_two_ranks(function: Callable[[int], None]) -> None:
    ranks.run(2, function)


def test_four_ranks() -> None:
    ranks.run(4, deals_out)
