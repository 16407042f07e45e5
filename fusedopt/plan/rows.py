"""From parameters to plan rows: what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..rules.declaration import Group
from .groups import is_plain_dict
from .memory import is_dense, overlaps_itself
from .plan import Row, check_grad, is_of_inference
from .state import (
    MASTER,
    STEP,
    ParamState,
    check_state,
    complete_all,
    dense_like,
    is_complete,
    is_readable,
    wants_master,
)

PARAM_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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


_NO_NAMES: Mapping[Tensor, str | None] = MappingProxyType({})


def label_of(
    group: Group,
    group_index: int,
    param_index: int,
    names_given: Mapping[Tensor, str | None] = _NO_NAMES,
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
        groups: ``optimizer.param_groups``.
        state: ``optimizer.state``.
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
    """Create the state that is missing, and refer to it.

    Args:
        rows: of ``checked_rows``.
        state: ``optimizer.state``.
        names: state names the rule wants, for each group.
        master_weights: as given by the user.
        every_param: create state for every parameter that requires grad, not only for those that
            have a gradient now.

    Returns:
        What is new in ``state``.

    Raises:
        RuntimeError: there is not enough memory; nothing has been changed.
    """
    served = [row for row in rows if row.served]
    new = _missing_state(served, state, names, master_weights, every_param)
    state.update(new)
    for row in served:
        if not is_readable(row.param):
            row.dense = dense_like(row.param)
        own = state.get(row.param, {})
        master = wants_master(row.param, master_weights)
        if not is_complete(row.param, own, names[row.group], master):
            row.awaits_state = True
            continue
        states = [own[name] for name in names[row.group]]
        row.set_state(states, own[MASTER] if master else None, own[STEP] if states else None)
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


def _check_disjoint(rows: Sequence[Row]) -> None:
    """Two rows on the same memory would be updated by two threads at once."""
    spans = sorted(
        (_Span(row) for row in rows if row.param.numel() > 0),
        key=lambda span: (str(span.row.param.device), span.start),
    )
    cluster: list[_Span] = []  # neighbours whose extents overlap, each with some one before it
    for span in spans:
        if cluster and span.reaches_into(cluster):
            cluster.append(span)
        else:
            _check_cluster(cluster)
            cluster = [span]
    _check_cluster(cluster)


class _Span:
    """The bytes from a parameter's first element to its last, gaps included."""

    def __init__(self, row: Row) -> None:
        param = row.param
        extents = zip(param.shape, param.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in extents)
        self.row = row
        self.start = param.data_ptr()
        self.end = self.start + (last + 1) * param.element_size()

    def reaches_into(self, cluster: Sequence[_Span]) -> bool:
        same_device = self.row.param.device == cluster[0].row.param.device
        return same_device and self.start < max(span.end for span in cluster)


def _check_cluster(cluster: Sequence[_Span]) -> None:
    """Extents may overlap where elements do not (the columns of one matrix): look at each byte."""
    for one, next_one in pairwise(cluster):
        if next_one.start < one.end and is_dense(one.row.param) and is_dense(next_one.row.param):
            raise _shared(one.row, next_one.row)
    if len(cluster) < 2:
        return
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


def _missing_state(
    rows: Sequence[Row],
    state: dict[Tensor, ParamState],
    names: Sequence[tuple[str, ...]],
    master_weights: bool | None,
    every_param: bool,
) -> dict[Tensor, ParamState]:
    due = []
    for row in rows:
        wanted = row.param.grad is not None or (every_param and row.param.requires_grad)
        master = wants_master(row.param, master_weights)
        own = state.get(row.param, {})
        if wanted and not is_complete(row.param, own, names[row.group], master):
            due.append(row)
    complete = complete_all(
        [row.param for row in due],
        [state.get(row.param, {}) for row in due],
        [names[row.group] for row in due],
        master_weights,
    )
    return {row.param: own for row, own in zip(due, complete, strict=True)}
