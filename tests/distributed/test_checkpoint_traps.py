"""Where torch.distributed.checkpoint loses or changes values without a word, and what we do."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import threading
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_runs import (
    KINDS,
    Values,
    assert_same,
    build,
    build_model,
    full,
    give_grads,
    train,
    values,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fusedopt

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True)


class Messages:
    """The collectives of torch.distributed that this process takes part in: thread and group."""

    NAMES = ("all_reduce", "all_gather", "broadcast", "gather", "scatter", "all_gather_single")

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self._patches = [
            mock.patch.object(module, name, self._noting(getattr(module, name)))
            for module in (dist, dist.distributed_c10d)
            for name in self.NAMES
        ]

    def _noting(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            is_main = threading.current_thread() is threading.main_thread()
            group = kwargs.get("group") or dist.group.WORLD
            self.seen.append(("step" if is_main else "save", group))
            return function(*args, **kwargs)

        return call

    def __enter__(self) -> Messages:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def of(self, which: str) -> set[Any]:
        return {group for name, group in self.seen if name == which}


# ---- before the first step -----------------------------------------------------------------------


def saved_before_the_first_step(rank: int) -> None:
    """torch makes the state to save by a step with lr=0. It counts as none here, and asks no rank;
    so a run that was saved goes on like one that was not, and so does the one that loads."""
    clip = {"max_grad_norm": 1.0}
    uncounted = {"momentum": 0.0, **clip}  # all that it keeps are masters
    for kind, options in [("adamw", clip), ("sgd", {}), ("sgd", uncounted), ("lion", {})]:
        cls, given = KINDS[kind][0], {**KINDS[kind][1], **options}
        for how in (StateDictOptions(), FLAT, FULL):
            runs = []
            for saves in (True, False):
                model = build_model(0, torch.bfloat16)
                optimizer = cls(model.parameters(), **given)
                if saves:
                    with Messages() as messages:
                        saved = get_optimizer_state_dict(model, optimizer, options=FLAT)
                    assert not messages.seen
                    saved = get_optimizer_state_dict(model, optimizer, options=how)
                    states = optimizer.state.values()
                    counts = [float(own["step"]) for own in states if "step" in own]
                    assert counts == ([] if options is uncounted else [0, 0, 0, 0])
                    saved = copy.deepcopy(saved)
                    assert all(p.grad is None for p in model.parameters())
                runs.append((model, optimizer))
            model = build_model(0, torch.bfloat16)
            optimizer = cls(model.parameters(), **given)
            train(model, optimizer, 7)
            with torch.no_grad():
                for p, q in zip(model.parameters(), runs[0][0].parameters(), strict=True):
                    p.copy_(q)
            set_optimizer_state_dict(model, optimizer, saved, options=how)
            runs.append((model, optimizer))
            for each in runs:
                train(*each, 0, 1)
            for each in runs[1:]:
                assert_same(values(*each), values(*runs[0]))


def state_at_once(rank: int) -> None:
    """init_state() on all ranks; of a bias the last rank has no element."""
    model, optimizer = build("adamw", torch.bfloat16, 0)
    with Messages() as messages:
        optimizer.init_state()
    assert not messages.seen
    sizes = optimizer.memory_footprint()
    elements = sum(p._local_tensor.numel() for p in model.parameters())
    assert sizes["param"] == 2 * elements
    assert {sizes[n] for n in ("master_param", "exp_avg", "exp_avg_sq")} == {4 * elements}
    assert sizes["step"] == 4 * 4
    for (name, kind), value in values(model, optimizer).items():
        if kind == "master_param":
            assert torch.equal(value, full(dict(model.named_parameters())[name]).float())


# ---- states that are lost on the way -------------------------------------------------------------


def refused(load: Any, optimizer: Any, match: str) -> str:
    """The first remedy. Groups are as before; state is at most what torch made to load into."""
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(KeyError, match=match) as why:
        load()
    assert optimizer.state_dict()["param_groups"] == groups
    for own in optimizer.state.values():
        assert all(full(own[n]).count_nonzero() == 0 for n in own if n != "master_param")
    return re.findall(r"`([^`]+)`", str(why.value.args[0]))[0]


def lost_states(rank: int) -> None:
    model, optimizer = build("adamw", torch.bfloat16, 0)
    train(model, optimizer, 0, 1)
    wanted = values(model, optimizer)
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)

    # 1. Keys that the checkpoint does not have (pytorch#192224).
    for name in ("exp_avg", "step", "exp_avg_sq"):
        other, other_optimizer = build("adamw", torch.bfloat16, 7)
        other_optimizer.init_state()
        lacking = {key: value for key, value in flat.items() if key != f"state.1.weight.{name}"}
        load = partial(set_optimizer_state_dict, other, other_optimizer, lacking, options=FLAT)
        words = f"param 2 of group 0: the checkpoint has no '{name}' of '1.weight'"
        exec(refused(load, other_optimizer, words), {"optimizer": other_optimizer})
        load()
        assert "1.weight" not in {
            n for n, p in other.named_parameters() if other_optimizer.state.get(p)
        }
        found = {k: v for k, v in values(other, other_optimizer).items() if k[1] == "exp_avg"}
        assert_same(found, {k: v for k, v in wanted.items() if k in found})

    # A master is rebuilt from its parameter.
    lacking = {key: value for key, value in flat.items() if not key.endswith("master_param")}
    other, other_optimizer = build("adamw", torch.bfloat16, 0)
    set_optimizer_state_dict(other, other_optimizer, lacking, options=FLAT)
    assert all("master_param" not in own for own in other_optimizer.state.values())
    train(other, other_optimizer, 2)
    assert all("master_param" in own for own in other_optimizer.state.values())

    # In a full one torch leaves in place what the file has not: here, of a state that is new.
    whole = get_optimizer_state_dict(
        model, optimizer, options=dataclasses.replace(FULL, flatten_optimizer_state_dict=True)
    )
    lacking = {key: value for key, value in whole.items() if not key.startswith("state.1.weight")}
    other, other_optimizer = build("adamw", torch.bfloat16, 7)
    set_optimizer_state_dict(other, other_optimizer, lacking, options=FULL)
    own = other_optimizer.state[other[1].weight]
    assert float(own["step"]) == 0 and full(own["exp_avg"]).count_nonzero() == 0
    assert float(other_optimizer.state[other[1].bias]["step"]) == 2

    # 2. An optimizer without state: torch makes none where there are gradients.
    other, other_optimizer = build("adamw", torch.bfloat16, 7)
    give_grads(other, 0)
    load = partial(set_optimizer_state_dict, other, other_optimizer, flat, options=FLAT)
    words = "param 0 of group 0: it had no state"
    exec(refused(load, other_optimizer, words), {"optimizer": other_optimizer})
    load()
    assert_same(states(values(other, other_optimizer)), states(wanted))


def states(found: Values) -> Values:
    return {key: value for key, value in found.items() if key[1] != "param"}


def turned_on(rank: int) -> None:
    """States that depend on options which the new optimizer was not given."""
    for kind, off, value in [("amsgrad", "amsgrad", True), ("sgd", "momentum", 0.9)]:
        model, optimizer = build(kind, torch.float32, 0)
        train(model, optimizer, 0, 1)
        flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
        whole = get_optimizer_state_dict(model, optimizer)
        other = build_model(7)
        cls, given = KINDS[kind]
        without = {**given, off: type(value)(0)} | ({"dampening": 0} if kind == "sgd" else {})
        other_optimizer = cls(other.parameters(), **without)
        load = partial(set_optimizer_state_dict, other, other_optimizer, flat, options=FLAT)
        words = f"param 0 of group 0: its states in the checkpoint depend on {off}={value}"
        exec(refused(load, other_optimizer, words), {"optimizer": other_optimizer})
        load()
        assert_same(states(values(other, other_optimizer)), states(values(model, optimizer)))
        # As it is, not flattened, nothing is lost.
        other_optimizer = cls(other.parameters(), **without)
        set_optimizer_state_dict(other, other_optimizer, whole)
        assert_same(states(values(other, other_optimizer)), states(values(model, optimizer)))
        # Turned off in the checkpoint and on in the optimizer.
        model = build_model(0)
        optimizer = cls(model.parameters(), **without)
        train(model, optimizer, 0)
        flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
        other, other_optimizer = build(kind, torch.float32, 7)
        set_optimizer_state_dict(other, other_optimizer, flat, options=FLAT)
        assert_same(states(values(other, other_optimizer)), states(values(model, optimizer)))


def counts_that_differ(rank: int, folder: str) -> None:
    """As where an expert had no token on one rank: the file has one count of the two."""
    model, optimizer = build("adamw", torch.float32, 0)
    train(model, optimizer, 0)
    give_grads(model, 1)
    if rank == 1:
        model[0].weight.grad = None
    optimizer.step()
    own = optimizer.state_dict()
    assert float(own["state"][0]["step"]) == 2 - rank
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=folder)
    other, other_optimizer = build("adamw", torch.float32, 7)
    saved = get_optimizer_state_dict(other, other_optimizer)
    dcp.load({"optimizer": saved}, checkpoint_id=folder)
    set_optimizer_state_dict(other, other_optimizer, saved)
    counts: list[Any] = [None, None]
    dist.all_gather_object(counts, float(other_optimizer.state[other[0].weight]["step"]))
    assert counts[0] == counts[1] and counts[0] in (1, 2)
    # The ranks' own checkpoints keep the ranks' own counts.
    other_optimizer.load_state_dict(own)
    assert float(other_optimizer.state[other[0].weight]["step"]) == 2 - rank


def orders_that_differ(rank: int) -> None:
    """A state is made with the first gradient; to gather, ranks have to meet at the same tensor."""
    model = fully_shard(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)))
    optimizer = fusedopt.FusedLion(model.parameters(), lr=0.1)
    give_grads(model, 0)
    if rank == 1:
        model[0].zero_grad()
    optimizer.step()
    train(model, optimizer, 1)
    assert next(iter(optimizer.state)) is model[rank].weight
    saved: Any = get_optimizer_state_dict(model, optimizer, options=FULL)
    for (name, kind), value in states(values(model, optimizer)).items():
        if kind != "step":
            assert torch.equal(saved["state"][name][kind], value)


def of_the_optimizer_itself(rank: int, folder: str) -> None:
    """torch saves and loads what is there: a new optimizer needs its state first."""
    model, optimizer = build("lion", torch.bfloat16, 0)
    train(model, optimizer, 0, 1)
    dcp.save({"optimizer": optimizer}, checkpoint_id=f"{folder}/itself")
    for ready in (False, True):
        other, other_optimizer = build("lion", torch.bfloat16, 7)
        if ready:
            other_optimizer.init_state()
        dcp.load({"optimizer": other_optimizer}, checkpoint_id=f"{folder}/itself")
        found = states(values(other, other_optimizer))
        assert_same(found, states(values(model, optimizer)) if ready else {})


def traps(rank: int, folder: str) -> None:
    saved_before_the_first_step(rank)
    state_at_once(rank)
    lost_states(rank)
    turned_on(rank)
    counts_that_differ(rank, f"{folder}/counts")
    of_the_optimizer_itself(rank, folder)
    orders_that_differ(rank)


def test_nothing_is_lost_in_silence(tmp_path: Path) -> None:
    ranks.run(2, traps, str(tmp_path))


# ---- saving while training goes on ---------------------------------------------------------------


def saved_meanwhile(rank: int, folder: str) -> None:
    model, optimizer = build("adamw", torch.bfloat16, 0)
    optimizer.max_grad_norm = 1.0
    train(model, optimizer, 0, 1)
    at_that_time = values(model, optimizer)
    group = dist.new_group(backend="gloo")
    for name, process_group in (("own", group), ("default", None)):
        saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        with Messages() as messages:
            future = dcp.async_save(
                saved, checkpoint_id=f"{folder}/{name}", process_group=process_group
            )
            if process_group is None:  # its messages and a step's would mix: not at once
                future.result()
            train(model, optimizer, 2, 3, 4)
            future.result()
        step_group, save_group = messages.of("step"), messages.of("save")
        assert step_group == {dist.group.WORLD}
        assert save_group == {process_group or dist.group.WORLD}
        if process_group is None:
            return
        other, other_optimizer = build("adamw", torch.bfloat16, 7)
        loaded = {"optimizer": get_optimizer_state_dict(other, other_optimizer)}
        dcp.load(loaded, checkpoint_id=f"{folder}/{name}")
        set_optimizer_state_dict(other, other_optimizer, loaded["optimizer"])
        assert_same(states(values(other, other_optimizer)), states(at_that_time))


def test_async_save(tmp_path: Path) -> None:
    """With a group of its own it may overlap steps; on the default group it uses the steps' own."""
    ranks.run(2, saved_meanwhile, str(tmp_path))


