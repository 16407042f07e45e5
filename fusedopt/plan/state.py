"""Optimizer state of one parameter: its contents, and how it is made and checked.

Names and meaning are torch's (``step`` and those that the rule declares) plus
``master_param``, the fp32 copy of an fp16/bf16 parameter. Whatever the parameter's dtype, state is
fp32 (fp64 for an fp64 parameter) unless the user asks for less, and laid out in memory like the
parameter. Codes and remainders have names of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from ..codecs import (
    DITHERED,
    EMPTY_SCALE,
    FLOAT32,
    FLOAT64,
    LOG8,
    LOG8_POSITIVE,
    REMAINDER8,
    REMAINDER16,
    SCALE,
    Codec,
    decode,
    decode_each,
    encode,
    gather,
    n_scales,
    remainder_of,
    spread,
)
from ..options import Options, number
from ..rules.declaration import NOT_BESIDE, OF_SOME_RULE, POSITIVE, STARTS_LATER, UNCOUNTED
from .local import is_dtensor, local_of, part_for, same_sharding, wrapped
from .memory import is_dense, strides, unfilled_state
from .plan import CODEC_OF, HALF_DTYPES, Kept, Layout, Row

MASTER = "master_param"
STEP = "step"

ParamState = dict[str, Any]


def copy_without_gaps(local: Tensor) -> Tensor | None:
    """Room for a dense copy of ``local``, if the kernels cannot update it in place.

    They cannot if it has gaps or is a lazily negated view.
    """
    if is_dense(local) and not local.is_neg():
        return None
    return torch.empty(local.shape, dtype=local.dtype, device=local.device)


def dense_like(param: Tensor) -> Tensor:
    """A tensor laid out as the kernels see this rank's part of ``param``."""
    local = local_of(param)
    copy = copy_without_gaps(local)
    return local if copy is None else copy


class Stream(NamedTuple):
    """A tensor of a parameter's state, and how its numbers are stored."""

    of: str  # a state of the rule, or MASTER
    codec: Codec

    @property
    def name(self) -> str:
        """Of the tensor. Codes have names of their own, so that nobody takes them for the state."""
        return self.of.removesuffix("_param" if self.codec.suffix else "") + self.codec.suffix

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.name + SCALE) if self.codec.scaled else (self.name,)


class Streams(NamedTuple):
    """Of one parameter."""

    param: Codec
    master: Codec | None
    states: tuple[Stream, ...]

    @property
    def all(self) -> tuple[Stream, ...]:
        return self.states if self.master is None else (*self.states, Stream(MASTER, self.master))

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """In the order of the kernels."""
        return (self.param, self.master or FLOAT32, *(stream.codec for stream in self.states))

    @property
    def counts(self) -> bool:
        """Whether there is a step count: rules with state use it, and every dither."""
        return bool(self.states) or any(codec.dithers for codec in self.codecs)


def streams_of(param: Tensor, kept: Kept, options: Options) -> Streams:
    """How ``param`` and its state are stored."""
    if param.dtype == torch.float64:
        return Streams(FLOAT64, None, tuple(Stream(name, FLOAT64) for name in kept.names))
    # Also of a dtype that no backend can update; the step refuses that.
    own, master = CODEC_OF.get(param.dtype, FLOAT32), None
    if param.dtype in HALF_DTYPES:
        wish = options.master_weights
        own = DITHERED if wish == "dither" else own
        master = None if wish in (False, "dither") else _MASTERS.get(wish, FLOAT32)
    is_small = param.numel() < options.min_8bit_size
    forms = (None if form == "8bit" and is_small else form for form in kept.forms)
    states = (
        Stream(name, _codec(name, form)) for name, form in zip(kept.names, forms, strict=True)
    )
    return Streams(own, master, tuple(states))


_MASTERS: dict[Any, Codec] = {"remainder": REMAINDER16, "remainder8": REMAINDER8}


def _codec(name: str, form: str | None) -> Codec:
    if form == "8bit":
        return LOG8_POSITIVE if name in POSITIVE else LOG8
    return DITHERED if form == "bf16" else FLOAT32


