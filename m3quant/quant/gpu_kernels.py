"""Triton kernels of `fused.compress_into` for many weights of one shape at once: each weight is read once from the GPU's
memory and its codes written once, to the place they have in the shard.

Bytes are those of `formats.compress`: divisions round to nearest (`div_rn`), E4M3 and BF16 are rounded to nearest even on
the bits, as torch does on every device. The reference of every kernel is `fused.compress_into`, and its own is `formats`.
"""

# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and block sizes, which Triton types itself)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..planning.layout import COMPRESSED_TENSORS, group_count
from ..schemes import FP8_BLOCK, Scheme
from .formats import compress

# A row of FP8 is held by one program; longer rows go the general way.
MAX_ROW = 1 << 14
# int4 and int8 groups of one program
GROUP_ELEMENTS = 1 << 12


def covers(scheme: Scheme, columns: int) -> bool:
    """Whether a kernel takes weights of this scheme and so many columns."""
    if scheme.kind == "fp8":
        return scheme.block or columns <= MAX_ROW
    return scheme.group_size is not None and scheme.group_size & (scheme.group_size - 1) == 0


@triton.jit
def _magnitude(bits):
    """int32 of BF16 bits without the sign."""
    return bits.to(tl.int32) & 0x7FFF


@triton.jit
def _value(bits):
    """float32 of BF16 bits."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _fp8_scale(largest_bits):
    """largest / 448, 2^-23 for zeros, at least the smallest normal float32."""
    largest = (largest_bits << 16).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    scale = tl.where(scale == 0.0, 1.1920928955078125e-07, scale)
    return tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)


@triton.jit
def _e4m3(x):
    """uint8 E4M3 of float32 within +-464, to nearest even: on the bits (c10/util/Float8_e4m3fn.h states the rule)."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # below 2^-6 the step is 2^-9, that of float32 at 2^14: adding it rounds, and leaves the code in the low bits
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    odd = (magnitude >> 20) & 1
    normal = (magnitude + odd - 0x3C000000 + 0x7FFFF) >> 20
    return (tl.where(magnitude < 0x3C800000, small, normal) | sign).to(tl.uint8)


@triton.jit
def _fp8_channel_kernel(source, out, table, flags, rows, columns, BLOCK: tl.constexpr):
    row, weight = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, codes, scales = tl.load(table + 3 * weight), tl.load(table + 3 * weight + 1), tl.load(table + 3 * weight + 2)
    begin = tl.multiple_of(begin, 16)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    bits = tl.load((source + begin).to(tl.pointer_type(tl.int16)) + row * columns + at, mask=inside, other=0)
    largest = tl.max(_magnitude(bits), axis=0)
    if largest >= 0x7F80:
        tl.store(flags + weight, 1)
    scale = _fp8_scale(tl.full([1], 0, tl.int32) + largest)
    tl.store((out + scales).to(tl.pointer_type(tl.float32)) + row + tl.arange(0, 1), scale)
    tl.store(
        out + codes + row * columns + at, _e4m3(tl.div_rn(_value(bits), tl.broadcast_to(scale, [BLOCK]))), mask=inside
    )


@triton.jit
def _fp8_block_kernel(source, out, table, flags, rows, columns, SIZE: tl.constexpr):
    band, tile, weight = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    begin, codes, scales = tl.load(table + 3 * weight), tl.load(table + 3 * weight + 1), tl.load(table + 3 * weight + 2)
    begin = tl.multiple_of(begin, 16)
    row = band * SIZE + tl.arange(0, SIZE)[:, None]
    column = tile * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (row < rows) & (column < columns)
    place = row * columns + column
    bits = tl.load((source + begin).to(tl.pointer_type(tl.int16)) + place, mask=inside, other=0)
    largest = tl.max(tl.max(_magnitude(bits), axis=1), axis=0)
    if largest >= 0x7F80:
        tl.store(flags + weight, 1)
    scale = _fp8_scale(tl.full([1], 0, tl.int32) + largest)
    tiles = (columns + SIZE - 1) // SIZE
    tl.store((out + scales).to(tl.pointer_type(tl.float32)) + band * tiles + tile + tl.arange(0, 1), scale)
    wide = tl.broadcast_to(tl.expand_dims(scale, 0), [SIZE, SIZE])
    tl.store(out + codes + place, _e4m3(tl.div_rn(_value(bits), wide)), mask=inside)


