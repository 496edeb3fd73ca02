"""Matrix products of stacks whose results do not depend on how many matrices are in the stack.

On a CPU each matrix is multiplied by itself, because a batched routine may split its work by the size of the batch. On a GPU chunks of experts are the same however many
processes share them, so one batched call gives the same bytes.
"""

import torch


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [E, M, K] times b [E, K, N] -> [E, M, N], in full float32 (or float64)."""
    if a.is_cuda:
        return torch.bmm(a, b)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for index in range(len(a)):
        torch.mm(a[index], b[index], out=out[index])
    return out
