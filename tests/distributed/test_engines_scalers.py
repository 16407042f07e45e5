"""Loss scales and skips that ranks agree on, and steps that fail on one rank only."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from engines import messages, same_everywhere, whole
from tolerances import assert_norm, assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusedopt

SCALE = 4.0
DIFFER = "their scales may differ"


def params_of(scene: str) -> tuple[list[nn.Parameter], dict[str, Any]]:
    """Parameters on four ranks, and options of the optimizer."""
    values = torch.linspace(-1, 1, 64).view(8, 8)
    if scene == "hybrid":
        mesh, placements = init_device_mesh("cpu", (2, 2)), [[Replicate(), Shard(0)]] * 2
    else:
        mesh, placements = init_device_mesh("cpu", (4,)), [[Replicate()], [Shard(0)]]
        placements = [[Shard(0)], [Shard(1)]] if scene == "sharded" else placements
    own = torch.linspace(0, 1, 5 + dist.get_rank())
    if scene == "pipeline":
        return [nn.Parameter(own), nn.Parameter(own[:3].clone())], {"norm_group": dist.group.WORLD}
    params = [nn.Parameter(distribute_tensor(values, mesh, each)) for each in placements]
    if scene == "beside":
        params.append(nn.Parameter(torch.ones(3)))
    return params, {}


AGREE = ("sharded", "hybrid")  # flags of torch's scaler
DISAGREE = ("mixed", "pipeline", "beside")


def local(tensor: Any) -> Tensor:
    part: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return part


class Training:
    def __init__(self, scene: str, make: Callable[..., Any], **options: Any) -> None:
        self.params, own = params_of(scene)
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "replicated": True}]
        self.opt = fusedopt.FusedAdamW(groups[: 2 if scene == "beside" else 1], **own, **options)
        self.scaler = make("cpu", init_scale=SCALE, growth_interval=2)
        self.bad: tuple[int, ...] = (3,)

    def with_equal_replicas(self) -> Training:
        """An engine gives both ranks of a part the same gradients."""
        self.bad = (1, 3)
        return self

    def give_grads(self, bad: bool = False) -> None:
        """Scaled; ``bad``: with an inf, which only the ranks `self.bad` have."""
        self.scaler.scale(torch.zeros(()))
        for param in self.params:
            param.grad = param.detach().clone() + 2
            local(param.grad).mul_(self.scaler.get_scale())
        if bad and dist.get_rank() in self.bad:
            local(self.params[1].grad).view(-1)[0] = float("inf")

    def values(self) -> list[Tensor]:
        states = [value for own in self.opt.state.values() for value in own.values()]
        return [local(each.detach()).clone() for each in (*self.params, *states)]

    def is_as(self, before: list[Tensor]) -> None:
        """State that the step has made meanwhile does not count."""
        for value, former in zip(self.values(), before, strict=False):
            assert_same_bits(value, former, "value")

    def steps(self, step: Callable[[Training], None] | None = None, sent: int | None = None) -> Any:
        """The scales after steps of which the second has an inf."""
        scales = []
        for number in range(4):
            self.give_grads(bad=number == 1)
            before = self.values()
            with messages(sent):
                step(self) if step else self.scaler.step(self.opt)
            self.scaler.update()
            if number > 0:
                pairs = zip(self.values(), before, strict=True)
                assert all(torch.equal(*pair) == (number == 1) for pair in pairs)
            scales.append(self.scaler.get_scale())
        assert {float(own["step"]) for own in self.opt.state.values()} == {3.0}
        return scales


RIGHT = [4.0, 2.0, 2.0, 4.0]


def fused(*args: Any, **kwargs: Any) -> Any:
    return fusedopt.fuse_scaler(torch.amp.GradScaler(*args, **kwargs))


def unscale(training: Training) -> None:
    """As users do who clip by themselves."""
    training.scaler.unscale_(training.opt)
    for param in training.params:
        local(param.grad).clamp_(-100.0, 100.0)  # keeps an inf in nobody's gradients
    training.scaler.step(training.opt)


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def ours(rank: int) -> None:
    for scene in (*AGREE, *DISAGREE):
        for options in ({}, {"max_grad_norm": 1.0}, {"amp_scaling": False}):
            for make in (fusedopt.GradScaler, fused):
                with silent():
                    assert Training(scene, make, **options).steps(sent=1) == RIGHT, scene
        with silent():
            assert Training(scene, fusedopt.GradScaler).steps(unscale) == RIGHT, scene


def torchs(rank: int) -> None:
    """The skip is right everywhere. The scale is right, or a warning says once that it is not."""
    for options in ({}, {"max_grad_norm": 1.0}, {"amp_scaling": False}):
        for scene in AGREE:
            for step in (None, unscale):
                with silent():
                    training = Training(scene, torch.amp.GradScaler, **options)
                    assert training.with_equal_replicas().steps(step) == RIGHT, scene
        for scene in ("mixed", "pipeline"):
            training = Training(scene, torch.amp.GradScaler, **options)
            assert training.opt._step_supports_amp_scaling
            with pytest.warns(UserWarning, match=DIFFER) as caught:
                training.steps()
            assert len(caught) == 1 and "fuse_scaler(scaler)" in str(caught[0].message)
            assert caught[0].filename == __file__
            everywhere: list[Any] = [None] * 4
            dist.all_gather_object(everywhere, training.scaler.get_scale())
            assert len(set(everywhere)) == 2  # else there would be nothing to warn of


def hooks(rank: int) -> None:
    """A pre-hook finds unscaled gradients, whichever scaler is used."""
    for scene in (*AGREE, *DISAGREE):
        for make in (fusedopt.GradScaler, torch.amp.GradScaler):
            if make is torch.amp.GradScaler and scene == "beside":
                continue  # torch's own check fails there
            training = Training(scene, make).with_equal_replicas()
            seen: list[bool] = []

            def look(opt: Any, *_: Any, training: Any = training, seen: Any = seen) -> None:
                local_grad = local(training.params[0].grad)
                seen.append(torch.equal(local_grad, local(training.params[0].detach()) + 2))

            training.opt.register_step_pre_hook(look)
            if make is torch.amp.GradScaler and scene in DISAGREE:
                hook_refused(training)
            else:
                assert training.scaler.__class__ is torch.amp.GradScaler or training.scaler.sweeps(
                    training.opt
                )
                with silent():
                    assert training.steps() == RIGHT, scene
            assert seen and all(seen)


def hook_refused(training: Training) -> None:
    training.give_grads()
    before = training.values()
    for number in range(2):
        with pytest.raises(RuntimeError, match="would see scaled gradients") as caught:
            training.scaler.step(training.opt)
        training.is_as(before)
        remedies = re.findall("`([^`]+)`", str(caught.value))
        assert len(remedies) == 2
        names = {"scaler": training.scaler, "optimizer": training.opt, "fusedopt": fusedopt}
        exec(remedies[number], names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            training.scaler.step(training.opt)
        training.scaler.update()
        training.give_grads()
        before = training.values()


# ---- a step that fails on one rank ---------------------------------------------------------------


def fails(training: Training, rank: int, error: type[Exception], match: str) -> None:
    """Rank 1 raises its own error, the others say that another rank refused; nothing moves."""
    before = training.values()
    expected = (error, match) if rank == 1 else (RuntimeError, "another rank refused")
    with pytest.raises(expected[0], match=expected[1]):
        training.scaler.step(training.opt)
    assert not hasattr(training.opt, "grad_scale")
    training.is_as(before)


def refused(rank: int) -> None:
    """As after any failed step: the scaler's step may be called again, or the scale goes on."""
    for make in (fusedopt.GradScaler, torch.amp.GradScaler):
        for scene in ("sharded", "hybrid", "mixed"):
            training = Training(scene, make, max_grad_norm=1.0)
            training.give_grads()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                training.scaler.step(training.opt)
                training.scaler.update()
                training.give_grads()
                good = local(training.params[0].grad).clone()
                if rank == 1:
                    training.opt.param_groups[0]["lr"] = "high"
                fails(training, rank, RuntimeError, "Invalid lr")
                training.opt.param_groups[0]["lr"] = 0.1
                training.scaler.step(training.opt)
                training.scaler.update()
            assert_same_bits(local(training.params[0].grad), good, "grad")
            assert {float(own["step"]) for own in training.opt.state.values()} == {2.0}
            assert training.scaler.get_scale() == 2 * SCALE  # two good steps
            assert int(training.opt.skipped_steps) == 0


