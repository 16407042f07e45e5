"""What this rank holds of a tensor: a DTensor's local tensor, or the tensor itself.

A parameter stays the key of its state, and has the hooks and the version counter. All that a step
reads and writes is local.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


def dtensor_type() -> Any:
    """``DTensor``; None if nobody has imported it, so that there are none."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(value: object) -> bool:
    return type(value) is dtensor_type()


def local_of(tensor: Any) -> Tensor:
    """This rank's part of ``tensor``. Waits for a collective that still fills it."""
    local: Any = tensor._local_tensor if is_dtensor(tensor) else tensor
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(local, collectives.AsyncCollectiveTensor):
        local = local.wait()
    part: Tensor = local
    return part


def same_sharding(tensor: Any, param: Any) -> bool:
    """Whether two DTensors have the same mesh and placements, and parts in the same order."""
    one, other = tensor._spec, param._spec
    return one is other or (one.mesh, one.placements, one.shard_order) == (
        other.mesh,
        other.placements,
        other.shard_order,
    )


def wrapped(local: Tensor, param: Any) -> Tensor:
    """``local`` as a tensor that is sharded like ``param``; ``local`` itself if that is no DTensor.

    ``DTensor.from_local`` would move a part that lies on the CPU to the device of the mesh.
    """
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    meta = TensorMeta(param.shape, param.stride(), local.dtype)
    spec = replace(param._spec, tensor_meta=meta)
    whole: Tensor = type(param)(local, spec, requires_grad=False)
    return whole


def first_element(param: Any) -> int:
    """The place of this rank's first element in all of ``param``, in row-major order."""
    if not is_dtensor(param):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    place = 0
    for size, at in zip(param.shape, offset, strict=True):
        place = place * size + at
    return place


def part_for(param: Any, value: Any) -> Tensor:
    """The part of ``value`` that belongs to this rank's part of ``param``.

    ``value`` has all elements, or is a DTensor of the same mesh. If its placements are not those of
    ``param``, ranks exchange them: all ranks have to call this.
    """
    if not is_dtensor(param):
        return local_of(value)
    if not is_dtensor(value):
        return _cut(value.detach(), param._spec)
    if not same_sharding(value, param):
        value = value.redistribute(placements=param.placements)
    return local_of(value)


def _cut(value: Tensor, spec: Any) -> Tensor:
    """This rank's part of ``value``, which has all elements: a view, if it is one block.

    ``distribute_tensor`` would copy, so that a checkpoint would be loaded twice.
    """
    at = spec.mesh.get_coordinate()
    if at is None:
        return value.new_empty(0)
    for dim in range(value.dim()):
        shards = [
            (place, size, each)
            for place, size, each in zip(at, spec.mesh.shape, spec.placements, strict=True)
            if not each.is_replicate() and each.dim % value.dim() == dim
        ]
        if all(each.is_shard() for *_, each in shards):
            value = _split(value, shards)
        else:  # _StridedShard takes rows from several places, and another Shard some of these
            shape = [-1 if d == dim else 1 for d in range(value.dim())]
            rows = torch.arange(value.shape[dim], device="cpu").view(shape)
            value = _selected(value, dim, _split(rows, shards).flatten())
    return value


def _split(value: Tensor, shards: Sequence[tuple[int, int, Any]]) -> Tensor:
    """``shards``: for each dimension of a mesh the place in it, its size, and the placement."""
    for place, size, each in shards:
        value = each._split_tensor(value, size, with_padding=False, contiguous=False)[0][place]
    return value


def _selected(value: Tensor, dim: int, rows: Tensor) -> Tensor:
    first = int(rows[0]) if rows.numel() > 0 else 0
    if torch.equal(rows, torch.arange(first, first + rows.numel(), device="cpu")):
        return value.narrow(dim, first, rows.numel())
    return value.index_select(dim, rows.to(value.device))


def reduced_alike(params: Sequence[Any], grads: Sequence[Any]) -> list[Tensor]:
    """This rank's parts of gradients, which are DTensors, with the placements of their parameters.

    Tensor parallelism leaves partial sums. They are added up in one collective for all gradients of
    the same mesh, placements and dtype. The gradients themselves stay as they are.
    """
    parts: dict[int, Tensor] = {}
    together: dict[Any, list[int]] = {}
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        have, want = grad._spec.placements, param._spec.placements
        if have == want:
            parts[i] = local_of(grad)
        elif _is_only_to_add(have, want):
            together.setdefault((grad.device_mesh, have, grad.dtype), []).append(i)
        else:
            parts[i] = local_of(grad.redistribute(placements=want))
    for (mesh, have, _), indices in together.items():
        parts.update(
            zip(indices, _added_up(mesh, have, [local_of(grads[i]) for i in indices]), strict=True)
        )
    return [parts[i] for i in range(len(grads))]


def join_sums(params: Iterable[Any]) -> None:
    """Take part in the collectives of ``reduced_alike``, for a step that has failed before them.

    Where a gradient itself is at fault, the ranks cannot meet, and wait for the group's timeout.
    """
    with suppress(Exception):
        pairs = [(p, p.grad) for p in params if is_dtensor(p) and is_dtensor(p.grad)]
        reduced_alike([p for p, _ in pairs], [grad for _, grad in pairs])


def _is_only_to_add(have: Any, want: Any) -> bool:
    pairs = zip(have, want, strict=True)
    return all(a == b or (a.is_partial() and b.is_replicate()) for a, b in pairs)


def _added_up(mesh: Any, placements: Any, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    from torch.distributed.tensor import DTensor, Replicate

    flat = torch.cat([part.detach().reshape(-1) for part in parts])
    # Placements that stay cause no message, whatever they are.
    replicated = [Replicate() for _ in placements]
    partial = [a if a.is_partial() else b for a, b in zip(placements, replicated, strict=True)]
    whole = DTensor.from_local(flat, mesh, partial, run_check=False).redistribute(
        placements=replicated
    )
    pieces = torch.split(local_of(whole), [part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
