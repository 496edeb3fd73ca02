"""Triton kernels of `fused.compress_into` for many weights of one shape at once: each weight is read once from the GPU's
memory and its codes written once, to the place they have in the shard.

Bytes are those of `formats.compress`: divisions round to nearest (`div_rn`), E4M3 and BF16 are rounded to nearest even on
the bits, as torch does on every device. The reference of every kernel is `fused.compress_into`, and its own is `formats`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the arguments of a kernel are pointers and block sizes, which Triton types itself)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..planning.layout import COMPRESSED_TENSORS, WORD_BITS, group_count
from ..schemes import FP8_BLOCK, Scheme
from .formats import compress

# A row of FP8 is held by one program; longer rows go the general way.
MAX_ROW = 1 << 14
# Integer groups of one program
GROUP_ELEMENTS = 1 << 12
# Columns of zero points of one program
ZERO_COLUMNS = 64


def covers(scheme: Scheme, columns: int) -> bool:
    """Whether a kernel takes weights of this scheme and so many columns."""
    if scheme.kind == "fp8":
        return scheme.block or columns <= MAX_ROW
    # A group is packed by itself, so that its codes must fill whole words.
    return scheme.group_size is not None and scheme.group_size * scheme.bits % WORD_BITS == 0


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
    begin, codes, scales = tl.load(table + 4 * weight), tl.load(table + 4 * weight + 1), tl.load(table + 4 * weight + 2)
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
    begin, codes, scales = tl.load(table + 4 * weight), tl.load(table + 4 * weight + 1), tl.load(table + 4 * weight + 2)
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
def _stored_scale(exact):
    """int32 BF16 bits of a positive float32 scale, to nearest even, at least the smallest normal; 2^-23 for zeros."""
    bits = tl.where(exact == 0.0, 1.1920928955078125e-07, exact).to(tl.int32, bitcast=True)
    short = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(short < 0x80, 0x80, short)


@triton.jit
def _nearest(x, BITS: tl.constexpr):
    """int32 of float32 x limited to the signed codes, to nearest even."""
    half: tl.constexpr = 1 << (BITS - 1)
    x = tl.minimum(tl.maximum(x, -half * 1.0), half - 1.0)
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2^23


@triton.jit
def _word(codes, number, BITS: tl.constexpr, RUN: tl.constexpr):
    """Word `number` of the stream of each run of RUN unsigned codes in the last dimension: int32 without that dimension."""
    begin = (tl.arange(0, RUN) * BITS - 32 * number)[None, None, :]  # bit of the word at which a code begins
    up = tl.where((begin >= 0) & (begin < 32), codes << tl.minimum(tl.maximum(begin, 0), 31), 0)
    down = tl.where((begin < 0) & (begin > -BITS), codes >> tl.minimum(tl.maximum(-begin, 0), 31), 0)
    return tl.sum(up | down, axis=2)


@triton.jit
def _integer_kernel(
    source, out, table, flags, zeros, groups,
    SIZE: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    weight = tl.program_id(1)
    begin, codes, scales = tl.load(table + 4 * weight), tl.load(table + 4 * weight + 1), tl.load(table + 4 * weight + 2)
    begin = tl.multiple_of(begin, 16)
    group = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    inside = group < groups
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    bits = tl.load((source + begin).to(tl.pointer_type(tl.int16)) + at, mask=inside[:, None], other=0)
    largest_bits = tl.max(_magnitude(bits), axis=1)
    half: tl.constexpr = 1 << (BITS - 1)
    if SYMMETRIC:
        reach = (largest_bits << 16).to(tl.float32, bitcast=True) * 2.0
    else:
        low = tl.minimum(tl.min(_value(bits), axis=1), 0.0)
        reach = tl.maximum(tl.max(_value(bits), axis=1), 0.0) - low
    # NaN or Inf, or a range that is no float32, which the reference refuses
    if tl.max(largest_bits, axis=0) >= 0x7F80 or tl.max(reach.to(tl.int32, bitcast=True), axis=0) >= 0x7F800000:
        tl.store(flags + weight, 1)
    short = _stored_scale(tl.div_rn(reach, tl.full([COUNT], (1 << BITS) - 1, tl.float32)))
    tl.store((out + scales).to(tl.pointer_type(tl.int16)) + group, short.to(tl.int16), mask=inside)
    scale = (short << 16).to(tl.float32, bitcast=True)
    steps = tl.div_rn(_value(bits), tl.broadcast_to(tl.expand_dims(scale, 1), [COUNT, SIZE]))
    if not SYMMETRIC:
        zero = _nearest(-half * 1.0 - tl.div_rn(low, scale), BITS)
        tl.store(zeros + weight.to(tl.int64) * groups + group, (zero + half).to(tl.uint8), mask=inside)
        steps += tl.expand_dims(zero.to(tl.float32), 1)
    code = _nearest(steps, BITS) + half
    words_out = (out + codes).to(tl.pointer_type(tl.int32))
    if 32 % BITS == 0:
        PER_WORD: tl.constexpr = 32 // BITS
        WORDS: tl.constexpr = SIZE // PER_WORD
        shifts = (tl.arange(0, PER_WORD) * BITS)[None, None, :]
        words = tl.sum(tl.reshape(code, [COUNT, WORDS, PER_WORD]) << shifts, axis=2)
        place = group[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        tl.store(words_out + place, words, mask=inside[:, None])
    else:
        RUNS: tl.constexpr = SIZE // RUN
        RUN_WORDS: tl.constexpr = RUN * BITS // 32
        runs = tl.reshape(code, [COUNT, RUNS, RUN])
        place = (group[:, None] * RUNS + tl.arange(0, RUNS)[None, :]) * RUN_WORDS
        for number in tl.static_range(RUN_WORDS):
            tl.store(words_out + place + number, _word(runs, number, BITS, RUN), mask=inside[:, None])


@triton.jit
def _zero_kernel(zeros, out, table, rows, columns, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Zero points uint8 [rows, columns] of each weight, 32 rows at a time, packed along the rows."""
    weight, run = tl.program_id(2), tl.program_id(0).to(tl.int64)
    begin = tl.load(table + 4 * weight + 3)
    row = run * 32 + tl.arange(0, 32)
    column = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    at = weight.to(tl.int64) * rows * columns + row[None, :] * columns + column[:, None]
    codes = tl.load(zeros + at, mask=inside, other=0).to(tl.int32)
    words_out = (out + begin).to(tl.pointer_type(tl.int32))
    for number in tl.static_range(BITS):
        word = tl.reshape(_word(tl.reshape(codes, [COUNT, 1, 32]), number, BITS, 32), [COUNT])
        place = (run * BITS + number) * columns + column
        tl.store(words_out + place, word, mask=(column < columns) & (place < rows * BITS // 32 * columns))


def compress_group(
    source: Tensor, out: Tensor, table: Tensor, flags: Tensor, shape: tuple[int, int], scheme: Scheme
) -> None:
    """Round the weights of one shape and scheme in `source` into their places in `out`, on the current stream.

    source, out: uint8 on the GPU. table: int64 [weights, 4] on the GPU, byte offsets of each BF16 weight [N, K] in
    `source` (a multiple of 16) and of its codes, its scale and its zero points (0 without) in `out` (multiples of what
    they are stored in). flags: int32 [weights], set to 1 where a weight must be refused (NaN, Inf, or a range beyond
    float32); its outputs are then meaningless.
    """
    rows, columns = shape
    weights = table.shape[0]
    if scheme.kind == "int":
        assert scheme.group_size is not None
        columns = group_count(columns, scheme)
        groups, count = rows * columns, max(1, GROUP_ELEMENTS // scheme.group_size)
        zeros = out if scheme.symmetric else torch.empty(weights * groups, dtype=torch.uint8, device=out.device)
        grid: Any = (triton.cdiv(groups, count), weights)
        _integer_kernel[grid](
            source, out, table, flags, zeros, groups, SIZE=scheme.group_size, COUNT=count, BITS=scheme.bits,
            SYMMETRIC=scheme.symmetric, RUN=min(32, scheme.group_size), num_warps=4,
        )  # fmt: skip
        if not scheme.symmetric:
            grid = (triton.cdiv(rows, 32), triton.cdiv(columns, ZERO_COLUMNS), weights)
            _zero_kernel[grid](zeros, out, table, rows, columns, BITS=scheme.bits, COUNT=ZERO_COLUMNS, num_warps=4)
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
    table = torch.tensor([[0, 0, 64, 0]], device=device)
    scheme = Scheme("fp8", 8)
    compress_group(weight.view(torch.uint8).flatten().to(device), out, table, flags, (2, 32), scheme)
    expected = compress(weight, scheme, COMPRESSED_TENSORS)
    found = out.cpu()
    for part, tensor in ((found[:64], expected["weight"]), (found[64:], expected["weight_scale"])):
        if not torch.equal(part, tensor.flatten().view(torch.uint8)):
            raise RuntimeError("a kernel wrote other bytes than its reference")
