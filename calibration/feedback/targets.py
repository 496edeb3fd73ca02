"""The target weight: the one that best gives the source's output from the quantized stream's input.

With x a row of the quantized stream, e = y' - x W^T the difference of the source's output y' of the same token from it:

    T = W + (sum w e^T x) (sum w x^T x + ridge)^-1        minimises  sum w |y' - x T^T|^2 + ridge |T - W|^2

(GPTAQ, arXiv:2504.02692, with the ridge pulling towards W and not towards zero.)
"""

import torch

from m3quant.calibration.feedback.factors import cholesky


def targets(
    weight: torch.Tensor, cross: torch.Tensor, second: torch.Tensor, ridge: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T [E, N, K] float32, failed [E] bool). weight, cross: [E, N, K] float32; second: [E, K, K]; ridge: [E], added to the diagonal.

    Where the system cannot be solved, or the result is not finite, T is the weight.
    """
    system = second.clone()
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    factored = cholesky(system)
    step = factored.solve(cross.transpose(1, 2).contiguous()).transpose(1, 2)
    failed = factored.failed | ~torch.isfinite(step.sum(dim=(1, 2)))
    return torch.where(failed[:, None, None], weight, weight + step), failed
