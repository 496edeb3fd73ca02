# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of the factorization's blocks on the diagonal: Cholesky factor and its inverse, a whole stack in one launch.

The library takes a stack of small matrices in many short launches, one for each few columns, and a layer of M2 has thousands of
such blocks. Here a program holds a block and its inverse in registers and eliminates one column after the
other from both (right-looking, Golub and Van Loan, Matrix Computations, 4.2).
"""

import torch
import triton
import triton.language as tl

_WARPS = 16


@triton.jit(do_not_specialize=["start", "count", "columns"])
def _corner(lower, inverse, start, count, columns, SIZE: tl.constexpr):
    """Lines start .. start + count - 1 of one matrix, count at most SIZE; what lies beyond is the identity."""
    expert = tl.program_id(0).to(tl.int64)
    lower += (expert * columns + start) * columns + start
    inverse += expert * count * count
    line = tl.arange(0, SIZE)
    row, column = line[:, None], line[None, :]
    inside = (row < count) & (column < count)
    place = tl.maximum(row, column) * columns + tl.minimum(row, column)  # the lower triangle for both
    left = tl.load(lower + place, mask=inside, other=0.0)
    left = tl.where(inside, left, tl.where(row == column, 1.0, 0.0))
    found = tl.where(row == column, 1.0, 0.0)
    tl.debug_barrier()  # the loop writes where others may still read
    for step in range(0, count):
        across = tl.sum(tl.where(row == step, left, 0.0), 0)
        down = tl.sum(tl.where(column == step, left, 0.0), 1)
        pivot = tl.sqrt_rn(tl.sum(tl.where(line == step, across, 0.0), 0))  # not a number where there is no factor
        across = tl.where(line >= step, tl.div_rn(across, pivot), 0.0)
        down = tl.where(line >= step, tl.div_rn(down, pivot), 0.0)
        tl.store(lower + line * columns + step, down, mask=line < count)
        left -= down[:, None] * across[None, :]
        own = tl.div_rn(tl.sum(tl.where(row == step, found, 0.0), 0), pivot)
        taken = found - tl.where(line > step, down, 0.0)[:, None] * own[None, :]
        found = tl.where(row == step, own[None, :], taken)
    tl.store(inverse + row * count + column, found, mask=inside)


def corner(lower: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Factor the block start .. stop of lower [E, K, K], contiguous float32, in place; returns its inverse [E, B, B].

    Only the block's lower triangle is read; above it zeros are written. Not finite where the block is not positive definite.
    """
    count = stop - start
    inverse = lower.new_empty(len(lower), count, count)
    _corner[(len(lower),)](
        lower, inverse, start, count, lower.shape[1], SIZE=triton.next_power_of_2(count), num_warps=_WARPS
    )
    return inverse
