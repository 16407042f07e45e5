"""What `python -m benchmarks fidelity` trains: the example's transformer over characters, and a
model over words, most of whose embeddings have a gradient in few steps.

The text is the example's, Python's own reference manual; its last tenth is held out.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rows import ROOT

LAYERS, WIDTH, BATCH = 2, 128, 32
ROWS, WORD_WIDTH, ANSWERS, BEFORE = 6_000, 64, 500, 8  # words known, and the frequent among them
HELD_OUT, HELD_OUT_BATCHES = 0.1, 16
_HELD_OUT_SEED = 12_345
Batch = tuple[Tensor, Tensor]


def example() -> Any:
    folder = str(ROOT / "examples")
    if folder not in sys.path:  # the examples find each other as scripts do
        sys.path.append(folder)
    return importlib.import_module("characters")


@cache
def characters() -> tuple[Tensor, int]:
    """The text as numbers, and how many there are."""
    text = example().Text(argparse.Namespace(device=torch.device("cpu"), seed=0, batch=BATCH))
    return text.data, len(text.alphabet)


@cache
def words() -> Tensor:
    """The text's words as numbers, by how often they occur; the last one stands for all others."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = " ".join(topics[name] for name in sorted(topics))
    every = re.findall(r"\w+|[^\w\s]", text)
    numbers = {word: n for n, (word, _) in enumerate(Counter(every).most_common(ROWS - 1))}
    return torch.tensor([numbers.get(word, ROWS - 1) for word in every])


class WordModel(nn.Module):
    """Which of the frequent words comes next, after eight words of any kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, WORD_WIDTH)
        self.hidden = nn.Linear(BEFORE * WORD_WIDTH, 128)
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, ANSWERS)

    def forward(self, before: Tensor) -> Tensor:
        return self.head(self.norm(F.gelu(self.hidden(self.words(before).flatten(1)))))


class Training:
    """A model, and pieces of the text that depend on the seed and the step's number alone."""

    def __init__(self, model: nn.Module, data: Tensor, length: int, seed: int, lr: float) -> None:
        self.model, self.length, self.seed, self.lr = model, length, seed, lr
        cut = int(len(data) * (1 - HELD_OUT))
        self.data, self.held_out = data[:cut], data[cut:]

    def _pieces(self, data: Tensor, seed: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(data) - self.length, (n, 1), generator=generator)
        return data[starts + torch.arange(self.length + 1)]

    def batch(self, step: int) -> Tensor:
        return self._pieces(self.data, 1_000_003 * self.seed + step, BATCH * self.pieces)

    pieces = 1

    def loss(self, pieces: Tensor) -> Tensor:
        answers = self.model(pieces[:, :-1])
        return F.cross_entropy(answers.flatten(0, 1), pieces[:, 1:].flatten())

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The same pieces for every seed."""
        n = BATCH * self.pieces
        losses = [
            self.loss(self._pieces(self.held_out, _HELD_OUT_SEED + k, n)).item()
            for k in range(HELD_OUT_BATCHES)
        ]
        return sum(losses) / len(losses)


class WordTraining(Training):
    pieces = 4

    def loss(self, pieces: Tensor) -> Tensor:
        return F.cross_entropy(
            self.model(pieces[:, :-1]), pieces[:, -1].clamp(max=ANSWERS - 1)
        )  # the last answer stands for all words that are rarer


def make_training(part: str, seed: int) -> Training:
    if part == "words":
        return WordTraining(WordModel(), words(), BEFORE, seed, lr=3e-3)
    data, alphabet = characters()
    model = example().Transformer(alphabet, WIDTH, LAYERS)
    return Training(model, data, example().CONTEXT, seed, lr=3e-3)
