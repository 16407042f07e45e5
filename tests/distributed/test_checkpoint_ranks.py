"""torch.distributed.checkpoint from 4 ranks to 2, 3, a single process and 2 again, in every form.

Everywhere the states, and the step after, have the bits of one run that nobody interrupted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_runs import KINDS, Values, assert_same, build, train, values
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

FULL = StateDictOptions(full_state_dict=True)
# To save, and to load. With both options set, torch itself cannot load what it saved.
FORMS = {
    "sharded": (StateDictOptions(), StateDictOptions()),
    "flat": (StateDictOptions(flatten_optimizer_state_dict=True),) * 2,
    "full": (FULL, FULL),
    "full, flat": (dataclasses.replace(FULL, flatten_optimizer_state_dict=True), FULL),
    "full, offloaded": (dataclasses.replace(FULL, cpu_offload=True),) * 2,
    "of rank 0": (
        dataclasses.replace(FULL, cpu_offload=True),
        dataclasses.replace(FULL, cpu_offload=True, broadcast_from_rank0=True),
    ),
}
SHARDED = ("sharded", "flat")
TASKS = [
    ("adamw", torch.bfloat16, tuple(FORMS)),
    ("adamw", torch.float32, ("flat", "full")),
    ("amsgrad", torch.bfloat16, ("sharded", "full, flat")),
    ("sgd", torch.bfloat16, ("flat", "of rank 0")),
    ("lion", torch.bfloat16, SHARDED),
    ("bf16", torch.float32, ("sharded", "full")),
    ("beside", torch.bfloat16, ("flat", "full")),
    ("momentum", torch.bfloat16, SHARDED),  # torch cannot scatter int16
    ("lion", torch.float32, ("full",)),
]
Run = dict[int, Values]  # by the number of steps


def file_of(folder: str, kind: str, dtype: torch.dtype, form: str) -> str:
    return str(Path(folder, f"{kind}-{dtype}-{form}"))


def save(model: Any, optimizer: Any, form: str, file: str) -> None:
    saved = {
        "model": get_model_state_dict(model, options=None if form in SHARDED else FULL),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FORMS[form][0]),
    }
    if form in SHARDED:
        dcp.save(saved, checkpoint_id=file)
    elif not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(saved, file)


def load(model: Any, optimizer: Any, form: str, file: str) -> None:
    options = FORMS[form][1]
    if form in SHARDED:
        saved = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.load(saved, checkpoint_id=file)
        set_model_state_dict(model, saved["model"])
    else:
        saved = torch.load(file, weights_only=True)
        set_model_state_dict(model, saved["model"], options=FULL)
        if options.broadcast_from_rank0 and dist.get_rank() > 0:
            saved["optimizer"] = {}
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)


def start(rank: int, folder: str, runs: dict[Any, Run], shard: bool = True) -> None:
    for kind, dtype, forms in TASKS:
        model, optimizer = build(kind, dtype, 0, shard)
        train(model, optimizer, 0, 1)
        assert_same(values(model, optimizer), runs[kind, dtype][2])
        for form in forms:
            save(model, optimizer, form, file_of(folder, kind, dtype, form))


def go_on(rank: int, folders: list[str], at: int, runs: dict[Any, Run], shard: bool = True) -> None:
    """Load what others have saved after ``at`` steps, take one more, and save it elsewhere."""
    for kind, dtype, forms in TASKS:
        for form in forms:
            model, optimizer = build(kind, dtype, 7, shard)
            load(model, optimizer, form, file_of(folders[0], kind, dtype, form))
            assert_same(values(model, optimizer), runs[kind, dtype][at])
            states = [own[n] for own in optimizer.state.values() for n in own if n != "step"]
            assert all(isinstance(state, DTensor) is shard for state in states)
            train(model, optimizer, at)
            assert_same(values(model, optimizer), runs[kind, dtype][at + 1])
            save(model, optimizer, form, file_of(folders[1], kind, dtype, form))


def uninterrupted(steps: int) -> dict[Any, Run]:
    runs: dict[Any, Run] = {}
    for kind, dtype, _ in TASKS:
        model, optimizer = build(kind, dtype, 0, shard=False)
        run = runs[kind, dtype] = {}
        for step in range(steps):
            train(model, optimizer, step)
            run[step + 1] = values(model, optimizer)
    return runs


@pytest.fixture(scope="module")
def runs() -> dict[Any, Run]:
    return uninterrupted(7)


def folders(tmp_path: Path) -> list[str]:
    names = [str(tmp_path / str(number)) for number in range(5)]
    for name in names:
        Path(name).mkdir()
    return names


def test_from_4_ranks_to_2_to_3(runs: dict[Any, Run], tmp_path: Path) -> None:
    where = folders(tmp_path)
    ranks.run(4, start, where[0], runs)
    ranks.run(2, go_on, where[0:2], 2, runs)
    ranks.run(3, go_on, where[1:3], 3, runs)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_from_3_ranks_to_one_process_and_back(
    runs: dict[Any, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = folders(tmp_path)
    ranks.run(3, start, where[0], runs)
    with monkeypatch.context() as patched:
        alone = (FULL, FULL)  # there is nobody to broadcast to
        patched.setitem(FORMS, "of rank 0", alone)
        go_on(0, where[0:2], 2, runs, shard=False)
    ranks.run(2, go_on, where[1:3], 3, runs)


def test_every_kind_and_form_is_there() -> None:
    assert {kind for kind, _, _ in TASKS} == KINDS.keys()
    assert {form for *_, forms in TASKS for form in forms} == FORMS.keys()
