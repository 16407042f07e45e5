"""Train a character-level transformer of 10.7M parameters on Python's own reference manual.

Twice from the same seed: with torch.optim and with fusedopt. The model is in the type that
--dtype names. With bf16 and fp16 the weights are kept in fp32 as well ("masters"), and updated
there: fusedopt does so by itself, for torch.optim the class TorchTraining below does it. With
fp16 a GradScaler scales the loss.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from characters import (
    CONTEXT,
    MAX_GRAD_NORM,
    FusedTraining,
    Text,
    Training,
    add_model_arguments,
)
from common import (
    add_baseline_argument,
    argument_parser,
    differences,
    parse,
    plot_runs,
    prepare,
    print_table,
    report_resume,
)
from torch import nn
from tqdm import trange


class TorchTraining(Training):
    """The same in torch's own operations; fused=True is the fastest it has."""

    scaler_class = torch.amp.GradScaler

    def __init__(self, args: argparse.Namespace, text: Text) -> None:
        self.name = f"torch.optim, {args.baseline}"
        super().__init__(args, text)

    def make_optimizer(self, groups: list[dict[str, Any]], args: argparse.Namespace) -> Any:
        baseline: dict[str, Any] = {args.baseline: True}
        self.params = [param for group in groups for param in group["params"]]
        self.masters = self.params
        if args.dtype != "fp32":
            self.masters = [param.detach().float() for param in self.params]
            masters = iter(self.masters)
            for group in groups:
                group["params"] = [next(masters) for _ in group["params"]]
        if args.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9, **baseline)
        return torch.optim.AdamW(groups, lr=1e-3, **baseline)

    @torch.no_grad()
    def update(self) -> torch.Tensor:
        if self.masters is not self.params:  # gradients up to the masters
            for param, master in zip(self.params, self.masters, strict=True):
                master.grad = param.grad.float()
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.masters, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.masters is not self.params:  # weights down to the model
            torch._foreach_copy_(self.params, self.masters)
        return grad_norm


def print_results(runs: Sequence[Training]) -> None:
    rows = []
    for run in runs:
        step, whole = run.watch.median, run.whole_watch.median
        loss = statistics.fmean(run.losses[-10:])
        speed = run.text.batch_size * CONTEXT / whole * 1e3
        cells = (f"{loss:.4f}", f"{run.grad_norm.item():.4f}", f"{speed:.0f}", f"{whole:.1f}")
        share, ratio = f"{step / whole:.1%}", f"{runs[0].watch.median / step:.2f}x"
        rows.append((run.name, *cells, f"{step:.2f}", share, ratio))
    print()
    header = "run,loss,grad norm,tokens/s,iteration ms,optimizer ms,share,ratio"
    print_table(header.split(","), rows)
    print("loss: mean of the last 10 steps; grad norm: last step, unscaled, before clipping;")
    print("optimizer ms: unscale + clip + step + update, and the copies of the masters; times are")
    print("medians; share: optimizer in the iteration; ratio: times faster than torch's optimizer")
    kept = runs[-1].optimizer.memory_footprint().items()
    print("memory:", ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in kept if size > 1e5))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__.splitlines()[0], steps=80)
    add_baseline_argument(parser)
    add_model_arguments(parser, batch=4, layers=6, width=384)
    return parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    prepare(args)
    text = Text(args)
    runs: list[Training] = [TorchTraining(args, text), FusedTraining(args, text)]
    ours = runs[1]
    size = sum(param.numel() for param in ours.model.parameters())
    print(f"{size:,} parameters, {len(text.data):,} characters, {len(text.alphabet)} different")
    checkpoint = args.out / "char_transformer.pt"
    saved_at = args.steps - max(1, args.steps // 6)
    bar = trange(args.steps, desc="characters, 2 runs", unit="step")
    for _ in bar:
        for run in runs:  # in turn, so that whatever disturbs the clock disturbs both
            run.step()
        if ours.steps == saved_at:
            torch.save(ours.state_dict(), checkpoint)
        bar.set_postfix(loss=f"{ours.losses[-1]:.3f}")
    print_results(runs)
    title = (
        f"Characters, {size / 1e6:.1f}M parameters, {args.optimizer}, {args.dtype}, {args.device}"
    )
    plot_runs(args.out / "char_transformer.png", title, runs)

    args.seed += 1  # other weights at the start: what the checkpoint does not restore will show
    resumed = FusedTraining(args, text)
    resumed.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu"))
    while resumed.steps < args.steps:
        resumed.step()
    found = list(differences(ours.state_dict(), resumed.state_dict()))
    return report_resume(found, checkpoint, saved_at, args.steps)


if __name__ == "__main__":
    sys.exit(main())
