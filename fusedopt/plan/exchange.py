"""The ranks that share one norm and one decision, and the one message of a step.

A message is the words of the norm (csrc/words.h): digits of the sum of squares, counts of inf and
NaN, votes, and a fingerprint of the options. Integers have the same sum in any order, so all ranks
get the same bits. Nothing is exchanged where nobody asked for a norm or a check.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import records
from ..backends.records import ABORT, VOTES, WORDS
from ..options import NOT_PICKLED, OPTION_NAMES, Options, is_flag
from ..rules.declaration import Group
from .checks import is_served
from .local import is_dtensor
from .rows import label_of

REPLICATED = "replicated"  # a group's key

BY_ABORT = (
    "another rank refused this step, so nothing has been changed on any rank; that rank's own "
    "error says why: put it right there, and call `optimizer.step()` on all ranks again"
)
BY_OPTIONS = (
    "the ranks' options differ (clipping, skipping, or an option of a param group such as lr), so "
    "nothing has been changed on any rank; give all ranks the same: compare "
    "`found = [None] * torch.distributed.get_world_size(); "
    "torch.distributed.all_gather_object(found, str(optimizer))`"
)
# The host does not wait for a device, so it may hear of a refusal when later steps are done.
LATE = (
    "this step or one before it was refused and has changed nothing on any rank; the others count, "
    "so put the cause right and go on, without repeating a step. The cause: "
)


class _Sharded(NamedTuple):
    """A DTensor that the step updates."""

    label: str
    param: Any
    replicated: bool | None  # the key of its group

    @property
    def mesh(self) -> Any:
        return self.param.device_mesh

    @property
    def sharded_dims(self) -> tuple[bool, ...]:
        return tuple(not placement.is_replicate() for placement in self.param.placements)

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank is the first of those that hold the same part."""
        at = self.mesh.get_coordinate()
        pairs = zip(at or (), self.param.placements, strict=False)
        return at is not None and all(i == 0 for i, each in pairs if each.is_replicate())


