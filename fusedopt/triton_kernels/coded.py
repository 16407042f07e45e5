"""Streams of the rows whose states or masters are coded: loads, conversions, stores.

As access.py for any codec. A block has so few elements that four neighbours of a thread are 16
bytes of fp32, 8 of 16 bits and 4 of codes, so every width is loaded as it is stored. There is a
load of each width that a stream may have, and only one has a mask that is not empty; conversions
follow after the loads of all streams, under an `if` on the codec.

A block begins at a multiple of SCALE_BLOCK of its row and has only whole blocks of scales, of which
the row's last may have absent elements.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .access import current_param, load_elements, store_elements
from .codecs import (
    DITHER_OF_STREAM,
    DITHERED,
    FLOAT16,
    FLOAT32,
    LOG8,
    REMAINDER8,
    REMAINDER16,
    SCALE_BLOCK,
    dither,
    dither_seed,
    dithered_narrowed,
    is_byte,
    log8_down,
    log8_magnitude,
    log8_narrowed,
    log8_scale_of,
    log8_up,
    log8_widened,
    narrowed,
    remainder8_joined,
    remainder8_split,
    remainder16_joined_bfloat16,
    remainder16_joined_float16,
    remainder16_split_bfloat16,
    remainder16_split_float16,
    widened,
)
from .tables import (
    CODEC_BITS,
    CODEC_MASK,
    MASTER,
    PARAM,
    ROW,
    STATES_FROM,
    fields_at,
    load,
    read,
)


class Row(NamedTuple):
    """A chunk of a row. Its streams are looked up in the table where they are loaded and again
    where they are stored: meanwhile registers are for data."""

    at: tl.tensor  # address of the record
    begin: tl.tensor  # the chunk's first element
    seed: tl.tensor  # such that dither(seed, i) is that of the chunk's element i in stream 0


class Coded(NamedTuple):
    """A stream. Begins as an ``access.Stream`` does."""

    address: tl.tensor  # of the chunk's first element; where it is a byte, of the row's
    codec: tl.tensor
    there: tl.tensor
    scales: tl.tensor  # the address of the row's
    seed: tl.tensor


class Block(NamedTuple):
    """Elements that are updated together.

    Bytes are accessed by their places in the row, of 64 bits. By 32 bits Triton would access them
    as buffers on AMD, each in a loop over all addresses that threads might have: that they have but
    one, the compiler cannot know.
    """

    at: tl.tensor  # in the chunk
    place: tl.tensor  # in the row
    inside: tl.tensor
    scale_place: tl.tensor
    scale_inside: tl.tensor


@triton.jit
def block_of(row, first, n, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    inside = tl.full([BLOCK], True, tl.int1) if ALIGNED else at < n
    scale_at = first // SCALE_BLOCK + tl.arange(0, BLOCK // SCALE_BLOCK)
    scale_place = row.begin // SCALE_BLOCK + scale_at
    return Block(at, row.begin + at, inside, scale_place, scale_at * SCALE_BLOCK < n)


@triton.jit
def row_of(rows, r, begin, count):
    at = fields_at(ROW, rows, r).data  # the first one
    first = read(ROW, at).first
    return Row(at, begin, dither(dither_seed(first, count, 0), begin))  # linear in the element


@triton.jit
def codec_of(row, NUMBER: tl.constexpr):
    return (read(ROW, row.at).codecs >> (CODEC_BITS * NUMBER)) & CODEC_MASK


@triton.jit
def stream_of(row, NUMBER: tl.constexpr):
    codec = codec_of(row, NUMBER)
    n_bytes = tl.where(codec == FLOAT32, 4, tl.where(is_byte(codec), 0, 2)).to(tl.int64)
    fields = read(ROW, row.at)
    data = load(fields.data + 8 * NUMBER, tl.int64)
    address = tl.where(data != 0, data + row.begin * n_bytes, 0)
    scales = load(fields.scales + 8 * NUMBER, tl.int64)
    stream: tl.constexpr = 0 if NUMBER < STATES_FROM else NUMBER - STATES_FROM + 1
    of_stream: tl.constexpr = (stream * DITHER_OF_STREAM) % (1 << 32)
    return Coded(address, codec, address != 0, scales, row.seed + of_stream)


@triton.jit
def primary_of(row):
    """The values to update: the fp32 param, or else the master."""
    param = stream_of(row, PARAM)
    master = stream_of(row, MASTER)
    is_float = param.codec == FLOAT32
    address = tl.where(is_float, param.address, master.address)
    codec = tl.where(is_float, FLOAT32, master.codec)
    return Coded(address, codec, address != 0, master.scales, master.seed)


@triton.jit
def half_of(row):
    """The param of 16 bits."""
    param = stream_of(row, PARAM)
    address = tl.where(param.codec == FLOAT32, 0, param.address)
    return Coded(address, param.codec, address != 0, param.scales, param.seed)


@triton.jit
def addresses_of(row, STATES: tl.constexpr):
    """Of all streams, in one: for their alignment."""
    addresses = primary_of(row).address | half_of(row).address
    for k in tl.static_range(STATES):
        addresses = addresses | stream_of(row, STATES_FROM + k).address
    return addresses


@triton.jit
def spread(of_scales):
    """One value for each scale, given to all elements that share it."""
    n: tl.constexpr = of_scales.shape[0]
    rows = tl.broadcast_to(tl.expand_dims(of_scales, 1), [n, SCALE_BLOCK])
    return tl.reshape(rows, [n * SCALE_BLOCK])


@triton.jit
def load_coded(stream, block, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements as stored: fp32, 16 bits, 8 bits; and the scales of the last.

    CODE: the one codec of 8 bits that the stream may have; 0: it has none.
    """
    address, codec, there, scales, _ = stream
    is_float, is_code = codec == FLOAT32, is_byte(codec)
    wanted = block.inside & (there & is_float)
    floats = load_elements(address, block.at, wanted, tl.float32, ALIGNED)
    wanted = block.inside & (there & (is_float == 0) & (is_code == 0))
    halves = load_elements(address, block.at, wanted, tl.uint16, ALIGNED)
    codes, own_scales = floats, floats  # stand-ins
    if CODE != 0:
        codes = load_elements(address, block.place, block.inside & is_code, tl.uint8, ALIGNED)
        if CODE != REMAINDER8:
            wanted = block.scale_inside & is_code
            own_scales = load_elements(scales, block.scale_place, wanted, tl.uint8, False)
    return floats, halves, codes, own_scales


