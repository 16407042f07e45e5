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
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pydoc_data.topics import topics  # the text of help("if"): ships with every Python
from typing import Any

import torch
from common import (
    DTYPES,
    Stopwatch,
    argument_parser,
    differences,
    parse,
    plot_runs,
    prepare,
    print_table,
    report_resume,
)
from torch import nn
from torch.nn import functional as F
from torch.profiler import record_function
from tqdm import trange

import fusedopt

CONTEXT = 32
MAX_GRAD_NORM = 1.0


class Text:
    """The manual as a tensor of character numbers."""

    def __init__(self, args: argparse.Namespace) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))
        self.alphabet = sorted(set(text))
        numbers = {character: number for number, character in enumerate(self.alphabet)}
        self.data = torch.tensor([numbers[character] for character in text])
        self.data = self.data.to(args.device)
        self.seed, self.batch_size = args.seed, args.batch

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pieces of the text, and the same moved on by one character; a function of the step's
        number, so a run that continues from a checkpoint sees what the first one saw."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        shape = (self.batch_size, 1)
        starts = torch.randint(len(self.data) - CONTEXT, shape, generator=generator)
        pieces = self.data[(starts + torch.arange(CONTEXT + 1)).to(self.data.device)]
        return pieces[:, :-1], pieces[:, 1:]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.attention_in(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        query, key, value = heads.unbind(2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, alphabet: int, width: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet, bias=False)
        self.head.weight = self.characters.weight
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        here = torch.arange(x.shape[1], device=x.device)
        hidden = self.blocks(self.characters(x) + self.positions(here))
        return self.head(self.norm(hidden)).float()


class Training(ABC):
    """One run: everything that makes up its state, and what was measured on the way."""

    name: str
    scaler_class: type[torch.amp.GradScaler]

    def __init__(self, args: argparse.Namespace, text: Text) -> None:
        self.text, self.device = text, args.device
        torch.manual_seed(args.seed)
        self.model = Transformer(len(text.alphabet), args.width, args.layers)
        self.model.to(args.device, DTYPES[args.dtype])
        decay = 0.1 if args.optimizer == "adamw" else 1e-4
        # The head shares its weight with the embedding, so it is left out of decay with it.
        groups = fusedopt.param_groups(self.model, decay, decay_embeddings=False)
        self.optimizer = self.make_optimizer(groups, args)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=self.optimizer.defaults["lr"], total_steps=args.steps
        )
        self.scaler = self.scaler_class(args.device.type, enabled=args.dtype == "fp16")
        self.steps = 0
        self.losses: list[float] = []
        self.watch = Stopwatch("optimizer", args.device)
        self.whole_watch = Stopwatch("iteration", args.device)

    @abstractmethod
    def make_optimizer(self, groups: list[dict[str, Any]], args: argparse.Namespace) -> Any:
        """The optimizer of these param groups."""

    @abstractmethod
    def update(self) -> torch.Tensor:
        """Unscale, clip and step; return the norm of the gradients."""

    def step(self) -> None:
        with self.whole_watch:
            inputs, targets = self.text.batch(self.steps)
            with record_function("forward"):
                loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
            with record_function("backward"):
                self.scaler.scale(loss).backward()
            with self.watch:
                self.grad_norm = self.update()
            self.model.zero_grad()
            self.scheduler.step()
        self.steps += 1
        self.losses.append(loss.item())

    def state_dict(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "scaler", "scheduler")
        return {"steps": self.steps} | {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name in ("model", "optimizer", "scaler", "scheduler"):
            getattr(self, name).load_state_dict(state[name])


class FusedTraining(Training):
    """fusedopt: masters, unscaling and clipping are the optimizer's own affair."""

    name = "fusedopt"
    scaler_class = fusedopt.GradScaler

    def make_optimizer(self, groups: list[dict[str, Any]], args: argparse.Namespace) -> Any:
        ours: dict[str, Any] = {"max_grad_norm": MAX_GRAD_NORM, "backend": args.backend}
        if args.optimizer == "sgd":  # torch.optim.SGD couples its weight decay; ours can, too
            ours["decoupled_weight_decay"] = False
            return fusedopt.FusedSGD(groups, lr=0.1, momentum=0.9, **ours)
        return fusedopt.FusedAdamW(groups, lr=1e-3, **ours)

    def update(self) -> torch.Tensor:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.optimizer.grad_norm


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
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model's weights")
    parser.add_argument("--batch", type=int, default=4, help=f"pieces of {CONTEXT} characters")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
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
