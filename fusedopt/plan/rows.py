"""From parameters to plan rows: what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..rules.declaration import Group
from .groups import is_plain_dict
from .memory import extent, is_dense, overlaps_itself
from .plan import GRAD_DTYPES, Row, check_grad, is_of_inference
from .state import (
    MASTER,
    STEP,
    ParamState,
    check_state,
    complete_all,
    dense_like,
    is_complete,
    is_readable,
)

PARAM_DTYPES = GRAD_DTYPES


def check_param(label: str, param: Tensor) -> None:
    """Raise ``TypeError`` for a parameter no backend can update."""
    wrapper: object = param  # mypy takes the guard below for impossible
    if param.is_nested:
        raise TypeError(
            f"{label}: nested parameters are not supported; pad it: `param = torch.nn.Parameter("
            "torch.nested.to_padded_tensor(param.detach(), 0.0))`"
        )
    if is_traceable_wrapper_subclass(wrapper):
        raise TypeError(
            f"{label}: {type(wrapper).__name__} is not supported, its memory is not its values; "
            "freeze it (`param.requires_grad_(False).grad = None`), or give it to another "
            "optimizer (`optimizer = torch.optim.AdamW([param])`)"
        )
    if param.layout != torch.strided:
        raise TypeError(
            f"{label}: sparse parameters (layout {param.layout}) are not supported; "
            "use a dense one: `param = torch.nn.Parameter(param.detach().to_dense())`"
        )
    if param.is_complex():
        raise TypeError(
            f"{label}: complex parameters ({param.dtype}) are not supported; "
            "keep it as real numbers, `param = torch.nn.Parameter(torch.view_as_real("
            "param.detach()))`, and use torch.view_as_complex(param) in forward()"
        )
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(
            f"{label}: parameter dtype {param.dtype} is not supported; use float32, float16, "
            "bfloat16 or float64: `param.data = param.data.float()`"
        )


def label_of(
    group: Group,
    group_index: int,
    param_index: int,
    names_given: Mapping[Tensor, str | None] = MappingProxyType({}),
) -> str:
    """What messages call a parameter; ``names_given`` go before the names in its group."""
    names = group.get("param_names") or ()
    in_group = names[param_index] if param_index < len(names) else None
    name = names_given.get(group["params"][param_index], in_group)
    text = f"param {param_index} of group {group_index}"
    return text if name is None else f"{text} ({name!r})"


def checked_rows(
    groups: Sequence[Group],
    state: dict[Tensor, ParamState],
    names: Sequence[tuple[str, ...]],
    names_given: Mapping[Tensor, str | None],
) -> list[Row]:
    """Rows of all params in order, as far as they can be used; nothing is created yet.

    Args:
        names: state names the rule wants, for each group.
        names_given: what messages call the parameters, where the groups' names are not theirs.

    Raises:
        RuntimeError: some parameter, gradient or state cannot be used.
    """
    rows = [
        Row(p, label_of(group, g, i, names_given), g)
        for g, group in enumerate(groups)
        for i, p in enumerate(group["params"])
    ]
    served = [row for row in rows if row.served]
    inference = torch.is_inference_mode_enabled()
    for row in served:
        own = state.get(row.param, {})
        _check_dict(row.label, own)
        _check_row(row, own, names[row.group])
        if row.param.grad is not None and not inference:
            _check_writable(row, own, names[row.group])
    _check_disjoint(served)
    return rows


def complete_rows(
    rows: Sequence[Row],
    state: dict[Tensor, ParamState],
    names: Sequence[tuple[str, ...]],
    master_weights: bool | None,
    every_param: bool,
) -> dict[Tensor, ParamState]:
    """Create the state that is missing, and let the rows refer to all of it.

    Args:
        rows: of ``checked_rows``.
        every_param: create state for every parameter that requires grad, not only for those that
            have a gradient now.

    Returns:
        What is new in ``state``.

    Raises:
        RuntimeError: there is not enough memory; nothing has been changed.
    """
    served = [row for row in rows if row.served]
    due = []
    for row in served:
        wanted = row.param.grad is not None or (every_param and row.param.requires_grad)
        own = state.get(row.param, {})
        if wanted and not is_complete(row.param, own, names[row.group], master_weights):
            due.append((row.param, own, names[row.group]))
    new = complete_all(due, master_weights)
    state.update(new)
    for row in served:
        if not is_readable(row.param):
            row.dense = dense_like(row.param)
        own = state.get(row.param, {})
        if is_complete(row.param, own, names[row.group], master_weights):
            states = [own[name] for name in names[row.group]]
            row.set_state(states, own.get(MASTER), own[STEP] if states else None)
        else:
            row.awaits_state = True
    return new


def _check_dict(label: str, own: ParamState) -> None:
    if not is_plain_dict(own):
        anew = "del optimizer.state[param]"
        convert = "optimizer.state[param] = dict(optimizer.state[param])"
        raise RuntimeError(
            f"{label}: its state is a {type(own).__name__}, not a dict with a dict's own access; "
            f"use `{convert if isinstance(own, Mapping) else anew}`"
        )


def _check_row(row: Row, own: ParamState, names: tuple[str, ...]) -> None:
    param = row.param
    try:
        check_param(row.label, param)
    except TypeError as error:  # p.data was replaced after construction
        raise RuntimeError(str(error)) from error
    if is_lazy(param):
        raise RuntimeError(
            f"{row.label} is not initialized; run a forward pass through the lazy module first: "
            "`model(inputs)`"
        )
    if isinstance(param, FakeTensor):
        raise RuntimeError(
            f"{row.label} is a FakeTensor, which has no memory; make model and optimizer outside "
            "of the FakeTensorMode"
        )
    if param.device.type == "meta":
        raise RuntimeError(
            f"{row.label} is on the meta device; materialize the model before you make the "
            "optimizer: `model.to_empty(device='cpu')`, and load its weights"
        )
    if param.numel() > 0 and param.data_ptr() == 0:
        raise RuntimeError(
            f"{row.label} has no memory (a zero tensor without storage, or a storage that was "
            "resized to nothing); give it values before step(): `param.data = values`"
        )
    if overlaps_itself(param):
        raise RuntimeError(
            f"{row.label}: elements share memory (shape {tuple(param.shape)}, strides "
            f"{param.stride()}); give it memory of its own: `param.data = param.detach().clone()`"
        )
    if param.grad is not None:
        check_grad(row.label, param, param.grad)
    try:
        check_state(row.label, param, own, names, "del optimizer.state[param]")
    except (KeyError, TypeError, ValueError) as error:  # optimizer.state was edited
        raise RuntimeError(error.args[0]) from error


def _check_writable(row: Row, own: ParamState, names: tuple[str, ...]) -> None:
    if is_of_inference(row.param):
        raise RuntimeError(
            f"{row.label} was made in inference mode and cannot be updated outside of it; call "
            "step() in inference mode, or put another in its place: "
            "`param = torch.nn.Parameter(param.detach().clone())`"
        )
    for name in (*names, MASTER, STEP):
        value = own.get(name)
        if isinstance(value, Tensor) and is_of_inference(value):
            raise RuntimeError(
                f"{row.label}: state {name!r} was made in inference mode and cannot be updated "
                f"outside of it: `optimizer.state[param][{name!r}] = "
                f"optimizer.state[param][{name!r}].clone()`"
            )


class _Span(NamedTuple):
    """The bytes from a parameter's first element to its last, gaps included."""

    device: str
    start: int
    end: int
    row: Row