@triton.jit
def load_gradient(grad, block, ALIGNED: tl.constexpr):
    is_float = grad.codec == FLOAT32
    wide = load_elements(grad.address, block.at, block.inside & is_float, tl.float32, ALIGNED)
    wanted = block.inside & (is_float == 0)
    return wide, load_elements(grad.address, block.at, wanted, tl.uint16, ALIGNED)


@triton.jit
def gradient_of(loaded, grad):
    values, halves = loaded
    if grad.codec != FLOAT32:
        values = widened(halves, grad.codec)
    return values


# ---- states -------------------------------------------------------------------------------------


@triton.jit
def state_of(loaded, row, NUMBER: tl.constexpr, CODE: tl.constexpr):
    """The result of ``load_coded`` in fp32."""
    values, halves, codes, scales = loaded
    codec = codec_of(row, NUMBER)
    if codec == DITHERED:
        values = widened(halves, codec)
    if CODE != 0:
        if codec == CODE:
            down = spread(log8_down(scales.to(tl.uint32)))
            values = log8_widened(codes.to(tl.uint32), down, CODE == LOG8)
    return values


@triton.jit
def store_scales(address, block, scale):
    """Each by the first thread of those that share it, in which it is: the shape is such that
    Triton leaves it there. As a block of one dimension it would go through shared memory."""
    n: tl.constexpr = scale.shape[0]
    rows = tl.broadcast_to(tl.expand_dims(scale.to(tl.uint8), 1), [n, 32])
    column = tl.expand_dims(tl.arange(0, 32), 0)
    wanted = tl.expand_dims(block.scale_inside, 1) & (column == 0)
    place = tl.expand_dims(block.scale_place, 1) + column
    store_elements(address, place, wanted, rows, False)


@triton.jit
def store_state(stream, block, x, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    address, codec, there, scales, seed = stream
    if codec == FLOAT32:
        store_elements(address, block.at, block.inside & there, x, ALIGNED)
    if codec == DITHERED:
        bits = dithered_narrowed(x, dither(seed, block.at)).to(tl.uint16)
        store_elements(address, block.at, block.inside, bits, ALIGNED)
    if CODE != 0:
        if codec == CODE:
            magnitude = tl.where(block.inside, log8_magnitude(x), 0)
            rows = tl.reshape(magnitude, [block.scale_place.shape[0], SCALE_BLOCK])
            scale = log8_scale_of(tl.max(rows, 1))
            store_scales(scales, block, scale)
            t = dither(seed, block.at)
            codes = log8_narrowed(x, spread(log8_up(scale)), t, CODE == LOG8).to(tl.uint8)
            store_elements(address, block.place, block.inside, codes, ALIGNED)


# ---- the param and its master -------------------------------------------------------------------


@triton.jit
def param_of(loaded, half_loaded, row):
    """In fp32, from the param and its master, of which either may be absent.

    loaded: of ``load_coded``, of the fp32 param or of the master.
    half_loaded: likewise, of the half param.
    """
    param, rest16, rest8, _ = loaded
    _, bits, _, _ = half_loaded
    _, codec, has_master, _, _ = primary_of(row)
    _, half_codec, is_half, _, _ = half_of(row)
    if codec == REMAINDER8:
        param = remainder8_joined(bits, rest8.to(tl.int8, bitcast=True).to(tl.int32))
    elif codec == REMAINDER16:
        rest = rest16.to(tl.int16, bitcast=True).to(tl.int32)
        if half_codec == FLOAT16:
            param = remainder16_joined_float16(bits, rest)
        else:
            param = remainder16_joined_bfloat16(bits, rest)
    elif is_half:
        param = current_param(param, bits, has_master, half_codec)
    return param


@triton.jit
def store_param(row, block, x, ALIGNED: tl.constexpr):
    address, codec, there, _, seed = primary_of(row)
    half_address, half_codec, is_half, _, _ = half_of(row)
    t = dither(seed, block.at)
    if codec == REMAINDER8:
        bits, rest = remainder8_split(x, t)
        store_elements(address, block.place, block.inside, rest.to(tl.uint8), ALIGNED)
    elif codec == REMAINDER16:
        if half_codec == FLOAT16:
            bits, rest = remainder16_split_float16(x)
        else:
            bits, rest = remainder16_split_bfloat16(x)
        store_elements(address, block.at, block.inside, rest.to(tl.uint16), ALIGNED)
    else:
        store_elements(address, block.at, block.inside & there, x, ALIGNED)
        if half_codec == DITHERED:
            bits = dithered_narrowed(x, t)
        else:
            bits = narrowed(x, half_codec).to(tl.uint32)
    if is_half:
        store_elements(half_address, block.at, block.inside, bits.to(tl.uint16), ALIGNED)
