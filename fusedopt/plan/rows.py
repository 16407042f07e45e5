"""Make plan rows of parameters: refuse those that cannot be used, and create missing state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..codecs import DITHERED, REMAINDER8, SCALE
from ..options import Options
from ..rules.declaration import Group
from .checks import check_grad, check_memory, check_param, is_of_inference
from .groups import is_plain_dict
from .local import first_element
from .memory import extent, is_dense
from .plan import Kept, Layout, Row
from .state import (
    MASTER,
    STEP,
    ParamState,
    Streams,
    check_state,
    complete_all,
    copy_without_gaps,
    is_complete,
    names_of,
    streams_of,
)


def label_of(group: Group, g: int, i: int, names_given: Mapping[Tensor, str | None]) -> str:
    """The name of parameter i of group g in messages; ``names_given`` precede the group's own."""
    names = group.get("param_names") or ()
    name = names_given.get(group["params"][i], names[i] if i < len(names) else None)
    text = f"param {i} of group {g}"
    return text if name is None else f"{text} ({name!r})"


def checked_rows(
    groups: Sequence[Group],
    state: dict[Tensor, ParamState],
    layout: Layout,
    names_given: Mapping[Tensor, str | None],
) -> list[Row]:
    """Rows of all params in order, as far as they can be used; nothing is created yet.

    Args:
        layout: the states that the rule wants, for each group.
        names_given: names for messages, where a checkpoint has replaced the groups' own.

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
        _check_row(row, own, layout[row.group].names)
        if row.param.grad is not None and not inference:
            _check_writable(row, own, layout[row.group].names)
    _check_disjoint(served)
    return rows


def complete_rows(
    rows: Sequence[Row],
    state: dict[Tensor, ParamState],
    layout: Layout,
    options: Options,
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
        row.copy = copy_without_gaps(row.local)
        own, streams = state.get(row.param, {}), streams_of(row.param, layout[row.group], options)
        _check_kept(row, layout[row.group], streams)
        if not is_complete(row, own, streams):
            wanted = row.param.grad is not None or (every_param and row.param.requires_grad)
            row.awaits_state = not wanted
            if wanted:
                due.append(row)
    new = complete_all(due, state, layout, options)
    state.update(new)
    for row in served:
        if not row.awaits_state:
            own, streams = (
                state.get(row.param, {}),
                streams_of(row.param, layout[row.group], options),
            )
            tensors = {stream.of: own[stream.name] for stream in streams.all}
            master = tensors.pop(MASTER, None)
            scales = [own[s.name + SCALE] if s.codec.scaled else None for s in streams.states]
            step = own[STEP] if streams.counts else None
            row.set_state([*tensors.values()], master, step, scales, streams.codecs)
            if any(codec.dithers for codec in streams.codecs):
                row.first = first_element(row.param)
    return new


def _check_kept(row: Row, kept: Kept, streams: Streams) -> None:
    """Refuse forms that the parameter, as it is now, cannot have."""
    dtype, scaled = row.param.dtype, any(codec.scaled for codec in streams.codecs)
    if scaled and getattr(row.param, "_fsdp_flattened", False):
        # FSDP1 cuts every state as it cuts the flat parameter, and scales are no such state.
        raise RuntimeError(
            f"{row.label}: state_dtype='8bit' is not supported for parameters of FSDP1, which "
            "could not save the scales; use FSDP2, or 16 bits: `optimizer.state_dtype = 'bf16'`"
        )
    if dtype == torch.float16 and (streams.master is REMAINDER8 or streams.param is DITHERED):
        raise RuntimeError(
            f"{row.label} is fp16, and its master_weights are a form for bf16 alone; use 16 bits "
            "beside it: `optimizer.master_weights = 'remainder'`"
        )
    if dtype == torch.float64 and any(form is not None for form in kept.forms):
        raise RuntimeError(
            f"{row.label} is float64, which keeps its state in float64; say so: "
            f"`optimizer.param_groups[{row.group}]['state_dtype'] = None`"
        )


def _check_row(row: Row, own: ParamState, names: tuple[str, ...]) -> None:
    param, anew = row.param, "del optimizer.state[param]"
    if not is_plain_dict(own):
        convert = "optimizer.state[param] = dict(optimizer.state[param])"
        raise RuntimeError(
            f"{row.label}: its state is a {type(own).__name__}, not a dict with a dict's own "
            f"access; use `{convert if isinstance(own, Mapping) else anew}`"
        )
    try:
        check_param(row.label, param)
        check_memory(row.label, param)
        if param.grad is not None:
            check_grad(row.label, param, param.grad)
        check_state(row.label, param, own, names, anew)
    except (KeyError, TypeError, ValueError) as error:  # p.data was replaced, or state edited
        raise RuntimeError(error.args[0]) from error


def _check_writable(row: Row, own: ParamState, names: tuple[str, ...]) -> None:
    if is_of_inference(row.param):
        raise RuntimeError(
            f"{row.label} was made in inference mode and cannot be updated outside of it; call "
            "step() in inference mode, or put another in its place: "
            "`param = torch.nn.Parameter(param.detach().clone())`"
        )
    for name in (*chain.from_iterable(names_of(n) for n in (*names, MASTER)), STEP):
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
        param = row.local
        if param.numel() > 0:
            start, n_bytes = param.data_ptr(), extent(param) * param.element_size()
            spans.append(_Span(str(param.device), start, start + n_bytes, row))
    spans.sort(key=lambda span: (span.device, span.start))
    cluster: list[_Span] = []  # neighbours whose extents overlap
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
        if other.start < one.end and is_dense(one.row.local) and is_dense(other.row.local):
            raise _shared(one.row, other.row)
    start = cluster[0].start
    n_bytes = max(span.end for span in cluster) - start
    owner = torch.zeros(n_bytes, dtype=torch.int32, device="cpu")
    for number, span in enumerate(cluster, 1):
        param = span.row.local
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
