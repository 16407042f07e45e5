"""How the elements of a stream lie in memory: csrc/codecs.h in plain torch.

The kernels convert in registers. These functions serve the reference backend, checkpoints of
another precision, and ``fusedopt.to_torch``. They give the kernels' bits, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BLOCK = 128  # elements that share a scale, in memory order
EMPTY_SCALE = 7  # of a block of zeros
_PIECE = 1 << 20  # elements that are converted at a time, a multiple of SCALE_BLOCK
_WORD = (1 << 32) - 1
_TO_NEAREST = 1 << 31  # in place of a dither


@dataclass(frozen=True)
class Codec:
    """A row of the table.

    Args:
        number: of ``enum class Codec``.
        name: of the number in the native modules.
        dtype: of the tensor that holds the elements.
        suffix: appended to a state's name where the tensor is no number by itself, so that nobody
            takes it for the state.
        dithers: rounds by the dither, not to nearest.
        scaled: has a scale for each block.
    """

    number: int
    name: str
    dtype: torch.dtype
    suffix: str = ""
    dithers: bool = False
    scaled: bool = False


FLOAT32 = Codec(0, "FLOAT32", torch.float32)
FLOAT16 = Codec(1, "FLOAT16", torch.float16)
BFLOAT16 = Codec(2, "BFLOAT16", torch.bfloat16)
DITHERED = Codec(3, "DITHERED", torch.bfloat16, dithers=True)
LOG8 = Codec(4, "LOG8", torch.uint8, "_log8", dithers=True, scaled=True)
LOG8_POSITIVE = Codec(5, "LOG8_POSITIVE", torch.uint8, "_log8", dithers=True, scaled=True)
REMAINDER16 = Codec(6, "REMAINDER16", torch.int16, "_remainder")
REMAINDER8 = Codec(7, "REMAINDER8", torch.int8, "_remainder", dithers=True)
FLOAT64 = Codec(-1, "", torch.float64)  # only of the reference backend
CODECS = (FLOAT32, FLOAT16, BFLOAT16, DITHERED, LOG8, LOG8_POSITIVE, REMAINDER16, REMAINDER8)
SCALE = "_scale"  # appended to the name of the codes


def n_scales(n: int) -> int:
    return -(-n // SCALE_BLOCK)


# ---- the dither ----------------------------------------------------------------------------------


def dither(n: int, device: torch.device, first: int, step: int, stream: int) -> Tensor:
    """The lattice of ``dither`` in csrc/codecs.h for ``n`` elements, as int64 below 2^32.

    Args:
        first: the place of the first element in the whole tensor.
        step: the number of the step that is being applied.
        stream: 0 for the param or its master, 1 + k for state k.
    """
    seed = step * 0x91E10DA5 + stream * 0x68E31DA5
    places = torch.arange(first, first + n, dtype=torch.int64, device=device) & _WORD
    high, low = (places >> 16) * 0xC13FA9A9, (places & 0xFFFF) * 0xC13FA9A9
    return (((high & 0xFFFF) << 16) + low + seed % (1 << 32)) & _WORD


# ---- conversions ---------------------------------------------------------------------------------


def flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor without gaps, in memory order; a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def decode(codec: Codec, data: Tensor, scales: Tensor | None, param: Tensor | None) -> Tensor:
    """The fp32 values of a stream, laid out like ``data``.

    Args:
        scales: uint8 [ceil(n / 128)], for a codec that has them.
        param: the fp16 or bf16 parameter beside a remainder.
    """
    out = torch.empty_like(data, dtype=torch.float32)
    values, codes = flat(out), flat(data)
    for at, end in _pieces(data.numel()):
        piece = codes[at:end]
        if codec.scaled:
            assert scales is not None
            own = scales[at // SCALE_BLOCK : n_scales(end)]
            values[at:end] = _of_log8(piece, own, codec is LOG8)
        elif codec in (REMAINDER16, REMAINDER8):
            assert param is not None
            values[at:end] = _joined(codec, flat(param)[at:end], piece)
        else:
            values[at:end] = piece
    return out


def encode(
    codec: Codec,
    values: Tensor,
    data: Tensor,
    scales: Tensor | None = None,
    param: Tensor | None = None,
    dither: Tensor | None = None,
    known: Tensor | None = None,
) -> None:
    """Write fp32 ``values`` to a stream; all tensors are laid out alike.

    Args:
        data: the elements, overwritten.
        scales: overwritten, for a codec that has them.
        param: overwritten, for a remainder.
        dither: None: round to nearest.
        known: scales that the blocks may have had before; used where they give ``values`` exactly.
    """
    x, codes = flat(values), flat(data)
    for at, end in _pieces(values.numel()):
        piece = x[at:end]
        t = (
            torch.full_like(piece, _TO_NEAREST, dtype=torch.int64)
            if dither is None
            else dither[at:end]
        )
        if codec.scaled:
            assert scales is not None
            blocks = slice(at // SCALE_BLOCK, n_scales(end))
            own = None if known is None else known[blocks]
            codes[at:end], scales[blocks] = _to_log8(piece, t, codec is LOG8, own)
        elif codec in (REMAINDER16, REMAINDER8):
            assert param is not None
            flat(param)[at:end], codes[at:end] = _split(codec, piece, param.dtype, t)
        elif codec is DITHERED:
            codes[at:end] = _dithered(piece, t)
        else:
            codes[at:end] = piece


def remainder_of(codec: Codec, master: Tensor, param: Tensor, data: Tensor) -> None:
    """Write the remainder of fp32 ``master`` beside ``param``, which stays as it is.

    Zero where ``param`` is not a rounding of ``master``: someone wrote to it, and its value counts.
    """
    for at, end in _pieces(master.numel()):
        x, p = flat(master)[at:end], flat(param)[at:end]
        if p.dtype == torch.float16:
            rest, most = ((x.double() - p.double()) / _unit(p.float())).round(), 1 << 14
        else:
            drops = 0 if codec is REMAINDER16 else 8
            bits, most = _bits(x), 0x8000 >> drops
            rest = ((bits + (0x80 if drops else 0)) >> drops) - (_bits(p) << (16 - drops))
            rest = torch.where(_is_nan(bits), 0, rest)
        kept = torch.where(rest.abs() <= most, rest, 0)  # NaN compares false
        limits = torch.iinfo(codec.dtype)
        flat(data)[at:end] = kept.clamp(limits.min, limits.max).to(codec.dtype)


def spread(scales: Tensor, codes: Tensor) -> Tensor:
    """The scale of each element, laid out like ``codes``. So a tensor can be cut anywhere."""
    out = torch.empty_like(codes)
    flat(out).copy_(scales.repeat_interleave(SCALE_BLOCK)[: codes.numel()])
    return out


def gather(codec: Codec, codes: Tensor, each: Tensor, data: Tensor, scales: Tensor) -> None:
    """Write codes whose elements have scales of their own, as ``spread`` gives them, to a stream.

    A block whose elements all had the same scale keeps its codes; another one is encoded again.
    """
    for at, end in _pieces(codes.numel()):
        piece, own = flat(codes)[at:end], flat(each)[at:end]
        blocks = slice(at // SCALE_BLOCK, n_scales(end))
        first = own[::SCALE_BLOCK]
        values = _of_log8_each(piece, own, codec is LOG8)
        nearest = torch.full_like(values, _TO_NEAREST, dtype=torch.int64)
        again, scales[blocks] = _to_log8(values, nearest, codec is LOG8)
        is_cut = _any(own != first.repeat_interleave(SCALE_BLOCK)[: own.numel()])
        scales[blocks] = torch.where(is_cut, scales[blocks], first)
        is_cut = is_cut.repeat_interleave(SCALE_BLOCK)[: own.numel()]
        flat(data)[at:end] = torch.where(is_cut, again, piece)


def decode_each(codec: Codec, codes: Tensor, each: Tensor) -> Tensor:
    """As ``decode``, of codes with a scale for each element."""
    out = torch.empty_like(codes, dtype=torch.float32)
    for at, end in _pieces(codes.numel()):
        flat(out)[at:end] = _of_log8_each(flat(codes)[at:end], flat(each)[at:end], codec is LOG8)
    return out


def _any(elements: Tensor) -> Tensor:
    """Whether any element of each block is true."""
    padded = torch.zeros(
        n_scales(elements.numel()) * SCALE_BLOCK, dtype=torch.bool, device=elements.device
    )
    padded[: elements.numel()] = elements
    return padded.view(-1, SCALE_BLOCK).any(dim=1)


def _pieces(n: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + _PIECE, n)) for at in range(0, n, _PIECE))


def _bits(x: Tensor) -> Tensor:
    """Of fp32 or 16-bit floats, as int64 that are not negative."""
    wide = x.element_size() == 4
    return x.contiguous().view(torch.int32 if wide else torch.int16).long() & (
        _WORD if wide else 0xFFFF
    )


def _float(bits: Tensor) -> Tensor:
    return _signed(bits, 32).int().view(torch.float32)


def _signed(x: Tensor, width: int) -> Tensor:
    """The low ``width`` bits as a signed number."""
    half = 1 << (width - 1)
    return ((x + half) & ((1 << width) - 1)) - half


def _half(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return _signed(bits, 16).short().view(dtype)


def _is_nan(bits: Tensor) -> Tensor:
    return (bits & 0x7FFFFFFF) > 0x7F800000


def _dithered(x: Tensor, t: Tensor) -> Tensor:
    """The bf16 of ``Dithered::narrowed``."""
    bits = _bits(x)
    rounded = (bits + (t >> 16)) >> 16
    down = bits >> 16
    finite = torch.where((rounded & 0x7FFF) == 0x7F80, down, rounded)
    return _half(torch.where(_is_nan(bits), down | 0x40, finite), torch.bfloat16)


def _cells(each: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """2^(e - 127) of each element, and the float whose bits stand for zero, in fp64."""
    offset = _float(torch.tensor(zero, device=each.device)).double()
    return torch.exp2(each.double() - 127.0), offset


def _of_log8(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    return _of_log8_each(codes, scales.repeat_interleave(SCALE_BLOCK)[: codes.numel()], signed)


def _of_log8_each(codes: Tensor, each: Tensor, signed: bool) -> Tensor:
    zero = (127 - 9 if signed else 127 - 20) << 23
    down, offset = _cells(each, zero)
    code = codes.long()
    cell = code & 0x7F if signed else code
    magnitude = _float(zero + (cell << 21) // 3).double() - offset
    x = (magnitude * down).float()  # exact up to the one rounding of a denormal
    if signed:
        return torch.where(code == 0x80, torch.nan, torch.where(code >= 0x80, -x, x))
    return torch.where(code == 0xFF, torch.inf, x)


def _to_log8(
    x: Tensor, t: Tensor, signed: bool, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales. Scales that follow from decoded values may be others than they had."""
    scales = _scales_of(x)
    codes = _codes_of(x, t, signed, scales)
    if known is not None:
        before = known.to(scales.device).round().clamp(EMPTY_SCALE, 253).to(scales.dtype)
        again = _codes_of(x, t, signed, before)
        differs = (_of_log8(again, before, signed) != x) & ~(x != x)
        fits = ~_any(differs)
        codes = torch.where(fits.repeat_interleave(SCALE_BLOCK)[: x.numel()], again, codes)
        scales = torch.where(fits, before, scales)
    return codes, scales


