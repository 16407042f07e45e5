"""The messages of a step: how many collectives a rank takes part in, and the bytes it gives them.

Two ways are used, and have to agree. A dispatch mode sees the operations of ``torch.distributed``
and the functional collectives, which DTensor uses, and the bytes. The sequence numbers of all
process groups count whatever reached a group, by whichever way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")
NO_MESSAGE = ("wait_tensor", "_wrap_tensor_autograd")


class Messages(NamedTuple):
    collectives: int
    n_bytes: int


class _Seen(TorchDispatchMode):
    """Counts the bytes of all-reduces, whose first argument is all that a rank gives."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls operations on local tensors, and these are seen
        name = func._overloadpacket.__name__
        if func.namespace in NAMESPACES and name not in NO_MESSAGE:
            if name.strip("_").replace("_", "") not in ("allreduce", "allreducecoalesced"):
                raise RuntimeError(f"the bytes of {func} are not counted here")
            tensors: list[Tensor] = [args[0]] if isinstance(args[0], Tensor) else list(args[0])
            self.sizes.append(sum(tensor.nbytes for tensor in tensors))
        return func(*args, **(kwargs or {}))


def _sequence_numbers() -> int:
    groups: Any = dist.distributed_c10d._world.pg_map
    return sum(group._get_sequence_number_for_group() for group in groups)


def messages_of(step: Callable[[], object]) -> Messages:
    """Run ``step`` once and count.

    Raises:
        RuntimeError: the two ways to count disagree.
    """
    before, seen = _sequence_numbers(), _Seen()
    with seen, torch.no_grad():
        step()
    counted = _sequence_numbers() - before
    if counted != len(seen.sizes):
        raise RuntimeError(f"{counted} collectives reached a group, {len(seen.sizes)} were seen")
    return Messages(counted, sum(seen.sizes))
