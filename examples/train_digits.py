"""Train a small network on 1,797 scanned digits three times from the same seed, and compare.

1. torch.optim with torch's GradScaler: unscale_, clip_grad_norm_, step, update
2. fusedopt with torch's GradScaler:    step, update
3. fusedopt with fusedopt.GradScaler:   step, update, and one sweep over the gradients less

All three compute the same mathematics: mixed precision, loss scaling, gradient accumulation,
clipping by the global norm, no weight decay on biases and norms, a learning rate in stairs.
The third run is then continued from a checkpoint and must end in the same bits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import (
    DTYPES,
    Stopwatch,
    add_baseline_argument,
    argument_parser,
    differences,
    parse,
    plot_runs,
    prepare,
    print_table,
    report_resume,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.profiler import record_function
from tqdm import trange

import fusedopt

BATCH = 64
ACCUMULATE = 2  # batches for one optimizer step
MAX_GRAD_NORM = 1.0


class Digits:
    """The scans, split into a training and a test set, as tensors on the device."""

    def __init__(self, args: argparse.Namespace) -> None:
        images, labels = load_digits(return_X_y=True)
        images = (images / 16.0).reshape(-1, 1, 8, 8).astype("float32")
        self.seed = args.seed
        split = train_test_split(
            images, labels, test_size=0.2, stratify=labels, random_state=self.seed
        )
        self.images, self.test_images, self.labels, self.test_labels = (
            torch.from_numpy(array).to(args.device) for array in split
        )

    def batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of one optimizer step. They depend on the step's number alone, so a run
        that continues from a checkpoint sees what the first one saw."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        picks = torch.randperm(len(self.labels), generator=generator)[: ACCUMULATE * BATCH]
        for pick in picks.to(self.labels.device).split(BATCH):
            yield self.images[pick], self.labels[pick]


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.LayerNorm(128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def torch_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    baseline: dict[str, Any] = {args.baseline: True}
    if args.optimizer == "sgd":
        groups = fusedopt.param_groups(model, weight_decay=5e-4)
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, **baseline)
    groups = fusedopt.param_groups(model, weight_decay=0.05)
    return torch.optim.AdamW(groups, lr=2e-3, **baseline)


def fused_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    if args.optimizer == "sgd":
        return fusedopt.FusedSGD(
            fusedopt.param_groups(model, weight_decay=5e-4),
            lr=0.05,
            momentum=0.9,
            nesterov=True,
            decoupled_weight_decay=False,  # as torch.optim.SGD does it; ours decouples by default
            max_grad_norm=MAX_GRAD_NORM,
            backend=args.backend,
        )
    return fusedopt.FusedAdamW(
        fusedopt.param_groups(model, weight_decay=0.05),
        lr=2e-3,
        max_grad_norm=MAX_GRAD_NORM,
        backend=args.backend,
    )


def torch_update(run: Training) -> torch.Tensor:
    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return grad_norm


def fused_update(run: Training) -> torch.Tensor:
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return run.optimizer.grad_norm


class Training:
    """One run: everything that makes up its state, and what was measured on the way."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        digits: Digits,
        make_optimizer: Callable[..., Any],
        make_scaler: Callable[..., torch.amp.GradScaler],
        update: Callable[[Training], torch.Tensor],
    ) -> None:
        self.name, self.digits, self.update = name, digits, update
        self.device, self.dtype = args.device, DTYPES[args.dtype]
        torch.manual_seed(args.seed)
        self.model = make_model().to(self.device)
        self.optimizer = make_optimizer(self.model, args)
        self.scaler = make_scaler(self.device.type)
        milestones = [args.steps * 60 // 100, args.steps * 85 // 100]
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, gamma=0.2)
        self.steps = 0
        self.losses: list[float] = []
        self.skipped = 0
        self.watch = Stopwatch("optimizer", self.device)
        self.whole_watch = Stopwatch("iteration", self.device)

    def step(self) -> None:
        scale = self.scaler.get_scale()
        with self.whole_watch:
            total = torch.zeros((), device=self.device)
            for images, labels in self.digits.batches(self.steps):
                with (
                    record_function("forward"),
                    torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32),
                ):
                    loss = F.cross_entropy(self.model(images), labels) / ACCUMULATE
                with record_function("backward"):
                    self.scaler.scale(loss).backward()
                total += loss.detach()
            with self.watch:
                self.grad_norm = self.update(self)
            self.optimizer.zero_grad()
            self.scheduler.step()
        self.skipped += self.scaler.get_scale() < scale  # the scale falls at a skipped step
        self.steps += 1
        self.losses.append(total.item())

    def state_dict(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "scaler", "scheduler")
        return {"steps": self.steps} | {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name in ("model", "optimizer", "scaler", "scheduler"):
            getattr(self, name).load_state_dict(state[name])

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Share of the test digits recognised, and the loss on them."""
        self.model.eval()
        logits = self.model(self.digits.test_images)
        self.model.train()
        right = (logits.argmax(1) == self.digits.test_labels).float().mean()
        return right.item(), F.cross_entropy(logits, self.digits.test_labels).item()


def torch_training(args: argparse.Namespace, digits: Digits) -> Training:
    name, scaler = f"torch.optim, {args.baseline}", torch.amp.GradScaler
    return Training(name, args, digits, torch_optimizer, scaler, torch_update)


def fused_training(args: argparse.Namespace, digits: Digits) -> Training:
    name, scaler = "fusedopt, our scaler", fusedopt.GradScaler
    return Training(name, args, digits, fused_optimizer, scaler, fused_update)


def fused_training_stock_scaler(args: argparse.Namespace, digits: Digits) -> Training:
    name, scaler = "fusedopt, torch's scaler", torch.amp.GradScaler
    return Training(name, args, digits, fused_optimizer, scaler, fused_update)


def print_results(runs: Sequence[Training]) -> None:
    rows = []
    for run in runs:
        accuracy, loss = run.evaluate()
        cells = (f"{accuracy:.2%}", f"{loss:.4f}", f"{run.grad_norm.item():.4f}", str(run.skipped))
        step, whole = run.watch.median, run.whole_watch.median
        times = (f"{whole:.1f}", f"{step:.3f}", f"{step / whole:.1%}")
        rows.append((run.name, *cells, *times, f"{runs[0].watch.median / step:.2f}x"))
    print()
    header = "run,accuracy,loss,grad norm,skipped,iteration ms,optimizer ms,share,ratio"
    print_table(header.split(","), rows)
    print("accuracy, loss: test set; grad norm: last step, unscaled, before clipping;")
    print("optimizer ms: unscale + clip + step + update; times are medians; share: optimizer in")
    print("the iteration; ratio: times faster than torch's optimizer")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__.splitlines()[0], steps=150)
    parser.add_argument("--dtype", choices=DTYPES, help="of autocast (default: bf16, on GPU fp16)")
    add_baseline_argument(parser)
    args = parse(parser, argv)
    args.dtype = args.dtype or ("bf16" if args.device.type == "cpu" else "fp16")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    prepare(args)
    digits = Digits(args)
    runs = [
        make(args, digits) for make in (torch_training, fused_training_stock_scaler, fused_training)
    ]
    checkpoint = args.out / "digits.pt"
    bar = trange(args.steps, desc="digits, 3 runs", unit="step")
    for _ in bar:
        for run in runs:  # in turn, so that whatever disturbs the clock disturbs all three
            run.step()
        if runs[-1].steps == args.steps // 2:
            torch.save(runs[-1].state_dict(), checkpoint)
        bar.set_postfix(loss=f"{runs[-1].losses[-1]:.4f}")
    print_results(runs)
    title = f"Digits, {args.optimizer}, {args.dtype} autocast, {args.device}"
    plot_runs(args.out / "digits.png", title, runs)

    args.seed += 1  # other weights at the start: what the checkpoint does not restore will show
    resumed = fused_training(args, digits)
    resumed.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu"))
    while resumed.steps < args.steps:
        resumed.step()
    found = list(differences(runs[-1].state_dict(), resumed.state_dict()))
    return report_resume(found, checkpoint, args.steps // 2, args.steps)


if __name__ == "__main__":
    sys.exit(main())
