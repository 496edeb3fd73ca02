"""The scales of a row that best fit its target for given codes.

For fixed codes a row of the weight is linear in its scales s: q = sum over groups g of s_g b_g, where b_g holds the
codes less the zero point in the columns of g and zeros elsewhere. With d = t - q, a change D of the scales makes the loss

    d H d^T - 2 sum over g of D_g b_g H d^T + sum over g, h of D_g D_h b_g H b_h^T

which is least where sum over h of (b_g H b_h^T) D_h = b_g H d^T for every g. Written as a change, what is multiplied is the
error, not the target, which is ten to a hundred times as large: products in TF32 are good enough, and the new loss follows.
"""

from dataclasses import dataclass

import torch

from m3quant.calibration.feedback.products import matmul
from m3quant.calibration.precision import full_float32
from m3quant.quant.integer import round_scale

_RELATIVE = 1e-6  # of the mean diagonal, added to it: a group of zero codes, or two that say the same, stays solvable
_KERNEL_SIZES = (32, 64, 128)  # columns of a group that `gram_kernel` takes


@dataclass
class Refitted:
    """scale: [E, G, N], those of a row as they were where its loss would not fall. gain: [E, N], by how much it falls."""

    scale: torch.Tensor
    gain: torch.Tensor


def refit(
    points: torch.Tensor,
    scale: torch.Tensor,
    errors: torch.Tensor,
    second: torch.Tensor,
    size: int,
    dtype: torch.dtype | None,
) -> Refitted:
    """Better scales for points [E, K, N] of any float dtype: the codes less their zero points, columns in their natural order.

    scale: [E, G, N]; errors: [E, K, N], target minus points * scale; second: [E, K, K]; size: columns of a group. dtype: what
    scales are stored in; None keeps float32. A scale that would be zero, change its sign, not finite or more than four
    times another stays as it was.
    """
    count = points.shape[1] // size
    pull = _grouped(points, matmul(second, errors), count)
    gram = gram_matrices(points, second, size)
    diagonal = gram.diagonal(dim1=2, dim2=3)
    floor = (diagonal.mean(-1, keepdim=True) * _RELATIVE).clamp(min=torch.finfo(torch.float32).tiny)
    # What is added to the diagonal pulls the change towards zero, so that a group without information keeps its scale.
    system = gram.clone()
    system.diagonal(dim1=2, dim2=3).add_(floor)
    old = scale.transpose(1, 2)
    with full_float32():
        found = old + torch.linalg.solve_ex(system, pull[..., None])[0][..., 0]
    ratio = found / old
    new = torch.where(torch.isfinite(ratio) & (ratio > 0.25) & (ratio < 4.0), found, old)
    if dtype is not None:
        limits = torch.finfo(dtype)
        new = torch.where((new.abs() <= limits.max) & (new.abs() >= limits.tiny), new, old)
        new = round_scale(new, dtype)
    change = new - old
    with full_float32():
        back = (gram @ change[..., None])[..., 0]
    gain = (change * (2 * pull - back)).sum(-1)
    better = gain > 0
    new = torch.where(better[..., None], new, old)
    return Refitted(new.transpose(1, 2).contiguous(), torch.where(better, gain, 0.0))


def gram_matrices(points: torch.Tensor, second: torch.Tensor, size: int) -> torch.Tensor:
    """[E, N, G, G]: b_g H b_h^T of every row."""
    if points.is_cuda and size in _KERNEL_SIZES:
        from m3quant.calibration.feedback.gram_kernel import gram

        return gram(points, second, size)
    return plain_gram(points.to(second.dtype), second, size)


def plain_gram(points: torch.Tensor, second: torch.Tensor, size: int) -> torch.Tensor:
    """`gram_matrices` by products of whole groups of columns: one triangle, and its mirror image."""
    experts, columns, rows = points.shape
    count = columns // size
    gram = points.new_empty(experts, rows, count, count)
    for group in range(count):
        first = group * size
        moved = matmul(second[:, first:, first : first + size], points[:, first : first + size])
        own = _grouped(points[:, first:], moved, count - group)
        gram[:, :, group:, group] = own
        gram[:, :, group, group:] = own
    return gram


def _grouped(points: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of points * values [E, K, N] over each of `count` groups of columns: [E, N, G]."""
    return torch.unflatten(points * values, 1, (count, -1)).sum(2).transpose(1, 2)