def refused_after_unscale(rank: int) -> None:
    """What unscale_ has found is not forgotten, though a clamp has removed it since."""
    for scene in ("mixed", "pipeline", "beside"):
        training = Training(scene, fusedopt.GradScaler)
        training.give_grads(bad=True)
        if rank == 1:
            training.opt.param_groups[0]["lr"] = "high"
        training.scaler.unscale_(training.opt)
        for param in training.params:
            local(param.grad).clamp_(-100.0, 100.0)
        fails(training, rank, RuntimeError, "Invalid lr")
        training.opt.param_groups[0]["lr"] = 0.1
        training.scaler.step(training.opt)
        training.scaler.update()
        assert int(training.opt.skipped_steps) == 1
        assert training.scaler.get_scale() == SCALE / 2


def hook_fails(rank: int) -> None:
    """The ranks whose hooks have not failed do not wait for those whose have."""

    def hook(*_: Any) -> None:
        if rank == 1 and broken:
            raise KeyError("in the hook")

    for for_all in (False, True):
        for scene in ("sharded", "pipeline"):
            training = Training(scene, fusedopt.GradScaler, max_grad_norm=1.0)
            broken = False
            own = training.opt.register_step_pre_hook
            handle = (register_optimizer_step_pre_hook if for_all else own)(hook)
            try:
                for broken in (True, False, True):  # the first before there is a plan
                    training.give_grads()
                    if broken:
                        fails(training, rank, KeyError, "in the hook")
                    else:
                        training.scaler.step(training.opt)
                    training.scaler.update()
            finally:
                handle.remove()
            assert {float(own["step"]) for own in training.opt.state.values()} == {1.0}


