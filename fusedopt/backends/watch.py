"""What a plan was built for, compared before every step with what is there now.

``PythonWatch`` is the twin of ``Watch`` in csrc/watch/watch.h for an installation without the
native module: the same answers and the same bytes, only slower. Each thing is asked of all tensors
in one ``map`` and compared in one list, which is the fastest that Python does.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..plan.plan import Group, Look
from .records import AWAITS_STATE, DTYPE_CODES, FROZEN, GRAD, STAGED

# Where a tensor lies and how: one column each. Everything from the third on is its layout.
_COLUMNS: tuple[Callable[[Tensor], Any], ...] = (
    Tensor.data_ptr,
    attrgetter("dtype"),
    attrgetter("device"),
    attrgetter("shape"),
    Tensor.stride,
)
_GRAD = attrgetter("grad")
_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may keep its values elsewhere
_ABSENT = (0, 0, 0)  # fields of a Grad record


def _placed(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """The columns. Raises, as torch chooses, if a tensor has no memory of its own."""
    # As in the native watch: a subclass is not asked, nor is the mode of a default device.
    with torch._C.DisableTorchFunction():
        return [list(map(column, tensors)) for column in _COLUMNS]


def _has_place(value: object) -> bool:
    """False for anything that is not a strided tensor."""
    if not isinstance(value, Tensor):
        return False
    try:
        _placed([value])
    except Exception:
        return False
    return True


def _same_layout(layout: Sequence[Any], other: Sequence[Any]) -> bool:
    """Device, shape and strides; a dimension of one element may carry any stride."""
    if layout[:2] != other[:2]:
        return False
    dims = zip(layout[1], layout[2], other[2], strict=True)
    return all(size < 2 or stride == others for size, stride, others in dims)


def _same_places(places: list[list[Any]], others: list[list[Any]]) -> bool:
    if places == others:
        return True
    return places[:2] == others[:2] and all(
        map(_same_layout, zip(*places[2:], strict=True), zip(*others[2:], strict=True))
    )


def _param_lists(groups: object) -> list[Sequence[Any]]:
    """Raises ``RuntimeError`` if these are no param groups."""
    if not isinstance(groups, list):
        raise RuntimeError("param_groups must be a list")
    lists: list[Sequence[Any]] = []
    for g, group in enumerate(groups):
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, (list, tuple)):
            raise RuntimeError(f"param group {g} has no list of params")
        lists.append(params)
    return lists


def _contents(
    lists: Sequence[Sequence[Any]], state: dict[Tensor, Any]
) -> tuple[list[int], list[int], list[Any]]:
    """How long the lists of params and the dicts of state are, which objects are in them, and the
    values in the dicts."""
    entries = [entry for entry in state.values() if isinstance(entry, dict)]
    lengths = [len(lists), *map(len, lists), len(state), *map(len, entries)]
    items = list(chain.from_iterable(map(dict.values, entries)))
    names = chain(*entries)
    objects = chain([state], *lists, state, state.values(), names, items)
    return lengths, list(map(id, objects)), items


class Snapshot:
    """The optimizer's lists and dicts by identity, in order; tensors by their place as well, since
    ``t.data = other`` keeps the object and changes the memory. Keeps no state alive.

    Raises:
        RuntimeError: these are no optimizer's groups and state, or a param has no address.
    """

    def __init__(
        self, groups: list[Group], state: dict[Tensor, Any], served: Sequence[bool]
    ) -> None:
        if not isinstance(state, dict):
            raise RuntimeError("state must be a dict")
        lists = _param_lists(groups)
        self._lengths, self._objects, items = _contents(lists, state)
        self.params: list[Tensor] = list(chain(*lists))
        if len(self.params) != len(served):
            count = "fewer" if len(served) < len(self.params) else "more"
            raise RuntimeError(f"{count} row kinds than params")
        self._served = list(compress(self.params, served))
        for row, param in enumerate(self.params):
            if served[row] and not _has_place(param):
                raise RuntimeError(f"param {row} in all is not a strided tensor")
        self._placed = list(map(_has_place, items))
        # Another object may come to lie where one was, and have its identity then.
        self._items = [weakref.ref(item) for item in compress(items, self._placed)]
        self._places = _placed([*self._served, *compress(items, self._placed)])
        self._rows = list(compress(range(len(served)), served))

    def places_of_params(self) -> list[dict[int, Any]]:
        """The columns, each by row; without the rows that are not served."""
        return [dict(zip(self._rows, column, strict=False)) for column in self._places]

    def current_items(self, groups: list[Group], state: dict[Tensor, Any]) -> list[Any] | None:
        """The tensors in the dicts of state; ``None`` unless all is as it was."""
        try:
            lengths, objects, values = _contents(_param_lists(groups), state)
            if lengths != self._lengths or objects != self._objects:
                return None
            items = list(compress(values, self._placed))
            if any(ref() is not item for ref, item in zip(self._items, items, strict=True)):
                return None
            places = _placed([*self._served, *items])
        except Exception:  # of any kind: no groups any more, or a tensor without an address
            return None
        return items if _same_places(places, self._places) else None


class PythonWatch:
    """See ``Watch`` in csrc/watch/watch.h.

    Args:
        groups: ``optimizer.param_groups``.
        state: ``optimizer.state``.
        kinds: one RowKind a row, rows being the params of all groups in order.
    """

    def __init__(self, groups: list[Group], state: dict[Tensor, Any], kinds: Sequence[int]) -> None:
        self._snapshot = Snapshot(groups, state, [kind != FROZEN for kind in kinds])
        self._params = self._snapshot.params
        self._addresses, _, *self._layouts = self._snapshot.places_of_params()
        self._unready = [row for row, kind in enumerate(kinds) if kind in (AWAITS_STATE, FROZEN)]
        self._staged = {row for row, kind in enumerate(kinds) if kind == STAGED}
        self._single = {row for row, shape in self._layouts[1].items() if shape.numel() == 1}
        self._maybe_negated = [self._params[row] for row in self._single - self._staged]
        self._records = struct.Struct("=" + GRAD.format.lstrip("=") * len(kinds))

    def refresh(self, groups: list[Group], state: dict[Tensor, Any], address: int) -> Look | None:
        """Fill in the Grad records at ``address``, those of odd rows as absent.

        Returns:
            Rows whose gradient the kernels cannot read as it lies, rows that have none, and what
            the step has to hold; ``None`` when the plan no longer describes the optimizer.
        """
        items = self._snapshot.current_items(groups, state)
        if items is None:
            return None
        try:
            grads = list(map(_GRAD, self._params))
        except Exception:  # of any kind: a subclass has its own idea of .grad
            return None
        if any(grads[row] is not None for row in self._unready):
            return None
        if any(param.is_neg() for param in self._maybe_negated):
            return None
        found = self._read(grads)
        records = self._records.pack(*chain.from_iterable(found))
        ctypes.memmove(address, records, len(records))
        unread = [row for row, fields in enumerate(found) if fields is _ABSENT]
        odd = [row for row in unread if grads[row] is not None]
        return odd, [row for row in unread if grads[row] is None], grads + items

    def _read(self, grads: Sequence[Any]) -> list[tuple[int, int, int]]:
        """The fields of each row's record."""
        found = [_ABSENT] * len(grads)
        rows, (addresses, dtypes, *layouts) = _plain_rows(grads)
        expected = [[column[row] for row in rows] for column in self._layouts]
        if layouts != expected:
            pairs = zip(zip(*layouts, strict=True), zip(*expected, strict=True), strict=True)
            alike = [_same_layout(layout, wanted) for layout, wanted in pairs]
        else:
            alike = [True] * len(rows)
        for row, address, dtype, same in zip(rows, addresses, dtypes, alike, strict=True):
            if not same or dtype not in DTYPE_CODES or row in self._staged:
                continue
            # A lazily negated view has a stride of two: only a single element can look dense.
            if row in self._single and grads[row].is_neg():
                continue
            if address == 0 and self._addresses[row] != 0:
                continue  # zeros that were never allocated
            found[row] = (address, DTYPE_CODES[dtype], 1)
        return found


def _plain_rows(grads: Sequence[Any]) -> tuple[list[int], list[list[Any]]]:
    """Rows with a gradient of torch's own type and in strided memory, and its columns."""
    rows = [row for row, grad in enumerate(grads) if type(grad) in _PLAIN]
    try:
        return rows, _placed([grads[row] for row in rows])
    except Exception:
        rows = [row for row in rows if _has_place(grads[row])]
        return rows, _placed([grads[row] for row in rows])
