"""What a model itself asks to leave out of weight decay, in timm's and in Mamba's way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from param_group_helpers import names_without_decay
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

import fusedopt


class Vit(nn.Module):
    """As timm's: some of the names exist in other models of the family only."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 2, 3))
        self.blocks = nn.Sequential(nn.Linear(3, 3, bias=False))
        self.blocks[0].register_parameter("table", nn.Parameter(torch.ones(2, 3)))

    @torch.jit.ignore
    def no_weight_decay(self) -> Iterable[str]:
        return {"pos_embed", "dist_token", "blocks.0.table"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x + self.pos_embed)


class Wildcards(Vit):
    def no_weight_decay(self) -> Iterable[str]:
        return {"pos_*", "blocks.*.table"}


class Keywords(Vit):
    def no_weight_decay(self) -> Iterable[str]:
        return ()

    def no_weight_decay_keywords(self) -> Iterable[str]:
        return {"embed", "0.tab"}


EXEMPT = {"pos_embed", "blocks.0.table"}


def with_answer(method: str, answer: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    setattr(model, method, lambda: answer)
    return model


@pytest.mark.parametrize("model", [Vit, Wildcards, Keywords])
def test_names_are_relative_to_the_module_that_gives_them(model: type[nn.Module]) -> None:
    assert names_without_decay(model()) == EXEMPT
    wrapped = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ModuleDict({"vit": model()}))
    assert names_without_decay(wrapped) == {f"1.vit.{name}" for name in EXEMPT}


def test_a_name_is_the_whole_name_and_any_of_them() -> None:
    vit, first = Vit(), nn.Module()
    vit.head = nn.Module()
    vit.head.pos_embed = nn.Parameter(torch.ones(2, 2))
    first.weight = vit.pos_embed  # which is tied
    assert names_without_decay(nn.Sequential(first, vit)) == {"0.weight", "1.blocks.0.table"}


@pytest.mark.parametrize("convert", [set, list, tuple, frozenset, dict.fromkeys, iter])
@pytest.mark.parametrize("method", ["no_weight_decay", "no_weight_decay_keywords"])
def test_any_collection_of_names(convert: Callable[..., Any], method: str) -> None:
    model = with_answer(method, convert(["0.weight"]))
    assert names_without_decay(model) == {"0.weight", "0.bias"}
    assert names_without_decay(with_answer(method, convert([]))) == {"0.bias"}


def compiled_block(model: Vit) -> nn.Module:
    model.blocks = torch.compile(model.blocks, backend="eager")
    return model


def checkpointed_block(model: Vit) -> nn.Module:
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return model


def parametrized(model: Vit) -> nn.Module:
    return parametrizations.weight_norm(model, "pos_embed")


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        compiled_block,
        checkpointed_block,
        parametrized,
        pytest.param(
            torch.jit.script,
            marks=pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
        ),
    ],
)
def test_wrappers_that_change_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Vit())
    without = names_without_decay(model)
    decayed = {name for name, _ in model.named_parameters()} - without
    assert len(decayed) == 1 and "blocks" in min(decayed) and "weight" in min(decayed)


def test_parameters_that_are_marked() -> None:
    """Mamba's `A_log` and `D`, in its own code and in transformers."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight._no_weight_decay = True
    model[1].weight._no_weight_decay = False
    assert names_without_decay(model) == {"0.weight", "0.bias", "1.bias"}


def test_what_is_only_called_so() -> None:
    model = nn.Linear(2, 2)
    model.no_weight_decay = True
    assert names_without_decay(model) == {"bias"}


@pytest.mark.parametrize("answer", ["0.weight", None, 3, {1, 2}, ["a", None], b"ab"], ids=repr)
@pytest.mark.parametrize("method", ["no_weight_decay", "no_weight_decay_keywords"])
def test_answers_that_are_no_names(method: str, answer: object) -> None:
    model = with_answer(method, answer)
    with pytest.raises(TypeError, match=rf"{method}\(\) of Sequential must .*got .*set\(\)"):
        fusedopt.param_groups(nn.Sequential(model), 0.1)


def test_an_empty_keyword_is_in_every_name() -> None:
    model = with_answer("no_weight_decay_keywords", {""})
    with pytest.raises(ValueError, match=r"no_weight_decay_keywords\(\) of Sequential .*empty"):
        fusedopt.param_groups(model, 0.1)
