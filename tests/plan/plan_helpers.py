"""The optimizers the tests of the plan are about, and where their values come from."""

import pytest
import torch

import fusedopt

OPTIMIZERS = {
    "adamw": (fusedopt.FusedAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}, {}),
    "sgd": (
        fusedopt.FusedSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"decoupled_weight_decay": False},
    ),
}
every_kind = pytest.mark.parametrize("kind", OPTIMIZERS)


def build(kind, params, **options):
    cls, _, kwargs, extra = OPTIMIZERS[kind]
    return cls(params, **{**kwargs, **extra, **options})


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