def post_hook_fails(rank: int) -> None:
    """After the message there is none to join, and after a closure nobody knows."""
    training = Training("sharded", fusedopt.GradScaler, max_grad_norm=1.0)

    def hook(opt: Any, *_: Any) -> None:
        opt.max_grad_norm = 2.0
        raise KeyError("after the step")

    handle = training.opt.register_step_post_hook(hook)
    for _ in range(2):
        training.give_grads()
        with messages(1), pytest.raises(KeyError, match="after the step"):
            training.opt.step()
    handle.remove()

    def closure() -> None:
        raise KeyError("in the model")

    with messages(0), pytest.raises(KeyError, match="in the model"):
        training.opt.step(closure)
    with messages(1):
        training.opt.step()
    same_everywhere(float(training.opt.grad_norm))
    assert {float(own["step"]) for own in training.opt.state.values()} == {3.0}


def without_a_question(rank: int) -> None:
    """Where nobody asks for a norm, nobody waits, and a failing rank sends nothing."""
    training = Training("sharded", fusedopt.GradScaler)

    def hook(*_: Any) -> None:
        if rank == 1:
            raise KeyError("in the hook")

    training.opt.register_step_pre_hook(hook)
    training.give_grads()
    with messages(0):
        if rank == 1:
            with pytest.raises(KeyError, match="in the hook"):
                training.opt.step()
        else:
            training.opt.step()


def put_right(rank: int) -> None:
    """A refusal by ranks is looked at again in each step, also once there is a plan."""
    training = Training("beside", fusedopt.GradScaler)
    optimizer = training.opt
    del optimizer.param_groups[1]["replicated"]
    training.give_grads()
    with messages(0):
        optimizer.step()
    optimizer.max_grad_norm = 1.0
    for _ in range(2):
        with (
            messages(1),  # a vote against the step
            pytest.raises(RuntimeError, match="plain tensor beside DTensors") as caught,
        ):
            optimizer.step()
    for remedy in re.findall("`([^`]+)`", str(caught.value)):
        exec(remedy, {"optimizer": optimizer})
    with messages(1):
        optimizer.step()
    squares = [whole(param.grad).double().square().sum() for param in training.params]
    assert_norm(optimizer.grad_norm, torch.stack(squares).sum().sqrt())


FUNCTIONS = [ours, torchs, hooks, refused, refused_after_unscale]
FUNCTIONS += [put_right, hook_fails, post_hook_fails, without_a_question]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_four_ranks(function: Callable[[int], None]) -> None:
    ranks.run(4, function)
