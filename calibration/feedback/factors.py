"""Cholesky factors of stacks of moments, and solutions by them.

On a GPU the library factors one matrix of a stack after the other, and its solver by columns keeps a small part of the machine
busy. Here a stack goes through blocks of columns together (left-looking, Golub and Van Loan, Matrix Computations, 4.2): the
diagonal block by the library, all else by batched products in float32. On a CPU the library's own is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3quant.calibration.precision import full_float32

_BLOCK = 256  # columns


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
        with full_float32():
            return self._solved(right)

    def _solved(self, right: torch.Tensor) -> torch.Tensor:
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
    """Factors of matrix [E, K, K], symmetric, float32 (on a CPU also float64); only its lower triangle is read.

    On a GPU the factors take its place.
    """
    if matrix.is_cuda:
        with full_float32():
            return blocked(matrix)
    lower, info = torch.linalg.cholesky_ex(matrix)
    return Factored(lower, (info != 0) | _not_finite(lower), [])


def blocked(matrix: torch.Tensor) -> Factored:
    """`cholesky` in blocks of columns, on any device, in place where matrix is contiguous."""
    lower, columns = matrix.contiguous(), matrix.shape[1]
    inverses = []
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        if start:
            done, own = lower[:, start:, :start], lower[:, start:stop, :start]
            lower[:, start:, start:stop].baddbmm_(done, own.transpose(1, 2), alpha=-1)
        inverse = _corner(lower, start, stop)
        if stop < columns:
            lower[:, stop:, start:stop] = torch.bmm(lower[:, stop:, start:stop], inverse.transpose(1, 2))
        inverses.append(inverse)
    lower.tril_()
    return Factored(lower, _not_finite(lower), inverses)


def _corner(lower: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Factor a block on the diagonal of lower [E, K, K] in place; its inverse. Not finite where there is none."""
    block = lower[:, start:stop, start:stop]
    factor, info = torch.linalg.cholesky_ex(block)
    block.copy_(torch.where((info != 0)[:, None, None], torch.nan, factor))
    unit = torch.eye(stop - start, dtype=lower.dtype, device=lower.device).expand_as(block)
    inverse: torch.Tensor = torch.linalg.solve_triangular(block, unit, upper=False)
    return inverse


def _not_finite(values: torch.Tensor) -> torch.Tensor:
    """[E] bool. A sum is not finite if one of its parts is not."""
    return ~torch.isfinite(values.sum(dim=(1, 2)))
