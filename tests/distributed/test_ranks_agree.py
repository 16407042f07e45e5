"""A step is done by all ranks or by none: ranks that differ, and ranks that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from sharded import INF, Twins, Whole, alike_everywhere, contents, part, remedies
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from fusedopt import FusedAdamW, FusedSGD

ROWS = [Shard(0)]
WHOLES = [Whole((5, 3), ROWS), Whole((4,), [Replicate()]), Whole((1,), ROWS)]
ANOTHER = "another rank refused this step"
OPTIONS = "the ranks' options differ"


def raises_everywhere(twins: Twins, words: str, error: type[BaseException] = RuntimeError) -> Any:
    """No bit has moved on any rank, and no version counter."""
    before = contents(twins.optimizer)
    with pytest.raises(error, match=words) as caught:
        twins.optimizer.step()
    assert contents(twins.optimizer) == before
    return caught.value


def goes_on(twins: Twins, step: int) -> None:
    """The next step is right, as if nothing had happened."""
    twins.step(step)
    twins.check()
    assert twins.optimizer.skipped_steps == 0


# ---- options that differ -------------------------------------------------------------------------


def set_lr(optimizer: Any, value: Any) -> None:
    optimizer.param_groups[0]["lr"] = value


DIFFERENT: list[tuple[Callable[[Any, Any], None], Any, Any]] = [
    (set_lr, 0.1, 0.2),
    (lambda o, value: o.param_groups[0].update(weight_decay=value), 0.01, 0.02),
    (lambda o, value: o.param_groups[0].update(replicated=value), None, True),
    (lambda o, value: setattr(o, "max_grad_norm", value), INF, 1.0),
    (lambda o, value: setattr(o, "max_grad_value", value), None, 1.0),
    (lambda o, value: setattr(o, "norm_type", value), 2.0, INF),
    (lambda o, value: setattr(o, "skip_nonfinite", value), False, True),
]


def options_that_differ(rank: int) -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for backends in (["auto"], ["reference"], ["auto", "reference"]):
        backend = backends[rank % len(backends)]
        twins = Twins(mesh, WHOLES, backend=backend)
        twins.step(0)
        for step, (change, usual, other) in enumerate(DIFFERENT, 1):
            for odd_one in (0, world - 1):
                twins.give(step)
                change(twins.optimizer, other if rank == odd_one else usual)
                error = raises_everywhere(twins, OPTIONS)
                names = {"torch": torch, "optimizer": twins.optimizer}
                for line in remedies(error):
                    exec(line, names)
                assert len(set(names["found"])) >= 2, names["found"]
                change(twins.optimizer, usual)
            twins.step(step)
            if len(backends) == 1:  # two backends agree about norms, and not about all bits
                twins.check()
            alike_everywhere(twins.optimizer.grad_norm)
        assert twins.optimizer.skipped_steps == 0
    twins = Twins(mesh, WHOLES, FusedAdamW if rank == 0 else FusedSGD)
    twins.optimizer.init_state()
    twins.give(0)
    raises_everywhere(twins, OPTIONS)


@pytest.mark.parametrize("world", [2, 4])
def test_options_that_differ_are_refused_everywhere(world: int) -> None:
    ranks.run(world, options_that_differ)


# ---- a rank that fails ---------------------------------------------------------------------------


@contextmanager
def bad_gradient(twins: Twins) -> Iterator[None]:
    p = twins.params[0]
    grad, p.grad = p.grad, None
    p.grad_dtype = None
    p.grad = grad.double()
    yield


@contextmanager
def edited_state(twins: Twins) -> Iterator[None]:
    own = twins.optimizer.state[twins.params[0]]
    kept = own["exp_avg"]
    own["exp_avg"] = [0.0]
    yield
    own["exp_avg"] = kept


@contextmanager
def bad_option(twins: Twins) -> Iterator[None]:
    twins.optimizer.param_groups[0]["eps"] = "small"
    yield
    twins.optimizer.param_groups[0]["eps"] = 1e-8


@contextmanager
def no_groups(twins: Twins) -> Iterator[None]:
    groups = twins.optimizer.param_groups
    twins.optimizer.param_groups = None
    yield
    twins.optimizer.param_groups = groups


@contextmanager
def no_memory(twins: Twins) -> Iterator[None]:
    """A state is to be made anew, and cannot be."""
    from fusedopt.plan import state

    own = twins.optimizer.state.pop(twins.params[0])
    real = state.unfilled_state

    def fails(like: Any) -> Any:
        raise RuntimeError("not enough memory")

    state.unfilled_state = fails  # type: ignore[assignment]
    yield
    state.unfilled_state = real
    twins.optimizer.state[twins.params[0]] = own


@contextmanager
def interrupted(twins: Twins) -> Iterator[None]:
    """By Ctrl-C, while the words of the norm are computed."""
    reduce = type(twins.optimizer._shared.plan).reduce

    def stop(plan: Any) -> None:
        raise KeyboardInterrupt

    type(twins.optimizer._shared.plan).reduce = stop
    yield
    type(twins.optimizer._shared.plan).reduce = reduce


FAILURES = [
    (bad_gradient, RuntimeError, "does not go with parameter dtype"),
    (edited_state, RuntimeError, "not a plain tensor of floating-point numbers"),
    (bad_option, RuntimeError, "Invalid eps value"),
    (interrupted, KeyboardInterrupt, None),
]


def fails_on(rank: int, failing: int, twins: Twins, failure: Any) -> None:
    how, error, words = failure
    if rank == failing:
        with how(twins):
            before = None
            with pytest.raises(error, match=words):
                before = contents_or_none(twins)
                twins.optimizer.step()
            assert contents_or_none(twins) == before
    else:
        raises_everywhere(twins, ANOTHER)


def contents_or_none(twins: Twins) -> Any:
    try:
        return contents(twins.optimizer)
    except (TypeError, AttributeError):  # what was edited has no bits
        return None


def ranks_that_fail(rank: int) -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for backend, norm_type in (("auto", 2.0), ("auto", INF), ("reference", 2.0)):
        twins = Twins(mesh, WHOLES, norm_type=norm_type, backend=backend)
        twins.step(0)
        for step, failure in enumerate(FAILURES, 1):
            twins.give(step)
            fails_on(rank, step % world, twins, failure)
            goes_on(twins, step)
        if rank == 0:  # nobody else has the error; the parameter's state is back afterwards
            with no_groups(twins), pytest.raises(RuntimeError, match="not a list"):
                twins.optimizer.step()
        else:
            raises_everywhere(twins, ANOTHER)
        goes_on(twins, 8)
        twins.give(9)
        if rank == 0:
            with no_memory(twins), pytest.raises(RuntimeError, match="not enough memory"):
                twins.optimizer.step()
        else:
            raises_everywhere(twins, ANOTHER)
        goes_on(twins, 9)


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_that_fails_makes_all_raise(world: int) -> None:
    ranks.run(world, ranks_that_fail)


def fails_at_first(rank: int, twins: Twins) -> None:
    """Rank 0 fails. What state there is afterwards is that of a parameter without any steps."""
    optimizer = twins.optimizer
    before = [(part(p).clone(), p._version) for p in twins.params]
    if rank == 0:
        twins.params[0].grad = twins.params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match=ANOTHER if rank else "sparse"):
        optimizer.step()
    after = [(part(p), p._version) for p in twins.params]
    for (old, version), (new, counted) in zip(before, after, strict=True):
        assert torch.equal(old, new) and version == counted
    assert not any(part(t).any() for own in optimizer.state.values() for t in own.values())


def fails_before_there_is_a_plan(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    plain_and_sharded = [Whole((5,)), *WHOLES[:1]]

    def made(params: list[Any]) -> list[Any]:
        return [{"params": params[:1], "replicated": True}, {"params": params[1:]}]

    for backend in ("auto", "reference"):
        twins = Twins(mesh, plain_and_sharded, groups=made, backend=backend)
        twins.give(0)
        fails_at_first(rank, twins)
        goes_on(twins, 0)
        # The ranks of a group that is new in this step wait for a message, too.
        twins = Twins(
            mesh, plain_and_sharded, groups=lambda params: made(params)[:1], backend=backend
        )
        twins.give(0)
        twins.optimizer.step()
        for params in (twins.params, twins.whole):
            params[0].grad = None
        twins.optimizer.add_param_group({"params": twins.params[1:]})
        del twins.optimizer.state[twins.params[0]]
        twins.give(1)
        fails_at_first(rank, twins)
    # A norm over plain tensors that other processes share.
    twins = Twins(mesh, [Whole((5,))], norm_group=dist.group.WORLD, max_grad_norm=0.5)
    twins.give(0)
    fails_at_first(rank, twins)


def test_a_rank_that_fails_before_the_first_step() -> None:
    ranks.run(2, fails_before_there_is_a_plan)


def fails_in_a_plan_of_before(rank: int) -> None:
    """One group at a time, as with DeepSpeed's ZeRO: its plan has joined the message before."""
    mesh = init_device_mesh("cpu", (2,))
    wholes = [Whole((5, 3), ROWS), Whole((4,), ROWS)]
    twins = Twins(mesh, wholes, groups=lambda params: [{"params": [p]} for p in params])
    twins.give(0)
    optimizer = twins.optimizer
    groups = optimizer.param_groups
    optimizer.init_state()
    optimizer.param_groups = groups[:1]
    optimizer.step()
    plan = optimizer._shared.plan
    optimizer.param_groups = groups[1:]
    optimizer.init_state()
    assert optimizer._shared.plan is not plan
    optimizer.param_groups = groups[:1]
    fails_on(rank, 0, twins, (interrupted, KeyboardInterrupt, None))
    assert optimizer._shared.plan is plan
    optimizer.step()
    alike_everywhere(optimizer.grad_norm)


def test_a_rank_that_fails_in_a_plan_that_was_set_aside() -> None:
    ranks.run(2, fails_in_a_plan_of_before)


# ---- nobody asked --------------------------------------------------------------------------------


def fails_alone(rank: int) -> None:
    """Without a norm or a check there is no message: the others go on."""
    mesh = init_device_mesh("cpu", (2,))
    twins = Twins(mesh, WHOLES[:1], max_grad_norm=None)
    twins.step(0)
    twins.give(1)
    if rank == 0:
        with bad_gradient(twins), pytest.raises(RuntimeError, match="does not go with"):
            twins.optimizer.step()
        twins.give(1)
    twins.optimizer.step()
    twins.single.step()
    twins.check()


def test_a_rank_may_fail_alone_where_nobody_shares_a_norm() -> None:
    ranks.run(2, fails_alone)
