"""The transformer over characters, its text, and its training with fusedopt.

The text is Python's own reference manual.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from pydoc_data.topics import topics  # the text of help("if"): ships with every Python
from typing import Any

import torch
from common import DTYPES, Stopwatch
from torch import nn
from torch.nn import functional as F
from torch.profiler import record_function

import fusedopt

CONTEXT = 32
MAX_GRAD_NORM = 1.0


def add_model_arguments(
    parser: argparse.ArgumentParser, batch: int, layers: int, width: int
) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model's weights")
    parser.add_argument("--batch", type=int, default=batch, help=f"pieces of {CONTEXT} characters")
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--width", type=int, default=width)


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
        model = Transformer(len(text.alphabet), args.width, args.layers)
        self.model = self.placed(model.to(args.device, DTYPES[args.dtype]))
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

    def placed(self, model: nn.Module) -> nn.Module:
        """The model as it is trained, such as with its parameters sharded."""
        return model

    @abstractmethod
    def make_optimizer(self, groups: list[dict[str, Any]], args: argparse.Namespace) -> Any:
        """The optimizer of these param groups."""

    @abstractmethod
    def update(self) -> torch.Tensor:
        """Unscale, clip and step; return the norm of the gradients."""

    def backward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute the gradients; return the loss."""
        with record_function("forward"):
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        with record_function("backward"):
            self.scaler.scale(loss).backward()
        return loss

    def step(self) -> None:
        with self.whole_watch:
            inputs, targets = self.text.batch(self.steps)
            loss = self.backward(inputs, targets)
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
