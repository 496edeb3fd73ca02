# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels that round: one block of the column loop with its inner corrections in one launch, and all columns at once.

The plain form is `columns.plain_block`: a dozen operations for each column, each a launch of its own; a layer of M2 has about
200,000 columns of chunks to pass. Here a thread takes one row of a weight and holds a part of the block in registers: everything
is loaded at once, and the steps, which are unrolled, wait for nothing but each other and a line of the factor in the cache.
Arithmetic follows `grids.Grid` step by step: IEEE division (by the reciprocals, which no step waits for), halves to even, E4M3 by
saturating conversion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from m3quant.calibration.feedback.columns import CODES_ON_GPU, PART, Block
from m3quant.calibration.feedback.grids import Levels
from m3quant.calibration.kernels import _divide, _inverse

# A warp's lanes are as many rows: with more rows than threads, or fewer, a column's steps would cross threads.
_WARPS = 1
_TILE = 32 * _WARPS
_POINTS = 1024  # rows of a program that rounds a column on its own
_E4M3_MAX = tl.constexpr(448.0)
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, halves to even.
_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _to_e4m3(x):
    """Nearest E4M3 value of |x| <= 448, halves to even, still float32."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    # Normal numbers keep three bits of mantissa; below 2^-6 the step is 2^-9.
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
    normal = rounded.to(tl.float32, bitcast=True)
    small = (x * 512.0 + _INTEGER - _INTEGER) * 0.001953125
    return tl.where(exponent >= 121, normal, small)


@triton.jit
def _code(x, scale, reciprocal, zero, QMIN: tl.constexpr, QMAX: tl.constexpr, FP8: tl.constexpr, FMA: tl.constexpr):
    code = _divide(x, scale, reciprocal, FMA)
    if FP8:
        code = tl.minimum(tl.maximum(code, -_E4M3_MAX), _E4M3_MAX)
        return _to_e4m3(code)
    code = tl.minimum(tl.maximum(code + zero, QMIN), QMAX)
    return (code + _INTEGER) - _INTEGER


@triton.jit
def _line(tile, pick):
    """The picked row of a tile. Steps are unrolled and a thread holds whole columns, so this is a choice of register."""
    return tl.sum(tl.where(pick, tile, -0.0), 0)  # x + -0.0 is x for every x


@triton.jit(do_not_specialize=["rows", "count", "target_step", "codes_step", "errors_step", "moved_step"])
def _round_block(
    aim, target, inner, scale, zero, weight, codes, errors, moved, loss,
    rows, count, target_step, codes_step, errors_step, moved_step,
    PART: tl.constexpr, TILE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    FP8: tl.constexpr, SYMMETRIC: tl.constexpr, DESCENT: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    """TILE rows of one expert's weight through `count` columns. The _step of a tensor: elements from one expert to the next."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    line = tl.arange(0, PART)
    within = (row < rows)[None, :]
    aim += expert * count * rows
    scale += expert * count * rows
    zero += expert * count * rows
    inner += expert * count * count
    weight += expert * count
    target += expert * target_step
    codes += expert * codes_step
    errors += expert * errors_step
    moved += expert * moved_step
    gained = tl.zeros([TILE], tl.float32)
    for part in range(0, tl.cdiv(count, PART)):
        own = part * PART + line
        inside = (own < count)[:, None] & within
        place = own[:, None] * rows + row[None, :]
        if part > 0:
            # What the block's earlier parts changed. Through memory, so that the steps below keep their own layout.
            sent = tl.zeros([PART, TILE], tl.float32)
            for other in range(0, part):
                theirs = other * PART + line
                lines = tl.load(inner + theirs[None, :] * count + own[:, None], mask=(own < count)[:, None], other=0.0)
                change = tl.load(moved + theirs[:, None] * rows + row[None, :], mask=within, other=0.0)
                sent += tl.dot(lines, change)
            tl.store(aim + place, tl.load(aim + place, mask=inside, other=0.0) + sent, mask=inside)
            tl.debug_barrier()
        x = tl.load(aim + place, mask=inside, other=0.0)
        s = tl.load(scale + place, mask=inside, other=1.0)
        r = _inverse(s)
        z = tl.zeros_like(s)
        if not SYMMETRIC:
            z = tl.load(zero + place, mask=inside, other=0.0)
        wanted = tl.load(target + place, mask=inside, other=0.0)
        before = tl.zeros_like(s)
        if DESCENT:
            before = tl.load(errors + place, mask=inside, other=0.0)
        found = tl.zeros_like(s)
        shifts = tl.zeros_like(s)
        for step in tl.static_range(PART):
            pick = (line == step)[:, None]
            column = tl.minimum(part * PART + step, count - 1)  # a column beyond the last is zero and gives nothing
            goal, unit, shift = _line(x, pick), _line(s, pick), _line(z, pick)
            code = _code(goal, unit, _line(r, pick), shift, QMIN, QMAX, FP8, FMA)
            value = (code - shift) * unit
            desired = _line(wanted, pick)
            error = desired - value
            share = tl.load(weight + column)
            gained += share * (goal - value) * (goal - value)
            shifted = error
            if DESCENT:
                old = _line(before, pick)
                shifted = error - old
                gained -= share * (goal - desired + old) * (goal - desired + old)
                shifts = tl.where(pick, shifted[None, :], shifts)
            found = tl.where(pick, code[None, :], found)
            wanted = tl.where(pick, error[None, :], wanted)
            later = tl.load(inner + column * count + own, mask=(line > step) & (own < count), other=0.0)
            x += later[:, None] * shifted[None, :]
        tl.store(codes + place, found, mask=inside)
        tl.store(errors + place, wanted, mask=inside)
        if DESCENT:
            tl.store(moved + place, shifts, mask=inside)
        tl.debug_barrier()
    total = loss + expert * rows + row
    tl.store(total, tl.load(total, mask=row < rows, other=0.0) + gained, mask=row < rows)


