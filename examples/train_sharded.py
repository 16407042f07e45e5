"""Train the character transformer on several ranks, sharded by FSDP2, and compare with one process.

torchrun --standalone --nproc-per-node 2 examples/train_sharded.py

Each rank trains on its share of every batch, in several backward passes. In the middle the ranks
begin to save a checkpoint, and train on meanwhile. At the end fresh objects load it, and have to
arrive at the same bits. With --resume any number of ranks goes on from the checkpoint of an
earlier run. With --ddp every rank has the whole model.

For comparison two processes train alone on the whole batches, the second in smaller parts. How far
rounding takes these two apart is the measure of how near to the first the ranks have to be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from characters import FusedTraining, Text, add_model_arguments
from common import argument_parser, differences, parse, prepare, report_resume
from curves import Curve, report_agreement
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import trange

COMMAND = "torchrun --standalone --nproc-per-node 2 examples/train_sharded.py"
# Options that a run has to share with the one whose checkpoint it loads.
SAME = ("steps", "optimizer", "dtype", "batch", "accumulate", "layers", "width", "seed")


class Accumulating(FusedTraining):
    """Training on batches in several passes; each of ``ranks`` takes its share of each."""

    def __init__(self, args: argparse.Namespace, text: Text, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks, self.passes = rank, ranks, args.accumulate
        self.norms: list[float] = []
        super().__init__(args, text)

    def passes_on(self, last: bool) -> AbstractContextManager[Any]:
        """The ranks add up their gradients in the last pass only."""
        return nullcontext()

    def backward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros((), device=self.device)
        parts = zip(*(each.tensor_split(self.passes) for each in (inputs, targets)), strict=True)
        for number, part in enumerate(parts, start=1):
            here, there = (each.tensor_split(self.ranks)[self.rank] for each in part)
            with self.passes_on(last=number == self.passes):
                logits = self.model(here).flatten(0, 1)
                total = F.cross_entropy(logits, there.flatten(), reduction="sum")
                loss = total / targets.numel()
                # Ranks average their gradients; this is to be their sum.
                self.scaler.scale(loss * self.ranks).backward()
            whole += loss.detach()
        return whole

    def step(self) -> None:
        super().step()
        self.norms.append(self.grad_norm.item())


class Sharded(Accumulating):
    """FSDP2: each rank keeps its part of the parameters, gradients, masters and states."""

    title = "FSDP2"

    def __init__(self, args: argparse.Namespace, text: Text) -> None:
        self.device_type = args.device.type
        super().__init__(args, text, dist.get_rank(), dist.get_world_size())

    def placed(self, model: nn.Module) -> nn.Module:
        mesh = init_device_mesh(self.device_type, (self.ranks,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # of the sum of half gradients
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    def passes_on(self, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.scaler.load_state_dict(state["scaler"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.steps = state["steps"]


class Replicated(Sharded):
    """DDP: each rank has all parameters, and the average of the gradients."""

    title = "DDP"

    def placed(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def passes_on(self, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, DistributedDataParallel)
        return nullcontext() if last else self.model.no_sync()


# ---- in comparison with one process --------------------------------------------------------------


def curve_of_ranks(run: Sharded, group: Any) -> Curve:
    """The losses of the whole batches, from those of each rank's share."""
    losses = torch.tensor(run.losses, dtype=torch.float64)
    dist.all_reduce(losses, group=group)
    ranks = "1 rank" if run.ranks == 1 else f"{run.ranks} ranks"
    curve = Curve.of(f"{ranks}, {run.title}", run)
    curve.losses = losses.tolist()
    return curve


def curves_of_one_process(args: argparse.Namespace, text: Text, group: Any) -> list[Curve]:
    """Of two runs, in the first two ranks, which exchange nothing but the outcome."""
    own, ranks = dist.get_rank(), dist.get_world_size()
    ways = (("one process", 1), ("one process, smaller parts", max(2, ranks)))
    made: list[Curve | None] = [None, None]
    for number, (name, parts) in enumerate(ways):
        if own == number % ranks:
            options = argparse.Namespace(**vars(args))
            options.accumulate *= parts
            run = Accumulating(options, text)
            for _ in trange(args.steps, desc=name, unit="step", disable=own != 0):
                run.step()
            made[number] = Curve.of(name, run)
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, made, group=group)
    return [gathered[number % ranks][number] for number in range(len(ways))]


# ---- checkpoints ---------------------------------------------------------------------------------