def _scales_of(x: Tensor) -> Tensor:
    magnitude = _bits(x) & 0x7FFFFFFF
    padded = torch.zeros(n_scales(x.numel()) * SCALE_BLOCK, dtype=torch.int64, device=x.device)
    padded[: x.numel()] = torch.where(magnitude >= 0x7F800000, 0, magnitude)
    largest = padded.view(-1, SCALE_BLOCK).amax(dim=1)
    return ((largest + 0xFFFFF) >> 23).clamp(EMPTY_SCALE, 253).to(torch.uint8)


def _codes_of(x: Tensor, t: Tensor, signed: bool, scales: Tensor) -> Tensor:
    zero, last = ((127 - 9) << 23, 127) if signed else ((127 - 20) << 23, 254)
    bits = _bits(x)
    magnitude = bits & 0x7FFFFFFF
    is_none = magnitude >= 0x7F800000
    if not signed:
        is_none = is_none | (bits > 0x80000000)
    down, offset = _cells(scales.repeat_interleave(SCALE_BLOCK)[: x.numel()], zero)
    # As fma: exact in fp64 for what can change the rounding to fp32.
    sums = (_float(magnitude).double() / down + offset).float()
    n = 3 * (_bits(sums) - zero)
    code = ((n + (t >> 11)) >> 21).clamp(max=last)
    if signed:
        code = torch.where(n < 1 << 20, 0, code)
        code = torch.where(code > 0, code | (bits >> 24 & 0x80), code)
    else:
        code = torch.where((code == 0) & (magnitude > 0), 1, code)
    code = torch.where(is_none, 0x80 if signed else 0xFF, code)
    return code.to(torch.uint8)


