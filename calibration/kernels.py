# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the search, each the fused form of a plain function, against which it is tested.

    round_groups   fold, search the range, round: `round_weight.reference` in one read of the weight
    gate_rows      `ops.gated` on float32 rows, rounded to TF32 for the product that reads them

Arithmetic follows quant/integer.py step by step: IEEE division, the scale rounded to BF16 before it is used, halves to
even, the earlier factor on a tie. Only the order in which a group's errors are summed differs.
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

from m3quant.calibration.ranges import COARSE_FACTORS, FACTORS
from m3quant.families.spec import SILU, Activation
from m3quant.quant.integer import ZERO_GROUP_SCALE, int_range
from m3quant.schemes import Scheme

# Weights of a program, and its warps: on an H200 of five pairs this and (4096, 8) were the quickest, (4096, 4) 16 % slower.
_TILE = 2048
_WARPS = 4
_GROUP_SIZES = (32, 64, 128, 256)

_ZERO_GROUP_SCALE = tl.constexpr(ZERO_GROUP_SCALE)
_SCALE_FLOOR = tl.constexpr(torch.finfo(torch.float32).tiny)
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, halves to even.
_INTEGER = tl.constexpr(12582912.0)


def supports(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> bool:
    """Whether `round_groups` takes this weight: on a GPU, integer groups of 32 to 256, BF16 scales."""
    on_gpu = weight.is_cuda or triton.knobs.runtime.interpret
    kinds = scheme.kind == "int" and scheme.group_size in _GROUP_SIZES and scale_dtype == torch.bfloat16
    return bool(on_gpu and kinds and weight.dtype in (torch.bfloat16, torch.float32))


@triton.jit
def _to_bf16(x):
    """Nearest BF16 value, halves to even, still float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _to_tf32(x):
    """Nearest TF32 value (10 bits of mantissa), halves to even, still float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x0FFF + ((bits >> 13) & 1)) & -8192
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _divide(a, b, reciprocal, FMA: tl.constexpr):
    """a / b rounded to nearest, from RN(1 / b): one product, its exact remainder, one correction (Markstein 1990).

    Three instructions where an IEEE division takes about thirteen and one of the quarter-rate unit. Without hardware
    FMA (the interpreter) it divides.
    """
    if FMA:
        quotient = a * reciprocal
        return tl.fma(tl.fma(-quotient, b, a), reciprocal, quotient)
    return tl.div_rn(a, b)