class Ranks:
    """The ranks of ``group``.

    Attributes:
        uncounted: indices of the params, in the order of the groups, that other ranks count.
        is_mixed: torch's GradScaler, which asks one mesh only, may miss another rank's inf.
        compares_groups: the options of the param groups are the same on all ranks.
        device_type: by which words travel; None: where they are. A group may have a backend for the
            CPU and another for GPUs, and all ranks have to use the same.
    """

    def __init__(
        self,
        group: Any,
        uncounted: frozenset[int],
        mixed: bool,
        alike: bool,
        device_type: str | None = None,
    ) -> None:
        self.group, self.uncounted, self.is_mixed = group, uncounted, mixed
        self.compares_groups, self.device_type = alike, device_type
        self.joined = False  # this step's message
        self._known: tuple[Any, int] = (None, 0)  # options, and their part of the fingerprint
        self.replicated: list[bool | None] = []  # the groups' keys
        self.n_held_by_all = 0  # plain parameters with replicated=True
        self.size = torch.distributed.get_world_size(group)
        self._device_types = [device.type for device in group._device_types]  # that it serves

    def fingerprint(self, rule: str, options: Options, table: bytearray) -> int:
        """32 bits of all that has to be the same on every rank."""
        if self._known[0] is not options:
            own: list[Any] = [getattr(options, name) for name in sorted(OPTION_NAMES - _OF_A_RANK)]
            own += self.replicated if self.compares_groups else [self.n_held_by_all]
            self._known = options, zlib.crc32(f"{rule} {own}".encode())
        of_all = self._known[1]
        return zlib.crc32(table, of_all) if self.compares_groups else of_all

    def add_up(self, words: Tensor, norm_type: float) -> None:
        """Replace ``words``, int64 of any device, by the ranks' words together."""
        import torch.distributed as dist

        self.joined = True
        kind = self.device_type or words.device.type
        if kind not in self._device_types:
            kind = self._device_types[0]
        elsewhere = kind != words.device.type
        message = words.to(kind) if elsewhere else words
        op = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
        work = dist.all_reduce(message, op=op, group=self.group, async_op=True)
        work.wait()  # of NCCL: the stream waits, the host does not
        if elsewhere:
            words.copy_(message)

    def abort(self, device: torch.device, norm_type: float) -> None:
        """Join the step's message with a vote against it, so that the other ranks raise, too."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # a capture sends nothing, and this one fails
        words = torch.zeros(WORDS, dtype=torch.int64, device=device)
        words[VOTES] = ABORT
        self.add_up(words, norm_type)


class Refusal(NamedTuple):
    """Why this rank cannot share a norm; and the ranks that may wait for it, if it knows them."""

    why: str
    ranks: Ranks | None


def refuse(refusal: int) -> None:
    """Raise if a rank refuses the step that is being done."""
    if refusal:
        raise RuntimeError(BY_ABORT if refusal == records.BY_ABORT else BY_OPTIONS)


def refuse_late(refusal: int) -> None:
    """The same for a device, which the host does not wait for, after a step.

    All ranks have done, or not done, the same steps. So this step takes part in the message as any
    other, and no rank that hears of it at another time is refused a step once more.
    """
    if refusal:
        cause = BY_ABORT if refusal == records.BY_ABORT else BY_OPTIONS
        raise RuntimeError(LATE + cause.split(", so ")[0])


_OF_A_RANK = {"norm_group", "backend"}


def ranks_of(
    groups: Sequence[Group], options: Options, names: Mapping[Tensor, str | None]
) -> Ranks | Refusal | None:
    """The ranks that the step over ``groups`` shares its norm with; None if it is alone.

    A ``Refusal`` says why they cannot share a norm; a step that needs one raises it.

    Plain parameters alone are those of one process, or of DDP, where all gradients are the same.
    """
    served = [
        (index, label_of(group, g, i, names), param, group.get(REPLICATED))
        for index, (g, i, group, param) in enumerate(_params(groups))
        if is_served(param)
    ]
    sharded = {n: _Sharded(label, p, key) for n, label, p, key in served if is_dtensor(p)}
    if not sharded and options.norm_group is None:
        return None
    try:
        if options.norm_group == NOT_PICKLED:
            raise RuntimeError(
                "this optimizer was pickled or copied, and its norm_group, a group of processes, "
                "was not; say again which ranks share the norm: `optimizer.norm_group = group`"
            )
        for _, label, _, key in served:
            if key is not None and not is_flag(key):
                raise RuntimeError(
                    f"{label}: its group has {REPLICATED}={key!r}; use True or False"
                )
        found = _found(served, sharded, options.norm_group)
    except RuntimeError as error:
        return Refusal(str(error), _reachable(sharded, options.norm_group))
    if found is not None:
        keys = [group.get(REPLICATED) for group in groups]
        found.replicated = [bool(key) if is_flag(key) else None for key in keys]
        # Ranks with other groups have to agree at least on what all of them hold.
        found.n_held_by_all = sum(bool(key) for n, _, _, key in served if n not in sharded)
    return found


def _reachable(sharded: dict[int, _Sharded], given: Any) -> Ranks | None:
    """The ranks that may wait for one that refuses, as far as it knows them."""
    with suppress(RuntimeError):
        group = None if given == NOT_PICKLED else _group_among(sharded, given)
        if group is not None and torch.distributed.get_rank(group) >= 0:
            return Ranks(group, frozenset(), False, alike=given is None)
    return None


def same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def uncounted(ranks: Ranks | Refusal | None) -> frozenset[int]:
    return ranks.uncounted if isinstance(ranks, Ranks) else frozenset()


def _params(groups: Sequence[Group]) -> Iterator[tuple[int, int, Group, Tensor]]:
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            yield g, i, group, param


def _found(served: Any, sharded: dict[int, _Sharded], given: Any) -> Ranks | None:
    meshes = {each.mesh: each for each in sharded.values()}
    widest = max(map(_ranks_on, meshes), key=len, default=frozenset())
    group = _group_among(sharded, given)
    own = torch.distributed.get_rank(group)
    if own < 0:
        raise _no_member()
    everyone = frozenset(torch.distributed.get_process_group_ranks(group))
    _check_all_inside(meshes.values(), everyone)
    partly = {mesh for mesh in meshes if _ranks_on(mesh) != widest}
    elsewhere = set()
    for index, label, _, replicated in served:
        if index in sharded:
            counted = _is_counted(sharded[index], sharded[index].mesh in partly, everyone)
        elif sharded and replicated is None:
            raise RuntimeError(
                f"{label} is a plain tensor beside DTensors, and the norm has to count each "
                "element once; say whether all ranks hold the same: `optimizer.param_groups[-1]"
                f"['{REPLICATED}'] = True`, in a group of its own, or False where each rank has "
                "its own part"
            )
        else:
            counted = not replicated or own == 0
        if not counted:
            elsewhere.add(index)
    if torch.distributed.get_world_size(group) == 1:
        return None
    shardings = {(each.mesh, each.sharded_dims) for each in sharded.values()}
    mixed = len(shardings) != 1 or widest != everyone or len(sharded) != len(served)
    device_type = None if served else _device_type_of(given)
    return Ranks(group, frozenset(elsewhere), mixed, given is None, device_type)


def _device_type_of(given: Any) -> str | None:
    """Where other ranks probably have their parameters; this one has none."""
    accelerator = "cuda" if torch.cuda.is_available() else None
    device_type: str | None = getattr(given, "device_type", accelerator)
    return device_type


def _group_among(sharded: dict[int, _Sharded], given: Any) -> Any:
    """The group of the ranks that share the norm."""
    if given is not None:
        return _group_of(given)
    meshes = {each.mesh: each for each in sharded.values()}
    widest = max(meshes, key=lambda mesh: mesh.size())
    _check_known(meshes.values(), _ranks_on(widest))
    return _group_of(widest)


def _check_all_inside(one_of_each_mesh: Iterable[_Sharded], everyone: frozenset[int]) -> None:
    """Replicas, or shards, outside of the norm's ranks would take a step of their own."""
    for each in one_of_each_mesh:
        if not _ranks_on(each.mesh) <= everyone:
            raise RuntimeError(
                f"norm_group has not all ranks of {each.mesh}, where {each.label} lies; pass one "
                "that has: `optimizer.norm_group = torch.distributed.group.WORLD`"
            )