def round_block(block: Block, loss: torch.Tensor, limits: tuple[int, int] | None) -> None:
    """`columns.plain_block` on a GPU. limits: smallest and largest code, None for E4M3."""
    experts, count, rows = block.aim.shape
    low, high = limits or (0, 0)
    grid = (triton.cdiv(rows, _TILE), experts)
    scale, zero = block.levels.scale, block.levels.zero
    _round_block[grid](
        block.aim, block.target, block.inner, scale, scale if zero is None else zero, block.weight,
        block.codes, block.errors, block.moved, loss,
        rows, count, block.target.stride(0), block.codes.stride(0), block.errors.stride(0), block.moved.stride(0),
        PART=PART, TILE=_TILE, QMIN=low, QMAX=high,
        FP8=limits is None, SYMMETRIC=zero is None, DESCENT=block.descent, FMA=not triton.knobs.runtime.interpret,
        num_warps=_WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "groups", "size"])
def _round_points(
    target, scale, zero, codes, errors, rows, columns, groups, size,
    TILE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    FP8: tl.constexpr, SYMMETRIC: tl.constexpr, GIVEN: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    """TILE rows of one column of one expert's weight."""
    expert, column = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    place = (expert * columns + column) * rows + row
    level = (expert * groups + column // size) * rows + row
    wanted = tl.load(target + place, mask=inside, other=0.0)
    unit = tl.load(scale + level, mask=inside, other=1.0)
    shift = tl.zeros_like(unit)
    if not SYMMETRIC:
        shift = tl.load(zero + level, mask=inside, other=0.0)
    if GIVEN:
        code = tl.load(codes + place, mask=inside, other=0.0).to(tl.float32)
    else:
        code = _code(wanted, unit, _inverse(unit), shift, QMIN, QMAX, FP8, FMA)
        tl.store(codes + place, code, mask=inside)
    tl.store(errors + place, wanted - (code - shift) * unit, mask=inside)


def round_points(
    target: torch.Tensor, levels: Levels, size: int, limits: tuple[int, int] | None, codes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`points.rounded`, and with codes [E, K, N] given `points.errors_of`, in one pass; all contiguous. limits: as in `round_block`."""
    experts, columns, rows = target.shape
    given = codes is not None
    if codes is None:
        codes = torch.empty_like(target, dtype=CODES_ON_GPU if target.is_cuda else target.dtype)
    errors = torch.empty_like(target)
    scale, zero = levels.scale, levels.zero
    low, high = limits or (0, 0)
    tile = min(_POINTS, triton.next_power_of_2(rows))
    _round_points[(triton.cdiv(rows, tile), columns, experts)](
        target, scale, scale if zero is None else zero, codes, errors, rows, columns, scale.shape[1], size,
        TILE=tile, QMIN=low, QMAX=high, FP8=limits is None, SYMMETRIC=zero is None, GIVEN=given,
        FMA=not triton.knobs.runtime.interpret, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, errors