def save(run: Sharded, args: argparse.Namespace, path: Path, group: Any) -> Any:
    """Begin to save. The state is copied before this returns; files are written by a thread.

    That thread's messages need a group of their own. On the group of the step, or of FSDP's
    gradients, those of one rank would meet other messages of another.
    """
    state = {"run": run.state_dict(), "options": same(args), "ranks": run.ranks}
    return dcp.async_save(state, checkpoint_id=path, process_group=group)


def same(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAME}


def load(run: Sharded, args: argparse.Namespace, path: Path) -> int:
    """Go on from a checkpoint, whatever number of ranks saved it; return that number."""
    about = {"options": same(args), "ranks": 0}
    dcp.load(about, checkpoint_id=path)
    differ = {name: value for name, value in about["options"].items() if value != same(args)[name]}
    if differ:
        options = " ".join(f"--{name} {value}" for name, value in differ.items())
        sys.exit(f"{path} was saved with other options; resume with `{options}`")
    run.optimizer.init_state()  # all ranks, so that there is something to load into
    state = {"run": run.state_dict()}
    dcp.load(state, checkpoint_id=path)
    run.load_state_dict(state["run"])
    return about["ranks"]


# ---- the program ---------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__.splitlines()[0], steps=40)
    add_model_arguments(parser, batch=12, layers=6, width=384)
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes for a step")
    parser.add_argument("--ddp", action="store_true", help="DDP instead of FSDP2")
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in --out")
    args = parse(parser, argv)
    args.checkpoint = args.out / "train_sharded"
    if args.batch % args.accumulate:
        parser.error(f"--batch {args.batch} is no multiple of --accumulate {args.accumulate}")
    if args.resume and not (args.checkpoint / ".metadata").is_file():
        parser.error(f"--resume: no checkpoint in {args.checkpoint}; run once without --resume")
    return args


@contextmanager
def all_ranks(args: argparse.Namespace) -> Iterator[Any]:
    """torchrun's processes, or this one alone. Yields a group for checkpoints and reports."""
    backend = "gloo"
    if args.device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        print(f"one process; on two ranks: {COMMAND}")
    try:
        yield dist.new_group(backend="gloo")
    finally:
        dist.destroy_process_group()


def train(run: Sharded, args: argparse.Namespace, group: Any) -> int:
    """Run to the last step; return the step after which the checkpoint was saved, or 0."""
    middle, pending = args.steps - max(1, args.steps // 4), None
    bar = trange(run.steps, args.steps, desc=run.title, unit="step", disable=run.rank != 0)
    for _ in bar:
        run.step()
        if run.steps == middle and not args.resume:
            pending = save(run, args, args.checkpoint, group)
    if pending is None:
        return 0
    pending.result()
    return middle


def resume(run: Sharded, args: argparse.Namespace, text: Text, saved: int, group: Any) -> int:
    """Do fresh objects that load the checkpoint arrive at the same bits? Returns 0 if so."""
    resumed = fresh(args, text)
    load(resumed, args, args.checkpoint)
    while resumed.steps < args.steps:
        resumed.step()
    found: list[Any] = [None] * run.ranks
    own = list(differences(run.state_dict(), resumed.state_dict()))
    dist.all_gather_object(found, own, group=group)
    every = [place for places in found for place in places]
    if run.rank == 0:
        report_resume(every, args.checkpoint, saved, args.steps)
    return 1 if every else 0


def fresh(args: argparse.Namespace, text: Text) -> Sharded:
    """With other weights at the start: what a checkpoint does not restore will show."""
    options = argparse.Namespace(**vars(args))
    options.seed += 1
    return (Replicated if args.ddp else Sharded)(options, text)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    prepare(args)
    with all_ranks(args) as group:
        text = Text(args)
        if args.resume:
            run = fresh(args, text)
            before = load(run, args, args.checkpoint)
        else:
            run = (Replicated if args.ddp else Sharded)(args, text)
            if run.rank == 0:
                shutil.rmtree(args.checkpoint, ignore_errors=True)  # an earlier run's
        start = run.steps
        saved = train(run, args, group)
        curves = [*curves_of_one_process(args, text, group), curve_of_ranks(run, group)]
        status = 0
        if run.rank == 0:
            status = report_agreement(curves)
            if args.resume:
                print(f"resumed after step {start}, which {before} ranks had saved")
        if not args.resume:
            status |= resume(run, args, text, saved, group)
        return status


if __name__ == "__main__":
    sys.exit(main())
