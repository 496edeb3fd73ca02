"""Second and cross moments of the rows that a weight reads.

Rows x [n, K] are the weight's inputs in the quantized stream, e [n, M] what the output (or, for M = K, the input) falls
short of the source's. Both are weighted, by the squared gate for an expert, as an error of it counts in the layer's output.

Sums are taken apart for two halves of the rows, which interleave by window, so that one half can judge what was
learnt from the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3quant.calibration.grouped import tf32

_ROWS = 4096  # of a block; blocks are added in float32


@dataclass
class Moments:
    """second: [2, K, K], sum of w x^T x; cross: [2, M, K], sum of w e^T x; both float32, of either half of the rows.

    mass, squares: [2] float64, sums of w and w^2 over the rows used. dropped: rows left out because they are not finite.
    """

    second: torch.Tensor
    cross: torch.Tensor
    mass: torch.Tensor
    squares: torch.Tensor
    dropped: int

    @property
    def effective_rows(self) -> float:
        """As many rows of equal weight tell as much (Kish 1965): (sum w)^2 / sum w^2."""
        mass, squares = float(self.mass.sum()), float(self.squares.sum())
        return mass * mass / squares if squares > 0 else 0.0


class MomentSum:
    """Collects `Moments` block by block. width: K; outputs: M."""

    def __init__(self, width: int, outputs: int, device: torch.device | str) -> None:
        self.second = torch.zeros(2, width, width, device=device)
        self.cross = torch.zeros(2, outputs, width, device=device)
        self.mass = torch.zeros(2, dtype=torch.float64, device=device)
        self.squares = torch.zeros(2, dtype=torch.float64, device=device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, x: torch.Tensor, error: torch.Tensor, weight: torch.Tensor, half: torch.Tensor) -> None:
        """x: [n, K], error: [n, M], any float dtype; weight: [n] float32; half: [n] bool, True for the second half.

        A row that is not finite has no part; its number is kept.
        """
        for start in range(0, len(x), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add(x[rows].float(), error[rows].float(), weight[rows].float(), half[rows])

    def _add(self, x: torch.Tensor, error: torch.Tensor, weight: torch.Tensor, half: torch.Tensor) -> None:
        usable = torch.isfinite(x).all(1) & torch.isfinite(error).all(1) & torch.isfinite(weight)
        self.dropped += (~usable).sum()
        x, error = (torch.where(usable[:, None], part, 0.0) for part in (x, error))
        weight = torch.where(usable, weight, 0.0)
        for index in range(2):
            own = torch.where(half == bool(index), weight, 0.0)
            scaled = (x * own[:, None]).T
            with tf32():
                self.second[index].addmm_(scaled, x)
                self.cross[index].addmm_(error.T, scaled.T)
            self.mass[index] += own.sum(dtype=torch.float64)
            self.squares[index] += own.double().square().sum()

    def total(self) -> Moments:
        return Moments(self.second, self.cross, self.mass, self.squares, int(self.dropped))


def halves(tokens: int, window: int, device: torch.device | str) -> torch.Tensor:
    """[T] bool: which half every token of T = S * window belongs to. Windows alternate; a lone window's quarters do."""
    step = window if tokens >= 2 * window else max(1, tokens // 4)
    return (torch.arange(tokens, device=device) // step) % 2 == 1