# ---- meshes of two dimensions, from 4 ranks to 2 -------------------------------------------------

# Tensor parallelism makes _StridedShard, also with rows that are not shared evenly.
LAYOUTS = [("tp", 8), ("tp", 7), ("tp", 5), ("hsdp", 7)]
Found = dict[tuple[str, int], Values]


def two_dimensions(layout: str, rows: int) -> tuple[Any, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", layout))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, rows))
    if layout == "tp":
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    else:
        fully_shard(model, mesh=mesh)
    return model, fusedopt.FusedAdamW(model.parameters(), lr=0.1)


def save_from_4(rank: int, folder: str) -> Found:
    found = {}
    for layout, rows in LAYOUTS:
        model, optimizer = two_dimensions(layout, rows)
        train(model, optimizer, 0, 1)
        saved = get_optimizer_state_dict(model, optimizer)
        dcp.save({"optimizer": saved}, checkpoint_id=f"{folder}/{layout}{rows}")
        found[layout, rows] = states(values(model, optimizer))
        other, other_optimizer = two_dimensions(layout, rows)
        loaded = get_optimizer_state_dict(other, other_optimizer)
        dcp.load({"optimizer": loaded}, checkpoint_id=f"{folder}/{layout}{rows}")
        set_optimizer_state_dict(other, other_optimizer, loaded)
        assert_same(states(values(other, other_optimizer)), found[layout, rows])
    return found


def load_on_2(rank: int, folder: str, wanted: Found) -> None:
    for (layout, rows), expected in wanted.items():
        model = fully_shard(torch.nn.Sequential(torch.nn.Linear(3, rows)))
        optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.1)
        loaded = get_optimizer_state_dict(model, optimizer)
        dcp.load({"optimizer": loaded}, checkpoint_id=f"{folder}/{layout}{rows}")
        set_optimizer_state_dict(model, optimizer, loaded)
        assert_same(states(values(model, optimizer)), expected)