# Every way to store a master, and every way to store a state.
_OF_MASTERS = (FLOAT32, REMAINDER16, REMAINDER8)
_BETWEEN_RANKS = (REMAINDER16, torch.int32)  # see for_other_ranks


def found_in(own: ParamState, name: str) -> Stream | None:
    """How ``own`` stores the state ``name``, or MASTER; ``None`` if it does not."""
    if name in own:
        value = own[name]
        is_bf16 = isinstance(value, Tensor) and value.dtype == torch.bfloat16
        return Stream(name, DITHERED if is_bf16 and name != MASTER else FLOAT32)
    for codec in _OF_MASTERS[1:] if name == MASTER else (_codec(name, "8bit"),):
        coded = Stream(name, codec)
        value = own.get(coded.name)
        dtype = getattr(value, "dtype", codec.dtype)
        if value is not None and (dtype == codec.dtype or (codec, dtype) == _BETWEEN_RANKS):
            return coded
    return None


def plain_codec(param: Tensor) -> Codec:
    """Of a state that is a number by itself."""
    return FLOAT64 if param.dtype == torch.float64 else FLOAT32


def names_of(name: str) -> frozenset[str]:
    """Names of all tensors in which the state ``name``, or MASTER, may be stored."""
    codecs = _OF_MASTERS if name == MASTER else (FLOAT32, _codec(name, "8bit"))
    return frozenset(each for codec in codecs for each in Stream(name, codec).names)


def is_complete(row: Row, state: ParamState, streams: Streams) -> bool:
    """Whether ``state`` can be used by the kernels as it is."""
    if streams.master is None and found_in(state, MASTER) is not None:
        return False
    if streams.counts and not is_step(state.get(STEP), row.param):
        return False
    return all(has(state, stream, row.param, row.dense) for stream in streams.all)


def has(own: ParamState, stream: Stream, param: Tensor, dense: Tensor) -> bool:
    """Whether ``own`` has the stream as the kernels need it, and in no other form."""
    if found_in(own, stream.of) not in (stream, None) and stream.codec is not FLOAT64:
        return False
    if not fits(own.get(stream.name), param, dense, stream.codec.dtype):
        return False
    return not stream.codec.scaled or are_scales(own.get(stream.name + SCALE), dense)


def are_scales(value: object, dense: Tensor) -> bool:
    """Whether these are the scales of the codes of ``dense``."""
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.uint8
        and value.device == dense.device
        and value.shape == (n_scales(dense.numel()),)
        and value.is_contiguous()
    )