def _check_disjoint(rows: Sequence[Row]) -> None:
    """Two rows on the same memory would be updated by two threads at once."""
    spans = []
    for row in rows:
        param = row.param
        if param.numel() > 0:
            start, n_bytes = param.data_ptr(), extent(param) * param.element_size()
            spans.append(_Span(str(param.device), start, start + n_bytes, row))
    spans.sort(key=lambda span: (span.device, span.start))
    cluster: list[_Span] = []  # neighbours that each begin before one of the others ends
    end = ("", 0)
    for span in spans:
        if (span.device, span.start) >= end:
            _check_cluster(cluster)
            cluster = []
        cluster.append(span)
        end = max(end, (span.device, span.end))
    _check_cluster(cluster)


def _check_cluster(cluster: Sequence[_Span]) -> None:
    """Extents may overlap where elements do not (the columns of one matrix): look at each byte."""
    if len(cluster) < 2:
        return
    for one, other in pairwise(cluster):
        if other.start < one.end and is_dense(one.row.param) and is_dense(other.row.param):
            raise _shared(one.row, other.row)
    start = cluster[0].start
    n_bytes = max(span.end for span in cluster) - start
    owner = torch.zeros(n_bytes, dtype=torch.int32, device="cpu")
    for number, span in enumerate(cluster, 1):
        param = span.row.param
        n = param.element_size()
        strides = [stride * n for stride in param.stride()]
        own = owner.as_strided((*param.shape, n), (*strides, 1), span.start - start)
        if own.any():
            raise _shared(cluster[int(own.max()) - 1].row, span.row)
        own.fill_(number)


def _shared(first: Row, second: Row) -> RuntimeError:
    return RuntimeError(
        f"{first.label} and {second.label} share memory; list each parameter once, and tie weights "
        "by one Parameter object in both places: `second.weight = first.weight`"
    )