def test_two_dimensions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 7))
    optimizer = fusedopt.FusedAdamW(plain.parameters(), lr=0.1)
    train(plain, optimizer, 0, 1)
    found = ranks.run(4, save_from_4, str(tmp_path))[0]
    for layout in ("tp", "hsdp"):
        assert_same(found[layout, 7], states(values(plain, optimizer)))
    ranks.run(2, load_on_2, str(tmp_path), found)


# ---- what the documents say ----------------------------------------------------------------------

STATE_MD = Path(__file__).parents[2] / "docs" / "state.md"


def documented(rank: int, code: str, folder: str) -> None:
    model, _ = build("adamw", torch.bfloat16, 0)
    names: dict[str, Any] = {"model": model, "fusedopt": fusedopt, "torch": torch}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(code, names)
        at_that_time = values(model, names["opt"])
        train(model, names["opt"], 0, 1)
        exec(code[code.index("state = saved()") :], names)
    finally:
        os.chdir(before)
    assert_same(values(model, names["opt"]), at_that_time)
    assert all(key[1] != "step" or value == 0 for key, value in at_that_time.items())


@pytest.mark.skipif(not STATE_MD.is_file(), reason="the documents are not here")
def test_the_documents(tmp_path: Path) -> None:
    text = STATE_MD.read_text().partition("## Checkpoints of sharded models")[2]
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ranks.run(2, documented, code, str(tmp_path))