@triton.jit
def _inverse(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _grid(low, high, factor, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr):
    """integer.int_qparams of groups with these ends [R], the range times |factor|; a negative factor turns the grid."""
    size = tl.abs(factor)
    low = tl.minimum(low * size, 0.0)
    high = tl.maximum(high * size, 0.0)
    span = tl.maximum(-low, high) * 2.0 if SYMMETRIC else high - low
    steps = tl.full(span.shape, QMAX - QMIN, tl.float32)
    scale = tl.div_rn(span, steps)
    scale = tl.where(scale == 0.0, _ZERO_GROUP_SCALE, scale)
    scale = tl.maximum(_to_bf16(scale), _SCALE_FLOOR)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = tl.minimum(tl.maximum(QMIN - tl.div_rn(low, scale), QMIN), QMAX)
        zero = (zero + _INTEGER) - _INTEGER
    return tl.where(factor < 0, -scale, scale), zero


@triton.jit
def _rounded(weight, scale, zero, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, FMA: tl.constexpr):
    """integer.dequantize(integer.quantize(weight)) of [R, GS] under scale and zero [R]."""
    wide = tl.broadcast_to(scale[:, None], weight.shape)
    code = _divide(weight, wide, tl.broadcast_to(_inverse(scale)[:, None], weight.shape), FMA)
    if not SYMMETRIC:
        code = code + zero[:, None]
    code = tl.minimum(tl.maximum(code, QMIN), QMAX)
    code = (code + _INTEGER) - _INTEGER
    if not SYMMETRIC:
        code = code - zero[:, None]
    return code * scale[:, None]


# Sizes are not specialized on, so that one compiled kernel serves w1, w3 and w2 of every model.
@triton.jit(do_not_specialize=["N", "G", "column_stride", "moment_stride"])
def _round_groups(
    weight, column, row, moment, factors, given, acting, shrink, before, after,
    N, G, column_stride, moment_stride,
    GS: tl.constexpr, R: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    SYMMETRIC: tl.constexpr, SIGNED: tl.constexpr, COLUMN: tl.constexpr, ROW: tl.constexpr,
    SEARCH: tl.constexpr, GIVEN: tl.constexpr, ERRORS: tl.constexpr, ACTING: tl.constexpr, DIFFERENCE: tl.constexpr,
    TF32: tl.constexpr, FACTORS: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    """R rows of one group column of one matrix; factors are tried in registers. Strides count groups."""
    batch = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) % G
    rows = (tl.program_id(0) // G) * R + tl.arange(0, R)
    inside = rows < N
    columns = group * GS + tl.arange(0, GS)
    line = batch * N + rows
    place = line[:, None] * (G * GS) + columns[None, :]
    source = tl.load(weight + place, mask=inside[:, None], other=0.0).to(tl.float32)
    folded = source
    if COLUMN:
        fold = tl.load(column + batch * column_stride * GS + columns)
        folded = folded * fold[None, :]
    if ROW:
        t = tl.load(row + line, mask=inside, other=1.0)
        folded = _divide(
            folded,
            tl.broadcast_to(t[:, None], folded.shape),
            tl.broadcast_to(_inverse(t)[:, None], folded.shape),
            FMA,
        )
    low = tl.min(folded, 1)
    high = tl.max(folded, 1)
    factor = tl.full(low.shape, 1.0, tl.float32)
    if GIVEN:
        factor = tl.load(given + line * G + group, mask=inside, other=1.0)
    if SEARCH:
        weights = tl.load(moment + batch * moment_stride * GS + columns)
        sign = factor
        if SIGNED:
            sign = tl.where(high > -low, -1.0, 1.0)
        scale, zero = _grid(low, high, factor, QMIN, QMAX, SYMMETRIC)
        error = folded - _rounded(folded, scale, zero, QMIN, QMAX, SYMMETRIC, FMA)
        best = tl.sum(error * error * weights[None, :], 1)
        if ERRORS:
            tl.store(before + line * G + group, best, mask=inside)
        for i in range(FACTORS):
            trial = sign * tl.load(factors + i)
            scale, zero = _grid(low, high, trial, QMIN, QMAX, SYMMETRIC)
            error = folded - _rounded(folded, scale, zero, QMIN, QMAX, SYMMETRIC, FMA)
            loss = tl.sum(error * error * weights[None, :], 1)
            better = loss < best
            best = tl.where(better, loss, best)
            factor = tl.where(better, trial, factor)
        tl.store(shrink + line * G + group, factor, mask=inside)
        if ERRORS:
            tl.store(after + line * G + group, best, mask=inside)
    if ACTING:
        scale, zero = _grid(low, high, factor, QMIN, QMAX, SYMMETRIC)
        value = _rounded(folded, scale, zero, QMIN, QMAX, SYMMETRIC, FMA)
        if ROW:
            value = value * t[:, None]
        if COLUMN:
            value = _divide(
                value,
                tl.broadcast_to(fold[None, :], value.shape),
                tl.broadcast_to(_inverse(fold)[None, :], value.shape),
                FMA,
            )
        if DIFFERENCE:
            value = value - source
        if TF32:
            value = _to_tf32(value)
        tl.store(acting + place, value, mask=inside[:, None])


def round_groups(
    weight: torch.Tensor,
    scheme: Scheme,
    column: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    moment: torch.Tensor | None = None,
    factors: tuple[float, ...] | None = None,
    shrink: torch.Tensor | None = None,
    signed: bool = True,
    *,
    acting: bool = True,
    errors: bool = False,
    difference: bool = False,
    tf32: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Fold, search and round weight [E, N, K] (BF16 or float32, `supports`) in one pass.

    column: [1, K] or [E, K] float32; row: [E, N] float32; folded = weight * column / row. moment: [1, K] or [E, K]
    float32, searched over `factors`; or shrink [E, N, G] float32 as given; neither: the full range.
    Returns (acting, shrink, before, after): q(folded) * row / column, minus the weight with `difference`, rounded to
    TF32 with `tf32` [E, N, K] float32; the factors; weighted errors at full and chosen range [E, N, G], with `errors`.
    """
    weight = weight.contiguous()
    experts, rows, columns = weight.shape
    size = scheme.group_size
    assert size is not None and columns % size == 0
    groups = columns // size
    qmin, qmax = int_range(scheme)
    search = moment is not None
    new: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    out = torch.empty(weight.shape, **new) if acting else None
    chosen = torch.empty(experts, rows, groups, **new) if search else None
    before, after = (torch.empty(experts, rows, groups, **new) if search and errors else None for _ in range(2))
    tried = torch.tensor(factors or (), **new)
    column, moment = (None if v is None else v.contiguous() for v in (column, moment))
    tile = min(_TILE // size, triton.next_power_of_2(rows))
    _round_groups[(groups * triton.cdiv(rows, tile), experts)](
        weight, column, None if row is None else row.contiguous(), moment, tried,
        None if shrink is None else shrink.contiguous(), out, chosen, before, after,
        rows, groups, _stride(column, groups), _stride(moment, groups),
        GS=size, R=tile, QMIN=qmin, QMAX=qmax, SYMMETRIC=scheme.symmetric, SIGNED=signed and scheme.symmetric,
        COLUMN=column is not None, ROW=row is not None, SEARCH=search, GIVEN=shrink is not None, ERRORS=search and errors,
        ACTING=acting, DIFFERENCE=difference, TF32=tf32, FACTORS=len(tried),
        FMA=not triton.knobs.runtime.interpret,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out, chosen, before, after


def _stride(values: torch.Tensor | None, groups: int) -> int:
    """Groups from one matrix's vector [K] to the next; 0 where all share one."""
    return 0 if values is None or values.shape[0] == 1 else groups


def warm_up(schemes: Iterable[Scheme], device: torch.device) -> None:
    """Compile what a layer's search launches for these schemes; some seconds that a first layer's read can hide."""
    for scheme in schemes:
        weight = torch.ones(1, 16, 2 * (scheme.group_size or 0), dtype=torch.bfloat16, device=device)
        if not weight.numel() or not supports(weight, scheme, torch.bfloat16):
            continue
        column = torch.ones(1, weight.shape[2], device=device)
        for factors, errors in ((FACTORS, True), (COARSE_FACTORS, False)):
            shrink = round_groups(weight, scheme, column, moment=column, factors=factors, errors=errors, tf32=True)[1]
        round_groups(weight, scheme, column, tf32=True)
        round_groups(weight, scheme, column, tf32=True, difference=True)
        row = torch.ones(1, 16, device=device)
        round_groups(weight, scheme, column, row, shrink=shrink, tf32=True)


@triton.jit
def _gate_rows(gate, up, out, total, alpha, limit, beta, SILU_GATE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    g = tl.load(gate + place, mask=inside, other=0.0)
    u = tl.load(up + place, mask=inside, other=0.0)
    if SILU_GATE:
        value = g / (1.0 + tl.exp(-g)) * u
    else:
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit)
        value = (u + beta) * g / (1.0 + tl.exp(-alpha * g))
    tl.store(out + place, _to_tf32(value), mask=inside)


def gate_rows(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """`ops.gated` of float32 tensors of one shape, rounded to TF32, written into `gate` and returned."""
    block = 4096
    gate, up = gate.contiguous(), up.contiguous()
    total = gate.numel()
    if total:
        _gate_rows[(triton.cdiv(total, block),)](
            gate, up, gate, total, act.alpha, act.limit, act.beta, SILU_GATE=act.kind == SILU, BLOCK=block, num_warps=8
        )
    return gate
