"""Matrix products of stacks whose results do not depend on how many matrices are in the stack.

On a CPU each matrix is multiplied separately, because a batched routine may split its work by the size of the batch. On a GPU chunks of experts do not depend on how many
processes share them, so one batched call gives the same bytes.

On a GPU the tensor cores read float32 as TF32 (10 bits of mantissa). What these products give is added to targets as a
correction of about half a step of the grid, or compared between candidates that differ by percents, so that a relative error
of 1e-3 moves a code in a thousand to its neighbour at most. Factorizations stay in float32.
"""

import torch

from m3quant.calibration.precision import tf32


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [E, M, K] times b [E, K, N] -> [E, M, N], in full float32 (or float64); on a GPU in TF32, summed in float32."""
    if a.is_cuda:
        with tf32():
            return torch.bmm(a, b)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for index in range(len(a)):
        torch.mm(a[index], b[index], out=out[index])
    return out


def added(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """base [E, M, N] + a b, as `matmul`; a new tensor. On a GPU in one pass over the result in place of three."""
    if a.is_cuda:
        with tf32():
            return torch.baddbmm(base, a, b)
    return matmul(a, b).add_(base)