def fits(value: object, param: Tensor, like: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``value`` is state of ``param`` as the kernels need it.

    Args:
        like: its dense part.
        dtype: the dtype it has to have.
    """
    if is_dtensor(param):
        if not is_dtensor(value) or not same_sharding(value, param):
            return False
        value = value._local_tensor  # type: ignore[attr-defined]
    return (
        isinstance(value, Tensor)
        and value.dtype == dtype
        and value.device == like.device
        and value.shape == like.shape
        and (value.stride() == like.stride() or strides(value) == strides(like))
        and not value.is_neg()
    )


def is_step(value: object, param: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.float32
        and value.dim() == 0
        and value.device == param.device
    )


def step_tensor(value: Any, param: Tensor) -> Tensor:
    """A 0-dim fp32 count on the parameter's device, from a number or a one-element tensor."""
    return torch.tensor(float(value), dtype=torch.float32, device=param.device)


def as_ours(state: ParamState, names: Sequence[str]) -> ParamState:
    """A copy of ``state`` in our form: entries of None are left out, and ``step`` is added.

    torch's SGD keeps no count, but its buffer shows that the first step is past: ``step`` is 1.
    """
    known = {*names, MASTER, STEP, *UNCOUNTED}
    own = {name: value for name, value in state.items() if value is not None or name not in known}
    if not UNCOUNTED.isdisjoint(own):
        own.setdefault(STEP, 1)
    return own


def stored(own: ParamState, names: Sequence[str]) -> dict[str, Stream]:
    """What ``own`` has of the states of ``names`` and of the master, by the names of tensors."""
    streams = [found_in(own, name) for name in (*names, MASTER)]
    return {stream.name: stream for stream in streams if stream is not None}


def check_state(
    label: str,
    param: Tensor,
    state: ParamState,
    names: Sequence[str],
    anew: str,
    shaped: bool = True,
) -> None:
    """Raise unless each state of ``names`` exists, or none does and the parameter starts anew.

    Args:
        label: the parameter's name in messages.
        anew: the line of code that drops the parameter's state.
        shaped: False if the parameter's shape may still change.

    Raises:
        KeyError: some states are there and some are not, or only those of another rule.
        TypeError: a state is no plain tensor, or is of an integer or complex dtype.
        ValueError: ``step`` is no count.
        RuntimeError: a state has no memory, or another shape than the parameter.
    """
    own = as_ours(state, names)
    streams = stored(own, names)
    there = {stream.of for stream in streams.values()} | (own.keys() & {STEP})
    missing = [name for name in (*names, STEP) if name not in there and name not in STARTS_LATER]
    present = [name for name in state if name in own] if names and missing else []
    found = sorted((name for name in present if _tells(name, own[name], names)), key=str)
    if found:
        raise KeyError(
            f"{label}: its state has {_listed(found)} and lacks {_listed(missing)}; add what is "
            f"missing, or start it anew: `{anew}`"
        )
    strange = [name for name in NOT_BESIDE.get(tuple(names), ()) if name in own]
    if strange:
        raise KeyError(
            f"{label}: its state has {_listed(strange)}, which another optimizer keeps; start it "
            f"anew: `{anew}`"
        )
    for name in (*streams, STEP):
        value = own.get(name)
        if name != STEP and value is not None:
            _check_tensor(label, name, value, param, anew, streams[name].codec)
            if shaped and streams[name].codec.scaled:
                _check_scales(label, name, own, param, anew)
        if isinstance(value, Tensor) and _has_no_memory(local_of(value), local_of(param)):
            raise RuntimeError(f"{label}: state {name!r} has no memory; start it anew: `{anew}`")
        if shaped and name != STEP and value is not None and value.shape != param.shape:
            raise RuntimeError(
                f"{label}: state {name!r} has shape {tuple(value.shape)}, the parameter has "
                f"{tuple(param.shape)}; give it that shape, or start it anew: `{anew}`"
            )
    if names and STEP in own and not _is_count(own[STEP]):
        raise ValueError(
            f"{label}: state 'step' is {own[STEP]!r}, and has to be a number of steps, at least 0; "
            f"set it, or start it anew: `{anew}`"
        )


def _tells(name: str, value: object, names: Sequence[str]) -> bool:
    """Whether ``name`` is a state of this rule or of another, and not a user's own note."""
    if name in (*names, STEP) or name in OF_SOME_RULE:
        return True
    # torch's SGD starts its buffer beside any entries. A master alone tells no rule from another.
    notes = name == MASTER or not UNCOUNTED.isdisjoint(names)
    return not notes and any(isinstance(leaf, Tensor) for leaf in tree_iter(value))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _check_scales(label: str, name: str, own: ParamState, param: Tensor, anew: str) -> None:
    scales, codes = own.get(name + SCALE), own[name]
    n, of_all = n_scales(local_of(codes).numel()), n_scales(codes.numel())
    is_table = isinstance(scales, Tensor) and scales.dtype == torch.uint8
    if is_table and scales is not None and scales.shape in ((n,), (of_all,), param.shape):
        return
    found = (
        f"{scales.dtype} of shape {tuple(scales.shape)}" if isinstance(scales, Tensor) else scales
    )
    raise RuntimeError(
        f"{label}: state {name + SCALE!r} is {found}, and the codes of {param.numel()} elements "
        f"have {n} scales of torch.uint8; restore it, or start it anew: `{anew}`"
    )


def _check_tensor(
    label: str, name: str, value: object, param: Tensor, anew: str, codec: Codec
) -> None:
    if is_dtensor(value):
        sharded: Any = value
        if not is_dtensor(param) or sharded.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
            place = f"{anew.removeprefix('del ')}[{name!r}]"
            raise TypeError(
                f"{label}: state {name!r} lies on {sharded.device_mesh}, and the parameter does "
                f"not; make it whole, on all ranks: `{place} = {place}.full_tensor()`, or start it "
                f"anew: `{anew}`"
            )
        value = local_of(value)
    kind, wrapped = f"a {type(value).__name__}", is_traceable_wrapper_subclass(value)
    if isinstance(value, Tensor) and not wrapped and value.layout == torch.strided:
        if value.is_floating_point() or value.dtype == codec.dtype or codec is REMAINDER16:
            return
        kind = f"of dtype {value.dtype}"
    raise TypeError(
        f"{label}: state {name!r} is {kind}, not a plain tensor of floating-point numbers; "
        f"convert it, or start it anew: `{anew}`"
    )


def _has_no_memory(value: Tensor, param: Tensor) -> bool:
    if value.device.type == "meta":
        return param.device.type != "meta"
    return value.numel() > 0 and value.data_ptr() == 0


def _is_count(value: Any) -> bool:
    """Whether ``value`` is a step count. A count that kernels read on a GPU is not read back."""
    if isinstance(value, Tensor) and is_step(value, value) and not value.is_cpu:
        return True
    try:
        return 0.0 <= number(value) < math.inf
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: several elements
        return False


def complete_all(
    rows: Sequence[Row], state: dict[Tensor, ParamState], layout: Layout, options: Options
) -> dict[Tensor, ParamState]:
    """Copies of the rows' states: missing tensors are added, and unfit ones converted.

    A new master starts as its parameter, a new moment as zero. An existing value keeps its numbers,
    rounded to nearest where the new form has fewer. All memory is allocated before any of it is
    filled.

    Args:
        layout: what the rule wants, for each group.
    """
    wanted = [streams_of(row.param, layout[row.group], options) for row in rows]
    complete = {
        row.param: as_ours(state.get(row.param, {}), layout[row.group].names) for row in rows
    }
    missing: list[Missing] = []
    for row, streams in zip(rows, wanted, strict=True):
        own = complete[row.param]
        if streams.master is None:
            for name in names_of(MASTER):
                own.pop(name, None)  # of a time when the parameter was half: stale by now
        missing += [
            Missing(own, stream, row.param, row.dense)
            for stream in streams.all
            if not has(own, stream, row.param, row.dense)
        ]
    fill_in(missing)
    for row, streams in zip(rows, wanted, strict=True):
        own = complete[row.param]
        if (streams.counts or STEP in own) and not is_step(own.get(STEP), row.param):
            own[STEP] = step_tensor(own.get(STEP, 0), row.param)
    return complete


class Missing(NamedTuple):
    """A stream that ``own`` lacks, or has in another form."""

    own: ParamState
    stream: Stream
    param: Tensor
    dense: Tensor  # the param as the kernels see it


def fill_in(missing: Sequence[Missing]) -> None:
    """Allocate what is missing, fill it, and only then put it in its place."""
    scales = [
        _new_scales(dense) if stream.codec.scaled else None for _, stream, _, dense in missing
    ]
    with unfilled_state([(each.dense, each.stream.codec.dtype) for each in missing]) as tensors:
        for each, data, own_scales in zip(missing, tensors, scales, strict=True):
            _fill(each, data, own_scales)
    for (own, stream, param, _), data, own_scales in zip(missing, tensors, scales, strict=True):
        for name in names_of(stream.of).difference(stream.names):
            own.pop(name, None)
        own[stream.name] = wrapped(data, param)
        if own_scales is not None:
            own[stream.name + SCALE] = own_scales


def _new_scales(dense: Tensor) -> Tensor:
    n = n_scales(dense.numel())
    return torch.full((n,), EMPTY_SCALE, dtype=torch.uint8, device=dense.device)


def _fill(missing: Missing, data: Tensor, scales: Tensor | None) -> None:
    """One at a time: a part of what is there may be a copy."""
    own, stream, param, dense = missing
    there = found_in(own, stream.of)
    if there is None:
        if stream == (MASTER, FLOAT32):
            data.copy_(local_of(param.detach()))
        else:
            data.zero_()
        return
    part = part_for(param, own[there.name])
    mine = _own_scales(own, there, param, part, dense)
    if there.codec is stream.codec:
        if mine is not None and scales is not None:
            gather(stream.codec, like(part, dense), like(mine, dense), data, scales)
            return
        data.copy_(part)
        if scales is not None:
            scales.copy_(own[there.name + SCALE])
        return
    if stream.codec in (FLOAT32, FLOAT64) and not there.codec.suffix:
        data.copy_(part)
        return
    half = local_of(param.detach())
    if mine is not None:
        part = decode_each(there.codec, like(part, dense), like(mine, dense))
    elif there.codec.suffix:
        scales_there = own.get(there.name + SCALE)
        part = decode(there.codec, like(part, dense), scales_there, like(half, dense))
    else:
        part = like(part, dense).float()
    if stream.of == MASTER and stream.codec is not FLOAT32:
        remainder_of(stream.codec, part, like(half, dense), data)
    elif stream.codec is FLOAT32:
        data.copy_(part)
    else:
        known = own.get(stream.name + SCALE)
        if not isinstance(known, Tensor) or known.numel() != n_scales(dense.numel()):
            known = None
        encode(stream.codec, part, data, scales, known=known)


def _own_scales(
    own: ParamState, there: Stream, param: Tensor, part: Tensor, dense: Tensor
) -> Tensor | None:
    """The scale of each element of ``part``, this rank's codes; ``None`` where the blocks of
    ``part`` are those of ``dense``, or there are no scales."""
    if not there.codec.scaled:
        return None
    each: Any = each_scale(own, there)
    if each is None:
        same = strides(part) == strides(dense)  # blocks are runs of memory
        return None if same else spread(own[there.name + SCALE], part)
    if each.shape != param.shape:
        # torch cuts the scales of a whole tensor as it cuts the codes.
        whole = torch.empty(param.shape, dtype=torch.uint8, device=dense.device)
        each = spread(each.full_tensor(), whole)
    return part_for(param, each)


def each_scale(own: ParamState, stream: Stream) -> Tensor | None:
    """The scale of each element, if ``own`` has those; ``None`` where there is one for a block."""
    if not stream.codec.scaled:
        return None
    codes, scales = own[stream.name], own[stream.name + SCALE]
    if is_dtensor(scales) or (
        scales.shape == codes.shape and scales.shape != (n_scales(codes.numel()),)
    ):
        each: Tensor = scales
        return each
    return None


def cut_anywhere(own: ParamState, param: Tensor) -> ParamState:
    """Of the state of a whole tensor, for a DTensor to take its part: a scale for each element."""
    spreads = {}
    for name, scales in own.items():
        of_blocks = isinstance(scales, Tensor) and scales.shape == (n_scales(param.numel()),)
        if of_blocks and str(name).endswith(SCALE) and not is_dtensor(scales) and is_dtensor(param):
            whole = torch.empty(param.shape, dtype=torch.uint8, device=scales.device)
            spreads[name] = spread(scales, whole)
    return {**own, **spreads}


def for_other_ranks(own: ParamState, param: Tensor) -> ParamState:
    """A copy of the state of ``param``, a DTensor, of which other ranks can take any part.

    Codes get the scale of each element. Collectives know no int16, so such remainders are int32.
    """
    saved = dict(own)
    for name, value in own.items():
        if not is_dtensor(value):
            continue
        scales = own.get(f"{name}{SCALE}")
        if value.dtype == torch.uint8 and isinstance(scales, Tensor) and not is_dtensor(scales):
            saved[f"{name}{SCALE}"] = wrapped(spread(scales, local_of(value)), param)
        elif value.dtype == torch.int16:
            saved[name] = wrapped(local_of(value).int(), param)
    return saved


def like(tensor: Tensor, dense: Tensor) -> Tensor:
    """``tensor`` on the device of ``dense``, and laid out in memory like it."""
    if tensor.device == dense.device and strides(tensor) == strides(dense):
        return tensor
    return torch.empty_like(dense, dtype=tensor.dtype).copy_(tensor)
