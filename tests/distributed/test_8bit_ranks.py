"""8-bit states of sharded parameters: blocks begin where a shard begins, and may be cut by others.

A checkpoint has the scale of each element. The same sharding takes the codes as they are, another
one encodes again what it cuts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_runs import Values, assert_same, full, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import fusedopt
from fusedopt.plan.local import local_of

FULL = StateDictOptions(full_state_dict=True)
CELL = 0.03  # half a cell of an octave's twelve, and the cell of the dither that is gone
STATES = ("exp_avg", "exp_avg_sq")


def build(seed: int, shard: bool = True) -> tuple[Any, Any]:
    """Shards of 2, 3 or 4 ranks that cut blocks of 128 elements, and some that do not."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = torch.nn.Sequential(torch.nn.Linear(37, 11), torch.nn.Linear(64, 24))
    model = fully_shard(model) if shard else model
    options = {"lr": 0.1, "state_dtype": "8bit", "min_8bit_size": 1}
    return model, fusedopt.FusedAdamW(model.parameters(), **options)


def local_values(model: Any, optimizer: Any) -> Values:
    return {
        (name, kind): local_of(value).clone()
        for name, param in model.named_parameters()
        for kind, value in {"param": param.detach(), **optimizer.state[param]}.items()
    }


def decoded(model: Any, optimizer: Any) -> Values:
    """All elements of the states, as numbers."""
    saved = fusedopt.to_torch(optimizer.state_dict())["state"]
    found = {}
    for i, (name, _) in enumerate(model.named_parameters()):
        for kind in STATES:
            found[name, kind] = full(saved[i][kind])
    return found


def checkpoint(model: Any, optimizer: Any, whole: bool) -> dict[str, Any]:
    options = FULL if whole else StateDictOptions()
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def load(model: Any, optimizer: Any, saved: dict[str, Any], whole: bool) -> None:
    options = FULL if whole else StateDictOptions()
    set_model_state_dict(model, saved["model"], options=options)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)


def start(rank: int, folder: str) -> tuple[Values, Values]:
    """Two steps, a checkpoint in both forms, and the same run to its end."""
    model, optimizer = build(0)
    train(model, optimizer, 0, 1)
    dcp.save(checkpoint(model, optimizer, False), checkpoint_id=f"{folder}/sharded")
    saved = checkpoint(model, optimizer, True)
    if rank == 0:
        torch.save(saved, f"{folder}/full")
    after_two = decoded(model, optimizer)
    train(model, optimizer, 2)
    return local_values(model, optimizer), after_two


def go_on(rank: int, folder: str, form: str) -> tuple[Values, Values]:
    model, optimizer = build(7)
    if form == "sharded":
        saved = checkpoint(model, optimizer, False)
        dcp.load(saved, checkpoint_id=f"{folder}/sharded")
    else:
        saved = torch.load(f"{folder}/full")
    load(model, optimizer, saved, form == "full")
    loaded = decoded(model, optimizer)
    train(model, optimizer, 2)
    return local_values(model, optimizer), loaded


def assert_near(found: Values, wanted: Values) -> None:
    for key, value in wanted.items():
        slack = CELL * value.abs() + 2.0**-9 / 12 * value.abs().max()
        assert ((found[key] - value).abs() <= slack).all(), key


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_the_same_shards_take_the_codes_as_they_are(form: str, tmp_path: Path) -> None:
    began = ranks.run(4, start, str(tmp_path))
    ended = ranks.run(4, go_on, str(tmp_path), form)
    for (wanted, _), (found, _) in zip(began, ended, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_other_shards_keep_the_numbers(form: str, tmp_path: Path) -> None:
    wanted = ranks.run(4, start, str(tmp_path))[0][1]
    for _, found in ranks.run(2, go_on, str(tmp_path), form):
        assert_near(found, wanted)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_to_a_single_process_and_back(tmp_path: Path) -> None:
    wanted = ranks.run(3, start, str(tmp_path))[0][1]
    model, optimizer = build(7, shard=False)
    load(model, optimizer, torch.load(tmp_path / "full"), whole=True)
    assert_near(decoded(model, optimizer), wanted)
    torch.save(checkpoint(model, optimizer, True), tmp_path / "full")
    alone = decoded(model, optimizer)
    for _, found in ranks.run(2, go_on, str(tmp_path), "full"):
        assert_near(found, alone)
