"""The weight to aim at: the one that best gives the source's output from the quantized stream's input.

With x a row of the quantized stream, e = y' - x W^T what the source's output y' of the same token is ahead of it:

    T = W + (sum w e^T x) (sum w x^T x + ridge)^-1        minimises  sum w |y' - x T^T|^2 + ridge |T - W|^2

(GPTAQ, arXiv:2504.02692, with the ridge pulling towards W and not towards zero.)
"""

import torch


def targets(
    weight: torch.Tensor, cross: torch.Tensor, second: torch.Tensor, ridge: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T [E, N, K] float32, failed [E] bool). weight, cross: [E, N, K] float32; second: [E, K, K]; ridge: [E], added to the diagonal.

    Where the system cannot be solved, or the result is not finite, T is the weight.
    """
    system = second.clone()
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    lower, info = torch.linalg.cholesky_ex(system)
    step = torch.cholesky_solve(cross.transpose(1, 2), lower).transpose(1, 2)
    failed = (info != 0) | ~torch.isfinite(step).flatten(1).all(1)
    return torch.where(failed[:, None, None], weight, weight + step), failed
