"""The scales of a row that best fit its target for given codes.

For fixed codes a row of the weight is linear in its scales s: q = sum over groups g of s_g b_g, where b_g holds the
codes less the zero point in the columns of g and zeros elsewhere. (t - q) H (t - q)^T is least where

    sum over g' of (b_g H b_g'^T) s_g' = b_g H t^T        for every g.
"""

import torch

from m3quant.calibration.feedback.grids import Levels
from m3quant.calibration.feedback.products import matmul
from m3quant.quant.integer import round_scale

_RELATIVE = 1e-6  # of the mean diagonal, added to it: a group of zero codes, or two that say the same, stays solvable


def refit(
    codes: torch.Tensor,
    levels: Levels,
    target: torch.Tensor,
    second: torch.Tensor,
    size: int,
    dtype: torch.dtype | None,
) -> Levels:
    """New levels for codes [E, K, N], columns in their natural order.

    target: [E, K, N]; second: [E, K, K]; size: columns of a group. dtype: what scales are stored in; None keeps float32.
    A scale that would be zero, change its sign, not finite or more than four times another stays as it was.
    """
    experts, columns, rows = codes.shape
    count = columns // size
    points = codes if levels.zero is None else codes - _spread(levels.zero, size)
    wanted = matmul(second, target)
    rhs = torch.unflatten(points * wanted, 1, (count, size)).sum(2).transpose(1, 2)
    gram = codes.new_empty(experts, rows, count, count)
    for group in range(count):
        span = slice(group * size, (group + 1) * size)
        moved = matmul(second[:, :, span], points[:, span])
        gram[:, :, group] = torch.unflatten(moved * points, 1, (count, size)).sum(2).transpose(1, 2)
    diagonal = gram.diagonal(dim1=2, dim2=3)
    mean = diagonal.mean(-1, keepdim=True)
    floor = (mean * _RELATIVE).clamp(min=torch.finfo(torch.float32).tiny)
    old = levels.scale.transpose(1, 2)
    # What is added to the diagonal pulls towards the old scale, so that a group that tells nothing keeps it.
    found = torch.linalg.solve_ex(gram + torch.diag_embed(floor.expand_as(old)), (rhs + floor * old)[..., None])[0][
        ..., 0
    ]
    ratio = found / old
    usable = torch.isfinite(ratio) & (ratio > 0.25) & (ratio < 4.0)
    scale = torch.where(usable, found, old)
    if dtype is not None:
        limits = torch.finfo(dtype)
        scale = torch.where((scale.abs() <= limits.max) & (scale.abs() >= limits.tiny), scale, old)
        scale = round_scale(scale, dtype)
    return Levels(scale.transpose(1, 2).contiguous(), levels.zero)


def _spread(values: torch.Tensor, size: int) -> torch.Tensor:
    """[E, G, N] -> [E, G * size, N]."""
    return values.repeat_interleave(size, dim=1)
