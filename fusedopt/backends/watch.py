"""Compare the optimizer before every step with the one that a plan was built for.

``PythonWatch`` serves the reference backend and installations without the native module. It gives
the same answers and bytes as ``Watch`` in csrc/watch/watch.h, only slower.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..plan.local import is_dtensor
from ..plan.memory import strides
from ..plan.plan import Look, Row
from ..rules.declaration import Group
from .records import AWAITS_STATE, CODECS, FROZEN, GRAD, READY, STAGED

# Address, dtype, device, shape and strides.
Place = tuple[int, torch.dtype, torch.device, torch.Size, tuple[int, ...]]

_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may keep its values elsewhere


def row_kind(row: Row) -> int:
    if not row.served:
        return FROZEN
    if row.awaits_state:
        return AWAITS_STATE
    return STAGED if row.staged else READY


def _place(value: object) -> Place | None:
    """The place of a strided tensor, or of a DTensor's local part; ``None`` for anything else."""
    value = _part(value)
    if not isinstance(value, Tensor):
        return None
    try:
        # As in the native watch, no subclass and no default-device mode may answer.
        with torch._C.DisableTorchFunction():
            return value.data_ptr(), value.dtype, value.device, value.shape, strides(value)
    except Exception:  # torch raises many kinds where a tensor has no memory of its own
        return None


def _part(value: object) -> object:
    return getattr(value, "_local_tensor", None) if is_dtensor(value) else value


def _spec(value: object) -> object:
    return getattr(value, "_spec", None) if is_dtensor(value) else None


def _param_lists(groups: object) -> Iterator[Sequence[Any]]:
    """Raises ``RuntimeError`` if these are no param groups."""
    if not isinstance(groups, list):
        raise RuntimeError("param_groups must be a list")
    for g, group in enumerate(groups):
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, (list, tuple)):
            raise RuntimeError(f"param group {g} has no list of params")
        yield params


class PythonWatch:
    """Compares the optimizer's lists and dicts by identity, in order. Tensors are compared by place
    as well: ``t.data = other`` keeps the object and changes the memory. Keeps no state alive.

    Args:
        groups: ``optimizer.param_groups``.
        state: ``optimizer.state``.
        kinds: a RowKind for each row; the rows are the params of all groups in order.
        dtensor: the type ``DTensor``; of such tensors the local part is looked at.

    Raises:
        RuntimeError: these are no optimizer's groups and state, or a param has no address.
    """

    def __init__(
        self,
        groups: list[Group],
        state: dict[Tensor, Any],
        kinds: Sequence[int],
        dtensor: Any = None,
    ) -> None:
        if not isinstance(state, dict):
            raise RuntimeError("state must be a dict")
        self._kinds = kinds
        self._params, self._places, self._contents, items = self._walk(groups, state)
        if len(self._params) != len(kinds):
            count = "fewer" if len(kinds) < len(self._params) else "more"
            raise RuntimeError(f"{count} row kinds than params")
        for row, kind in enumerate(kinds):
            if kind != FROZEN and self._places[row] is None:
                raise RuntimeError(f"param {row} in all is not a strided tensor")
        # A new tensor may have the address of a freed one, and then also has its id.
        self._items = [weakref.ref(item) for item in items]

    def _walk(
        self, groups: list[Group], state: dict[Tensor, Any]
    ) -> tuple[list[Tensor], list[Place | None], list[Any], list[Tensor]]:
        """Params, their places, all else that is compared, and the tensors in dicts of state."""
        lists = list(_param_lists(groups))
        params: list[Tensor] = list(chain(*lists))
        rows = zip(params, self._kinds, strict=False)
        places = [None if kind == FROZEN else _place(param) for param, kind in rows]
        contents: list[Any] = [id(state), list(map(len, lists)), *map(id, params)]
        contents += [id(_spec(param)) for param in params]
        items: list[Tensor] = []
        for key, own in state.items():
            entries = own if isinstance(own, dict) else {}
            contents += [id(key), id(own), len(entries)]
            for name, value in entries.items():
                place = _place(value)
                contents += [id(name), id(value), place]
                if place is not None:
                    items.append(value)  # a DTensor keeps its part
        return params, places, contents, items

    def refresh(self, groups: list[Group], state: dict[Tensor, Any], address: int) -> Look | None:
        """Fill in the Grad records at ``address``, if it is not 0; odd rows are marked absent.

        Returns:
            Odd rows, whose gradient the kernels cannot read in place; rows without gradient; and
            objects that the step has to hold. ``None`` when the plan no longer fits the optimizer.
        """
        try:
            _, places, contents, items = self._walk(groups, state)
        except Exception:  # of any kind: these are no groups any more
            return None
        if contents != self._contents or places != self._places:
            return None
        if any(ref() is not item for ref, item in zip(self._items, items, strict=True)):
            return None
        grads: list[Any] = []
        odd: list[int] = []
        absent: list[int] = []
        records = bytearray()
        for row, (param, kind) in enumerate(zip(self._params, self._kinds, strict=True)):
            if kind != STAGED and _is_negated(param, places[row]):
                return None
            try:
                grad = param.grad
            except Exception:  # of any kind: a subclass has its own idea of .grad
                return None
            if grad is not None and kind in (AWAITS_STATE, FROZEN):
                return None
            record = self._read(row, grad)
            if record is None:
                (absent if grad is None else odd).append(row)
            grads.append(grad)
            records += GRAD.pack(*(record or (0, 0, 0)))
        if address != 0:
            ctypes.memmove(address, bytes(records), len(records))
        return odd, absent, grads + items

    def _read(self, row: int, grad: Any) -> tuple[int, int, int] | None:
        """The fields of the row's record; ``None`` if the kernels cannot read the gradient."""
        if type(_part(grad)) not in _PLAIN or self._kinds[row] == STAGED:
            return None
        if _spec(grad) is not _spec(self._params[row]):
            return None
        place, like = _place(grad), self._places[row]
        if place is None or like is None or place[2:] != like[2:] or place[1] not in CODECS:
            return None
        zeros_without_memory = place[0] == 0 and like[0] != 0
        unreadable = zeros_without_memory or _is_negated(grad, place)
        return None if unreadable else (place[0], CODECS[place[1]], 1)


def _is_negated(tensor: object, place: Place | None) -> bool:
    """Whether it is a lazily negated view: its stride is two, so only one element looks dense."""
    part: Any = _part(tensor)
    return place is not None and place[3].numel() == 1 and bool(part.is_neg())
