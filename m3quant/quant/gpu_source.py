"""A Triton kernel that turns FP8 weights of a source into BF16, many of one shape at once.

The bits of `source.dequantize_fp8_block` and `source.dequantize_mxfp8`, which are its reference: one product in float32,
rounded once. What those refuse is flagged.
"""

# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and block sizes, which Triton types itself)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .dequantize import MX_BLOCK
from .fp8 import SQUARE

TILE = (32, 128)  # of one program
_SCALE_BYTES = {"F32": 4, "BF16": 2, "U8": 1, "F8_E8M0": 1}


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
    # E4M3: from 8 on the bits lie in float32's as they are, 120 exponents higher; below, the value is a multiple of 2^-9
    normal = ((magnitude << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    where = (row // DOWN) * scale_columns + column // ACROSS
    if SCALE_BYTES == 4:
        scale = tl.load((source + scales).to(tl.pointer_type(tl.float32)) + where, mask=inside, other=0.0)
    elif SCALE_BYTES == 2:
        half = tl.load((source + scales).to(tl.pointer_type(tl.int16)) + where, mask=inside, other=0)
        scale = (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # E8M0: a float32's exponent, where 0 is its one subnormal and 255 is NaN
        exponent = tl.load(source + scales + where, mask=inside, other=127).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        scale = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    product = (value * scale).to(tl.int32, bitcast=True)
    size = product & 0x7FFFFFFF
    refused = inside & ((magnitude == 0x7F) | (size > 0x7F7F0000))  # NaN, or beyond the largest BF16
    if tl.max(tl.max(refused.to(tl.int32), axis=1), axis=0) > 0:
        tl.store(flags + weight, 1)
    sign = (code << 24) ^ product  # a scale may be negative
    short = (size + 0x7FFF + ((size >> 16) & 1)) >> 16  # to nearest even
    short = short | ((sign >> 16) & 0x8000)
    tl.store((out + dense).to(tl.pointer_type(tl.int16)) + place, short.to(tl.int16), mask=inside)


def dense_group(source: Tensor, out: Tensor, table: Tensor, flags: Tensor, shape: tuple[int, int], scale: str) -> None:
    """BF16 of the FP8 weights of one shape that lie in `source`, into their places in `out`, on the current stream.

    source, out: uint8 on the GPU. table: int64 [weights, 3] on the GPU, byte offsets in `source` of each E4M3 weight
    [N, K] and of its scale (multiples of 16), and in `out` of the BF16 weight (even). scale: how scales are stored, "F32"
    or "BF16" (128x128 blocks), "U8" or "F8_E8M0" (1x32). flags: int32 [weights], set to 1 where a weight must be refused.
    """
    rows, columns = shape
    size = _SCALE_BYTES[scale]
    down, across = MX_BLOCK if size == 1 else SQUARE
    grid = (triton.cdiv(rows, TILE[0]), triton.cdiv(columns, TILE[1]), table.shape[0])
    _dense_kernel[grid](
        source, out, table, flags, rows, columns, triton.cdiv(columns, across),
        ROWS=TILE[0], COLUMNS=TILE[1], DOWN=down, ACROSS=across, SCALE_BYTES=size, num_warps=4,
    )  # fmt: skip
