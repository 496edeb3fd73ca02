# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of the column loop: one block of columns with its inner corrections in one launch.

The plain form is `columns.plain_block`: a dozen operations for each column, each a launch of its own; a layer of M2 has some
200,000 columns of chunks to pass. Here a program takes TILE rows of one weight and keeps the block's changes in registers.
Arithmetic follows `grids.Grid` step by step: IEEE division, halves to even, E4M3 by saturating conversion. Only the order in
which the corrections of a column are added differs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 64
_WARPS = 4
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
def _code(x, scale, zero, QMIN: tl.constexpr, QMAX: tl.constexpr, FP8: tl.constexpr):
    code = tl.div_rn(x, scale)
    if FP8:
        code = tl.minimum(tl.maximum(code, -_E4M3_MAX), _E4M3_MAX)
        return _to_e4m3(code)
    code = tl.minimum(tl.maximum(code + zero, QMIN), QMAX)
    return (code + _INTEGER) - _INTEGER


@triton.jit(do_not_specialize=["rows", "group_count", "columns", "count", "first"])
def _round_block(
    aim, target, inner, scale, zero, groups, old, codes, errors,
    rows, group_count, columns, count, first,
    BLOCK: tl.constexpr, TILE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    FP8: tl.constexpr, SYMMETRIC: tl.constexpr, DESCENT: tl.constexpr,
):  # fmt: skip
    """TILE rows of one expert's weight through `count` columns, the first of which is number `first`."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    before = tl.arange(0, BLOCK)
    change = tl.zeros([BLOCK, TILE], tl.float32)
    for step in range(count):
        line = (expert * columns + first + step) * rows + row
        x = tl.load(aim + (expert * count + step) * rows + row, mask=inside, other=0.0)
        weights = tl.load(
            inner + (expert * columns + first + before) * columns + first + step, mask=before < step, other=0.0
        )
        x += tl.sum(weights[:, None] * change, 0)
        group = tl.load(groups + expert * columns + first + step)
        place = (expert * group_count + group) * rows + row
        s = tl.load(scale + place, mask=inside, other=1.0)
        z = tl.zeros_like(s)
        if not SYMMETRIC:
            z = tl.load(zero + place, mask=inside, other=0.0)
        code = _code(x, s, z, QMIN, QMAX, FP8)
        error = tl.load(target + line, mask=inside, other=0.0) - (code - z) * s
        tl.store(codes + line, code, mask=inside)
        moved = error
        if DESCENT:
            moved = error - tl.load(old + line, mask=inside, other=0.0)
        tl.store(errors + line, error, mask=inside)
        change = tl.where((before == step)[:, None], moved[None, :], change)


def round_block(
    aim: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    groups: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    first: int,
    limits: tuple[int, int] | None,
    descent: bool,
) -> None:
    """Round columns first .. first + count of every weight, in place in codes and errors [E, K, N] float32.

    aim: [E, count, N], where each column would be rounded to but for changes inside the block. target: [E, K, N]. factor:
    [E, K, K]. scale, zero: [E, G, N]. groups: [E, K] int64. limits: smallest and largest code, None for E4M3. descent:
    errors hold those of the weight so far; else they are written only. All contiguous.
    """
    experts, count, rows = aim.shape
    columns = target.shape[1]
    low, high = limits or (0, 0)
    grid = (triton.cdiv(rows, _TILE), experts)
    _round_block[grid](
        aim, target, factor, scale, scale if zero is None else zero, groups, errors, codes, errors,
        rows, scale.shape[1], columns, count, first,
        BLOCK=triton.next_power_of_2(count), TILE=_TILE, QMIN=low, QMAX=high,
        FP8=limits is None, SYMMETRIC=zero is None, DESCENT=descent, num_warps=_WARPS,
    )  # fmt: skip