def _unit(p: Tensor) -> Tensor:
    """Of a remainder beside fp16: 2^-15 of the spacing of ``p``, fp32; in fp64."""
    exponent = (_bits(p) >> 23 & 0xFF).clamp(min=113) - 25
    return _float(exponent << 23).double()


def _joined(codec: Codec, param: Tensor, remainder: Tensor) -> Tensor:
    if param.dtype == torch.float16:
        p = param.float()
        x = (remainder.double() * _unit(p) + p.double()).float()
        return torch.where((remainder == 0) | ~param.isfinite(), p, x)
    high = _bits(param) << 16
    low = remainder.long() << (0 if codec is REMAINDER16 else 8)
    bits = (high + low) & _WORD
    return _float(torch.where(_is_nan(bits), high, bits))


def _split(codec: Codec, x: Tensor, dtype: torch.dtype, t: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter and the remainder."""
    if dtype == torch.float16:
        param = x.half()
        p = param.float()
        units = ((x.double() - p.double()) / _unit(p)).round()
        return param, torch.where(param.isfinite(), units, 0).short()
    bits = _bits(x)
    is_nan = _is_nan(bits)
    nan = bits >> 16 | 0x40
    if codec is REMAINDER16:
        high, rest = (bits + 0x8000) >> 16 & 0xFFFF, _signed(bits, 16)
    else:
        rounded = (bits + (t >> 24)) >> 8
        cut = torch.where((rounded & 0x7FFFFF) == 0x7F8000, bits >> 8, rounded)
        high, rest = (cut + 0x80) >> 8 & 0xFFFF, _signed(cut, 8)
    param = _half(torch.where(is_nan, nan, high), dtype)
    return param, torch.where(is_nan, 0, rest).to(codec.dtype)
