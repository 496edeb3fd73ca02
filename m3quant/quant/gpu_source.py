"""Triton kernels that turn quantized weights of a source into BF16, many of one shape at once.

The bits of `dequantize` and `fp4`, which are their reference: one product in float32, rounded once. What those refuse is flagged.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the arguments of a kernel are pointers and block sizes, which Triton types itself)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..planning.source_layouts import FOUR_BIT, FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, NVFP4_PACKED, SourceTensor
from .dequantize import MX_BLOCK
from .fp4 import NV_BLOCK
from .fp8 import SQUARE

TILE = (32, 128)  # of one program
_SCALE_BYTES = {"F32": 4, "BF16": 2, "U8": 1, "F8_E8M0": 1}


@triton.jit
def _e4m3(magnitude):
    """float32 of E4M3's seven bits below the sign: from 8 on they are float32's bits as they are, 120 exponents higher; below,
    the value is a multiple of 2^-9."""
    normal = ((magnitude << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    return tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)


@triton.jit
def _e8m0(exponent):
    """float32 of an E8M0 byte: the exponent of one, where 0 is its one subnormal and 255 is NaN."""
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _bf16(size, sign):
    """BF16 as int16 of float32's bits without the sign, to nearest even; sign: the top bit of an int32."""
    short = (size + 0x7FFF + ((size >> 16) & 1)) >> 16
    return (short | ((sign >> 16) & 0x8000)).to(tl.int16)


@triton.jit
def _dense_kernel(
    source, out, table, flags, rows, columns, scale_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    weight = tl.program_id(2)
    begin, scales, dense = tl.load(table + 3 * weight), tl.load(table + 3 * weight + 1), tl.load(table + 3 * weight + 2)
    begin, scales, dense = tl.multiple_of(begin, 16), tl.multiple_of(scales, 16), tl.multiple_of(dense, 2)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    place = row * columns + column
    code = tl.load(source + begin + place, mask=inside, other=0).to(tl.int32)
    magnitude = code & 0x7F
    value = _e4m3(magnitude)
    where = (row // DOWN) * scale_columns + column // ACROSS
    if SCALE_BYTES == 4:
        scale = tl.load((source + scales).to(tl.pointer_type(tl.float32)) + where, mask=inside, other=0.0)
    elif SCALE_BYTES == 2:
        half = tl.load((source + scales).to(tl.pointer_type(tl.int16)) + where, mask=inside, other=0)
        scale = (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        scale = _e8m0(tl.load(source + scales + where, mask=inside, other=127).to(tl.int32))
    product = (value * scale).to(tl.int32, bitcast=True)
    size = product & 0x7FFFFFFF
    refused = inside & ((magnitude == 0x7F) | (size > 0x7F7F0000))  # NaN, or beyond the largest BF16
    if tl.max(tl.max(refused.to(tl.int32), axis=1), axis=0) > 0:
        tl.store(flags + weight, 1)
    sign = (code << 24) ^ product  # a scale may be negative
    tl.store((out + dense).to(tl.pointer_type(tl.int16)) + place, _bf16(size, sign), mask=inside)


@triton.jit
def _dense_fp4_kernel(
    source, out, table, flags, rows, columns, scale_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr, HAS_GLOBAL: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    weight = tl.program_id(2)
    begin, scales = tl.load(table + 4 * weight), tl.load(table + 4 * weight + 1)
    whole, dense = tl.load(table + 4 * weight + 2), tl.load(table + 4 * weight + 3)
    begin, scales, whole, dense = (
        tl.multiple_of(begin, 16),
        tl.multiple_of(scales, 16),
        tl.multiple_of(whole, 16),
        tl.multiple_of(dense, 2),
    )
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    byte = tl.load(source + begin + row * (columns // 2) + column // 2, mask=inside, other=0).to(tl.int32)
    code = (byte >> ((column & 1) * 4)) & 0xF  # the even column is in the low half
    magnitude = code & 7
    # E2M1: from 2 on the bits are float32's as they are, 126 exponents higher; below, 0 and 0.5
    value = tl.where(
        magnitude < 2, magnitude.to(tl.float32) * 0.5, ((magnitude << 22) + 0x3F000000).to(tl.float32, bitcast=True)
    )
    bits = tl.load(source + scales + row * scale_columns + column // ACROSS, mask=inside, other=56).to(tl.int32)
    if HAS_GLOBAL:
        size = bits & 0x7F
        scale = _e4m3(size)
        scale = tl.where((bits & 0x80) > 0, -scale, scale)
        factor = tl.load((source + whole).to(tl.pointer_type(tl.float32)))
        usable = (factor > 0) & (factor < float("inf"))  # NaN is neither
        refused = inside & ((size == 0x7F) | (usable == 0))
        scale = tl.div_rn(scale, factor) if DIVIDES else scale * factor
    else:
        refused = inside & (bits == 255)
        scale = _e8m0(bits)
    refused = refused | (inside & (tl.abs(scale) * 6.0 > 3.3895313892515355e38))  # beyond the largest BF16
    if tl.max(tl.max(refused.to(tl.int32), axis=1), axis=0) > 0:
        tl.store(flags + weight, 1)
    product = (value * scale).to(tl.int32, bitcast=True)
    size = product & 0x7FFFFFFF
    sign = (code << 28) ^ product
    tl.store((out + dense).to(tl.pointer_type(tl.int16)) + row * columns + column, _bf16(size, sign), mask=inside)


def dense_group(source: Tensor, out: Tensor, table: Tensor, flags: Tensor, alike: SourceTensor) -> None:
    """BF16 of the quantized weights of one kind and shape in `source`, into their places in `out`, on the current stream.

    source, out: uint8 on the GPU. table: int64 [weights, parts + 1] on the GPU, byte offsets in `source` of each weight's parts (multiples
    of 16; codes, scale, and the global scale of NVFP4, see `SourceTensor.parts`), and in `out` of the BF16 weight [N, K] (even). alike: one
    of them. flags: int32 [weights], set to 1 where a weight must be refused.
    """
    rows, columns = alike.shape
    grid = (triton.cdiv(rows, TILE[0]), triton.cdiv(columns, TILE[1]), table.shape[0])
    assert alike.scale is not None
    if alike.kind in FOUR_BIT:
        _, across = MX_BLOCK if alike.global_scale is None else NV_BLOCK
        if alike.global_scale is None:
            table = table[:, [0, 1, 1, 2]].contiguous()
        _dense_fp4_kernel[grid](
            source, out, table, flags, rows, columns, columns // across, ROWS=TILE[0], COLUMNS=TILE[1], ACROSS=across,
            HAS_GLOBAL=alike.global_scale is not None, DIVIDES=alike.kind == NVFP4_PACKED, num_warps=4,
        )  # fmt: skip
        return
    blocks = {FP8_BLOCK: SQUARE, FP8_CHANNEL: (1, columns), FP8_TENSOR: (rows, columns)}
    down, across = blocks.get(alike.kind, MX_BLOCK)
    _dense_kernel[grid](
        source, out, table, flags, rows, columns, triton.cdiv(columns, across),
        ROWS=TILE[0], COLUMNS=TILE[1], DOWN=down, ACROSS=across, SCALE_BYTES=_SCALE_BYTES[alike.scale.dtype], num_warps=4,
    )  # fmt: skip