def _check_known(one_of_each_mesh: Iterable[_Sharded], widest: frozenset[int]) -> None:
    """Without ``norm_group`` the meshes have to tell which ranks there are."""
    for each in one_of_each_mesh:
        root = each.mesh._get_root_mesh()
        names = root.mesh_dim_names or ()
        missing = [names[d] if names else d for d in _dims_outside(root, widest)]
        if not _ranks_on(each.mesh) <= widest:
            raise RuntimeError(
                f"{each.label} lies on {each.mesh}, and other parameters on other ranks: it is not "
                "known which ranks share the norm; pass "
                "`norm_group=torch.distributed.group.WORLD`, or the group or DeviceMesh of the "
                "ranks that do"
            )
        if missing:
            raise RuntimeError(
                f"{each.label} lies on a part of its mesh, whose other dimensions are "
                f"{', '.join(map(repr, missing))}: it is not known whether their ranks share the "
                "norm; where they hold other parameters, as stages of a pipeline do, pass "
                "`norm_group=torch.distributed.group.WORLD`, or the group or DeviceMesh of all "
                "stages; where they hold the same, the mesh: `norm_group=param.device_mesh`"
            )


# Meshes may have many thousands of ranks, and models many thousands of parameters.
@lru_cache(maxsize=64)
def _ranks_on(mesh: Any) -> frozenset[int]:
    return frozenset(mesh.mesh.flatten().tolist())


def _places(root: Any, ranks: frozenset[int]) -> Tensor:
    """The coordinates of ``ranks`` in a root mesh, a row for each."""
    wanted = torch.tensor(sorted(ranks), dtype=root.mesh.dtype, device="cpu")
    return torch.isin(root.mesh, wanted).nonzero()


@lru_cache(maxsize=64)
def _dims_outside(root: Any, ranks: frozenset[int]) -> list[int]:
    """The dimensions of a root mesh that ``ranks`` do not span."""
    if root.size() <= len(ranks):
        return []
    at = _places(root, ranks)
    return [d for d in range(root.ndim) if root.size(d) > len(set(at[:, d].tolist()))]


def _is_counted(each: _Sharded, has_fewer_ranks: bool, everyone: frozenset[int]) -> bool:
    """Whether this rank counts a DTensor, in a norm of the ranks ``everyone``."""
    if each.replicated is False or (each.replicated is None and not has_fewer_ranks):
        return each.is_first_replica
    if each.replicated is None:
        raise RuntimeError(
            f"{each.label} lies on a smaller mesh than other parameters, and the norm has to count "
            "each element once; say whether the ranks outside of its mesh hold the same: "
            f"`optimizer.param_groups[-1]['{REPLICATED}'] = True`, in a group of its own, or False "
            "where each mesh has its own part"
        )
    root = each.mesh._get_root_mesh()
    if not everyone <= _ranks_on(root):
        raise RuntimeError(
            f"{each.label}: {REPLICATED}=True, and norm_group has ranks outside of {root}, so that "
            "it is not known where its copies lie; make its mesh a part of one that has them all, "
            "or say that each mesh has its own part: "
            f"`optimizer.param_groups[-1]['{REPLICATED}'] = False`"
        )
    place, outside = root.get_coordinate(), _dims_outside(root, _ranks_on(each.mesh))
    if not each.is_first_replica or not outside:
        return each.is_first_replica
    first = _places(root, everyone).amin(0).tolist()
    return place is not None and all(place[d] == first[d] for d in outside)


def _no_member() -> RuntimeError:
    return RuntimeError(
        "norm_group has no member on this rank; give each rank the group that it belongs to: "
        "`optimizer.norm_group = group`"
    )


def _group_of(given: Any) -> Any:
    """The process group of all ranks of ``given``, a group or a mesh."""
    import torch.distributed as dist

    if not hasattr(given, "get_group"):
        return given
    ranks = _ranks_on(given)
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    if given.get_coordinate() is None:
        raise _no_member()
    for dim in range(given.ndim):
        if given.size(dim) == len(ranks):
            return given.get_group(dim)
    raise RuntimeError(
        f"the mesh {given} has several dimensions and not all ranks, and no process group has all "
        "of its ranks; make one: `optimizer.norm_group = mesh._flatten()`"
    )
