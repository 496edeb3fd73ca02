"""Cholesky factors of stacks of moments, and solutions by them.

On a GPU the library factors one matrix of a stack after the other, and its solver by columns keeps a small part of the machine
busy. Here a stack goes through blocks of columns together (left-looking, Golub and Van Loan, Matrix Computations, 4.2): the
diagonal block by the library, all else by batched products in float32. On a CPU the library's own is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_BLOCK = 256


@dataclass(frozen=True)
class Factored:
    """lower: [E, K, K], A = lower lower^T. failed: [E] bool, where A is not positive definite or not finite and lower is unusable.

    inverses: those of the diagonal blocks, on a GPU.
    """

    lower: torch.Tensor
    failed: torch.Tensor
    inverses: list[torch.Tensor]

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """A^-1 right, [E, K, M]; not finite where the factor failed."""
        if not self.inverses:
            return torch.cholesky_solve(right, self.lower)
        out, columns = right.clone(), self.lower.shape[1]
        starts = range(0, columns, _BLOCK)
        for start, inverse in zip(starts, self.inverses, strict=True):
            span = slice(start, start + _BLOCK)
            if start:
                out[:, span].baddbmm_(self.lower[:, span, :start], out[:, :start], alpha=-1)
            out[:, span] = torch.bmm(inverse, out[:, span])
        for start, inverse in reversed(list(zip(starts, self.inverses, strict=True))):
            span, stop = slice(start, start + _BLOCK), min(start + _BLOCK, columns)
            if stop < columns:
                out[:, span].baddbmm_(self.lower[:, stop:, span].transpose(1, 2), out[:, stop:], alpha=-1)
            out[:, span] = torch.bmm(inverse.transpose(1, 2), out[:, span])
        return out


def cholesky(matrix: torch.Tensor) -> Factored:
    """Factors of matrix [E, K, K], symmetric, float32 or float64; only its lower triangle is read."""
    if matrix.is_cuda:
        return blocked(matrix)
    lower, info = torch.linalg.cholesky_ex(matrix)
    return Factored(lower, (info != 0) | _not_finite(lower), [])


def blocked(matrix: torch.Tensor) -> Factored:
    """`cholesky` in blocks of columns, on any device."""
    lower, columns = matrix.clone(), matrix.shape[1]
    failed = torch.zeros(len(matrix), dtype=torch.bool, device=matrix.device)
    inverses = []
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        if start:
            done, own = lower[:, start:, :start], lower[:, start:stop, :start]
            lower[:, start:, start:stop].baddbmm_(done, own.transpose(1, 2), alpha=-1)
        corner, info = torch.linalg.cholesky_ex(lower[:, start:stop, start:stop].contiguous())
        failed |= info != 0
        unit = torch.eye(stop - start, dtype=matrix.dtype, device=matrix.device).expand_as(corner)
        inverse = torch.linalg.solve_triangular(corner, unit, upper=False)
        lower[:, start:stop, start:stop] = corner
        if stop < columns:
            lower[:, stop:, start:stop] = torch.bmm(lower[:, stop:, start:stop], inverse.transpose(1, 2))
        inverses.append(inverse)
    lower.tril_()
    return Factored(lower, failed | _not_finite(lower), inverses)


def _not_finite(values: torch.Tensor) -> torch.Tensor:
    """[E] bool. A sum is not finite if one of its parts is not."""
    return ~torch.isfinite(values.sum(dim=(1, 2)))
