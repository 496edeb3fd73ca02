"""The column loop: round a weight one input channel at a time, each to the value that best compensates the errors of the others.

With d_j = T_j - Q_j the error of column j, column k is rounded to the grid point nearest to

    x_k = T_k + sum over j of d_j F_kj

for a factor F with zero diagonal. Two factors make the two algorithms of this package:

    sweep     F_kj = M_jk / M_kk for j before k, H = M M^T with M upper triangular. That is GPTQ (arXiv:2210.17323): its
              update by the Cholesky factor of H^-1 is the same numbers, since that factor is M^-1. No inverse is taken.
    descent   F_kj = H_kj / H_kk for all j. Every step is then the exact minimum over one column, so none raises
              tr (T - Q) H (T - Q)^T.

Both know the objective on the way: d H d^T = |d M|^2 = sum over k of M_kk^2 (x_k - Q_k)^2 after a sweep, and a step of
the descent changes it by H_kk ((x_k - Q_k)^2 - (x_k - Q_k before)^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3quant.calibration.feedback.factors import cholesky
from m3quant.calibration.feedback.grids import Grid, Levels
from m3quant.calibration.feedback.products import added, matmul

_BLOCK = {"cuda": 256, "cpu": 64}  # columns whose errors reach the later ones by one large product
# Codes while they are changed. BF16 holds the integers of 8 bits and all of E4M3, in half the bytes of every pass over them.
CODES_ON_GPU = torch.bfloat16
PART = 16  # and within a block, those between which errors travel one by one


@dataclass(frozen=True)
class Factor:
    """lines: [E, K, K], row k holds F_k. weight: [E, K], of (x_k - Q_k)^2 in the objective.

    failed: [E] bool, where there is no factor: F is zero, and infinite weights keep the loss from ever being the lower one.
    """

    lines: torch.Tensor
    weight: torch.Tensor
    failed: torch.Tensor


@dataclass
class Rounded:
    """codes, errors: [E, K, N] in the order of the loop. loss: [E, N], the objective after a sweep, its change by a descent."""

    codes: torch.Tensor
    errors: torch.Tensor
    loss: torch.Tensor


@dataclass
class Block:
    """What the steps of one block need and give.

    aim: [E, B, N] contiguous, where each column would be rounded to but for changes inside the block; overwritten. target: [E, B, N].
    inner: [E, B, B], F of the block, row j to column k, contiguous. levels: of its columns, [E, B, N] contiguous. weight: [E, B].
    codes, errors: [E, B, N], written; errors hold those so far before a descent. moved: what errors changed by, errors itself
    in a sweep.
    """

    aim: torch.Tensor
    target: torch.Tensor
    inner: torch.Tensor
    levels: Levels
    weight: torch.Tensor
    codes: torch.Tensor
    errors: torch.Tensor
    moved: torch.Tensor
    descent: bool


def round_columns(
    target: torch.Tensor,
    factor: Factor,
    levels: Levels,
    grid: Grid,
    groups: torch.Tensor,
    errors: torch.Tensor | None = None,
) -> Rounded:
    """Round every column once, in the order in which they are given.

    target: [E, K, N] float32, columns first. levels: scale and zero point [E, G, N]. groups: [E, K] int64, the group of each
    column. errors: [E, K, N], target minus the weight so far; overwritten. None for a sweep, whose F_kj is zero for j from k on.
    """
    experts, columns, rows = target.shape
    first = errors is None
    errors = torch.empty_like(target) if errors is None else errors
    out = Rounded(
        torch.empty_like(target, dtype=CODES_ON_GPU if target.is_cuda else target.dtype),
        errors,
        target.new_zeros(experts, rows),
    )
    width = _BLOCK[target.device.type]
    step = kernel_block if target.is_cuda else plain_block
    for start in range(0, columns, width):
        span = slice(start, min(start + width, columns))
        part, seen = errors[:, span], slice(0, start if first else columns)
        own = target[:, span]
        aim = added(own, factor.lines[:, span, seen], errors[:, seen]) if seen.stop else own.clone()
        block = Block(
            aim,
            own,
            factor.lines[:, span, span].transpose(1, 2).contiguous(),
            levels.columns(groups[:, span]),
            factor.weight[:, span].contiguous(),
            out.codes[:, span],
            part,
            part if first else torch.empty_like(aim),
            not first,
        )
        step(block, grid, out.loss)
    return out


def plain_block(block: Block, grid: Grid, loss: torch.Tensor) -> None:
    """Round the block's columns one after the other; their part of the objective is added to loss [E, N]."""
    aim, width = block.aim, block.aim.shape[1]
    old = block.errors.clone() if block.descent else None
    for begin in range(0, width, PART):
        stop = min(begin + PART, width)
        for column in range(begin, stop):
            level = block.levels.at(column)
            code = grid.codes(aim[:, column], level)
            error = block.target[:, column] - grid.values(code, level)
            block.codes[:, column], block.errors[:, column] = code, error
            if old is not None:
                block.moved[:, column] = error - old[:, column]
            later = slice(column + 1, stop)
            aim[:, later].addcmul_(block.inner[:, column, later, None], block.moved[:, column, None])
        if stop < width:
            aim[:, stop:] += matmul(block.inner[:, begin:stop, stop:].transpose(1, 2), block.moved[:, begin:stop])
    # A column of aim is not touched after its own step, so each still holds x_k.
    ahead, weight = aim - block.target, block.weight[:, :, None]
    loss += ((ahead + block.errors).square_() * weight).sum(1)
    if old is not None:
        loss -= ((ahead + old).square_() * weight).sum(1)


def kernel_block(block: Block, grid: Grid, loss: torch.Tensor) -> None:
    """`plain_block` in one launch."""
    from m3quant.calibration.feedback.kernels import round_block

    round_block(block, loss, grid.limits)


def falling_order(second: torch.Tensor) -> torch.Tensor:
    """[E, K] int64: columns of second [E, K, K] by falling diagonal, ties to the earlier one."""
    return torch.sort(second.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True).indices


def sweep_factor(second: torch.Tensor) -> Factor:
    """The sweep's factor of second [E, K, K], symmetric and positive definite. Zero where it has none: plain rounding."""
    factored = cholesky(second.flip(1, 2))
    # H reversed is L L^T, so M is L reversed; F_kj = M_jk / M_kk.
    lines = factored.lower.flip(1, 2).transpose(1, 2).contiguous()
    diagonal = lines.diagonal(dim1=1, dim2=2).clone()
    lines /= diagonal[:, :, None]
    lines.tril_(-1).masked_fill_(factored.failed[:, None, None], 0.0)
    weight = torch.where(factored.failed[:, None], torch.inf, diagonal.square_())
    return Factor(lines, weight, factored.failed)


def descent_factor(second: torch.Tensor) -> Factor:
    """The descent's factor of second [E, K, K] with a positive diagonal."""
    diagonal = second.diagonal(dim1=1, dim2=2)
    lines = second / diagonal[:, :, None]
    lines.diagonal(dim1=1, dim2=2).zero_()
    return Factor(lines, diagonal.clone(), torch.zeros(len(second), dtype=torch.bool, device=second.device))


def permuted(second: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """second [E, K, K] with rows and columns in the order [E, K]."""
    rows = second.gather(1, order[:, :, None].expand_as(second))
    return rows.gather(2, order[:, None, :].expand_as(second))
