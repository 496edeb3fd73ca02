"""The column loop: round a weight one input channel at a time, each aimed at what the others' errors ask of it.

With d_j = T_j - Q_j the error of column j, column k is rounded to the grid point nearest to

    T_k + sum over j of d_j F_jk

for a factor F with zero diagonal. Two factors make the two algorithms of this package:

    sweep     F = M_jk / M_kk for j before k, H = M M^T with M upper triangular. That is GPTQ (arXiv:2210.17323): its
              update by the Cholesky factor of H^-1 is the same numbers, since that factor is M^-1. No inverse is taken.
    descent   F = H_jk / H_kk for all j. Every step is then the exact minimum over one column, so none raises
              tr (T - Q) H (T - Q)^T.
"""

import torch

from m3quant.calibration.feedback.grids import Grid, Levels
from m3quant.calibration.feedback.products import matmul
from m3quant.quant.integer import int_range

_BLOCK = 64  # columns between which errors travel one by one; beyond them by a matrix product


def round_columns(
    target: torch.Tensor,
    factor: torch.Tensor,
    levels: Levels,
    grid: Grid,
    groups: torch.Tensor,
    errors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every column once, in the order in which they are given.

    target: [E, K, N] float32, columns first. factor: [E, K, K] float32, zero diagonal; row j, column k as above.
    levels: scale and zero point [E, G, N]. groups: [E, K] int64, the group of each column. errors: [E, K, N], target
    minus the weight so far; None for a first sweep, where factor must be strictly upper triangular (errors of columns
    to come are zero). Returns codes [E, K, N] float32 and the new errors.
    """
    columns = target.shape[1]
    first = errors is None
    errors = torch.zeros_like(target) if errors is None else errors.clone()
    codes = torch.empty_like(target)
    one_block = _kernel_block if target.is_cuda else plain_block
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        seen = slice(0, start if first else columns)
        aim = target[:, start:stop] + matmul(factor[:, seen, start:stop].transpose(1, 2), errors[:, seen])
        one_block(aim, target, factor, levels, grid, groups, codes, errors, start, first)
    return codes, errors


def plain_block(
    aim: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor,
    levels: Levels,
    grid: Grid,
    groups: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    start: int,
    first: bool,
) -> None:
    """Round the columns that begin with number `start`, in place in codes and errors.

    aim: [E, B, N], where each would be rounded to but for changes inside the block; it is overwritten. first: errors of these
    columns are not read. The rest as in `round_columns`.
    """
    width = aim.shape[1]
    span = slice(start, start + width)
    inner, own = factor[:, span, span], levels.columns(groups[:, span])
    for offset in range(width):
        column = start + offset
        part = own.at(offset)
        code = grid.codes(aim[:, offset], part)
        error = target[:, column] - grid.values(code, part)
        if offset + 1 < width:
            change = error if first else error - errors[:, column]
            aim[:, offset + 1 :].addcmul_(inner[:, offset, offset + 1 :, None], change[:, None, :])
        codes[:, column], errors[:, column] = code, error


def _kernel_block(
    aim: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor,
    levels: Levels,
    grid: Grid,
    groups: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    start: int,
    first: bool,
) -> None:
    """`plain_block` in one launch."""
    from m3quant.calibration.feedback.kernels import round_block

    limits = None if grid.scheme.kind == "fp8" else int_range(grid.scheme)
    round_block(
        aim.contiguous(), target.contiguous(), factor.contiguous(), levels.scale.contiguous(),
        None if levels.zero is None else levels.zero.contiguous(), groups.contiguous(), codes, errors, start, limits, not first,
    )  # fmt: skip


def falling_order(second: torch.Tensor) -> torch.Tensor:
    """[E, K] int64: columns of second [E, K, K] by falling diagonal, ties to the earlier one."""
    return torch.sort(second.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True).indices


def sweep_factor(second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(F of the sweep [E, K, K], failed [E] bool) of second [E, K, K], symmetric and positive definite.

    Where the factorization fails, F is zero: plain rounding.
    """
    lower, info = torch.linalg.cholesky_ex(second.flip(1, 2))
    upper = lower.flip(1, 2)
    failed = (info != 0) | ~torch.isfinite(upper).flatten(1).all(1)
    factor = upper / upper.diagonal(dim1=1, dim2=2)[:, None, :]
    factor = torch.where(failed[:, None, None], 0.0, factor).triu_(1)
    return factor, failed


def descent_factor(second: torch.Tensor) -> torch.Tensor:
    """F of the descent: [E, K, K] with zero diagonal. second: positive diagonal."""
    factor = second / second.diagonal(dim1=1, dim2=2)[:, None, :]
    factor.diagonal(dim1=1, dim2=2).zero_()
    return factor


def permuted(second: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """second [E, K, K] with rows and columns in the order [E, K]."""
    rows = second.gather(1, order[:, :, None].expand_as(second))
    return rows.gather(2, order[:, None, :].expand_as(second))