@triton.jit
def _integer_kernel(source, out, table, flags, groups, SIZE: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr):
    weight = tl.program_id(1)
    begin, codes, scales = tl.load(table + 3 * weight), tl.load(table + 3 * weight + 1), tl.load(table + 3 * weight + 2)
    begin = tl.multiple_of(begin, 16)
    group = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    inside = group < groups
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    bits = tl.load((source + begin).to(tl.pointer_type(tl.int16)) + at, mask=inside[:, None], other=0)
    largest_bits = tl.max(_magnitude(bits), axis=1)
    largest = (largest_bits << 16).to(tl.float32, bitcast=True)
    # 2 max|w| must be a float32, as the reference demands
    if tl.max(largest_bits, axis=0) >= 0x7F00:
        tl.store(flags + weight, 1)
    STEPS: tl.constexpr = (1 << BITS) - 1
    scale = tl.div_rn(largest * 2.0, tl.full([COUNT], STEPS, tl.float32))
    scale = tl.where(scale == 0.0, 1.1920928955078125e-07, scale)
    exact = scale.to(tl.int32, bitcast=True)
    short = (exact + 0x7FFF + ((exact >> 16) & 1)) >> 16  # BF16, to nearest even
    tl.store(
        (out + scales).to(tl.pointer_type(tl.int16)) + group,
        tl.where(short < 0x80, 0x80, short).to(tl.int16),
        mask=inside,
    )
    scale = (tl.where(short < 0x80, 0x80, short) << 16).to(tl.float32, bitcast=True)
    half: tl.constexpr = 1 << (BITS - 1)
    x = tl.div_rn(_value(bits), tl.broadcast_to(tl.expand_dims(scale, 1), [COUNT, SIZE]))
    x = tl.minimum(tl.maximum(x, -half * 1.0), half - 1.0)
    code = ((x + 12582912.0).to(tl.int32, bitcast=True) + half) & ((1 << BITS) - 1)  # 1.5 * 2^23: to nearest even
    PER_WORD: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = SIZE // PER_WORD
    shifts = (tl.arange(0, PER_WORD) * BITS)[None, None, :]
    words = tl.sum(tl.reshape(code, [COUNT, WORDS, PER_WORD]) << shifts, axis=2)
    place = group[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    tl.store((out + codes).to(tl.pointer_type(tl.int32)) + place, words, mask=inside[:, None])


def compress_group(
    source: Tensor, out: Tensor, table: Tensor, flags: Tensor, shape: tuple[int, int], scheme: Scheme
) -> None:
    """Round the weights of one shape and scheme that lie in `source` into their places in `out`, on the current stream.

    source, out: uint8 on the GPU. table: int64 [weights, 3] on the GPU, byte offsets of each BF16 weight [N, K] in
    `source` (a multiple of 16) and of its codes and its scale in `out` (multiples of what they are stored in). flags: int32 [weights], set
    to 1 where a weight must be refused (NaN, Inf, or a range beyond float32); its outputs are then meaningless.
    """
    rows, columns = shape
    weights = table.shape[0]
    if scheme.kind == "int":
        assert scheme.group_size is not None
        groups, count = rows * group_count(columns, scheme), max(1, GROUP_ELEMENTS // scheme.group_size)
        grid: Any = (triton.cdiv(groups, count), weights)
        _integer_kernel[grid](
            source, out, table, flags, groups, SIZE=scheme.group_size, COUNT=count, BITS=scheme.bits, num_warps=4
        )
    elif scheme.block:
        grid = (triton.cdiv(rows, FP8_BLOCK), triton.cdiv(columns, FP8_BLOCK), weights)
        _fp8_block_kernel[grid](source, out, table, flags, rows, columns, SIZE=FP8_BLOCK, num_warps=8)
    else:
        block = triton.next_power_of_2(columns)
        warps = 4 if block <= 4096 else 8
        _fp8_channel_kernel[(rows, weights)](source, out, table, flags, rows, columns, BLOCK=block, num_warps=warps)


def check_device(device: torch.device) -> None:
    """Raise RuntimeError, or what Triton raises, unless a kernel is built, runs there (it needs a C compiler on the
    machine) and writes what the reference writes.
    """
    weight = torch.linspace(-3, 5, 64).view(2, 32).bfloat16()
    out, flags = torch.zeros(72, dtype=torch.uint8, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    table = torch.tensor([[0, 0, 64]], device=device)
    scheme = Scheme("fp8", 8)
    compress_group(weight.view(torch.uint8).flatten().to(device), out, table, flags, (2, 32), scheme)
    expected = compress(weight, scheme, COMPRESSED_TENSORS)
    found = out.cpu()
    for part, tensor in ((found[:64], expected["weight"]), (found[64:], expected["weight_scale"])):
        if not torch.equal(part, tensor.flatten().view(torch.uint8)):
            raise RuntimeError("a kernel wrote other bytes than its reference")
