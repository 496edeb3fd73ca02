"""Second and cross moments of the rows that a weight reads.

Rows x [n, K] are the weight's inputs in the quantized stream; e [n, M] is how far the weight's output (or its input, M = K)
falls short of the source's. Both count by the squared gate for an expert, as an error of it counts in the layer's output.

Sums are kept apart for two halves of the rows, so that one can judge what was learnt from the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3quant.calibration.grouped import tf32

_ROWS = 4096  # of a block; blocks are added in float32
HALVES = (0, 1)


@dataclass
class Moments:
    """second: [2, K, K], sum of w x^T x; cross: [2, M, K], sum of w e^T x; float32, one of each half of the rows.

    mass, squares: sums of w and of w^2 over the rows of each half. dropped: rows left out because they are not finite.
    """

    second: torch.Tensor
    cross: torch.Tensor
    mass: tuple[float, float]
    squares: tuple[float, float]
    dropped: int

    def of(self, half: int | None) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """(second, cross, mass, effective rows) of one half, or of all rows for None.

        Effective rows (Kish 1965), (sum w)^2 / sum w^2: as many rows of equal weight tell as much.
        """
        if half is None:
            second, cross = self.second[0] + self.second[1], self.cross[0] + self.cross[1]
            mass, squares = sum(self.mass), sum(self.squares)
        else:
            second, cross = self.second[half], self.cross[half]
            mass, squares = self.mass[half], self.squares[half]
        return second, cross, mass, mass * mass / squares if squares > 0 else 0.0


class MomentSum:
    """Collects `Moments` block by block. width: K; outputs: M."""

    def __init__(self, width: int, outputs: int, device: torch.device | str) -> None:
        self.second = torch.zeros(2, width, width, device=device)
        self.cross = torch.zeros(2, outputs, width, device=device)
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, x: torch.Tensor, error: torch.Tensor, weight: torch.Tensor, half: torch.Tensor) -> None:
        """x: [n, K], error: [n, M], any float dtype; weight: [n] float32; half: [n] bool, True for the second half.

        A row that is not finite has no part in the sums; how many there were is kept.
        """
        for start in range(0, len(x), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add(x[rows].float(), error[rows].float(), weight[rows].float(), half[rows])

    def _add(self, x: torch.Tensor, error: torch.Tensor, weight: torch.Tensor, half: torch.Tensor) -> None:
        usable = torch.isfinite(x).all(1) & torch.isfinite(error).all(1) & torch.isfinite(weight)
        self.dropped += (~usable).sum()
        for index in HALVES:
            rows = (usable & (half == bool(index))).nonzero()[:, 0]
            own, scaled = weight[rows], x[rows]
            with tf32():
                self.cross[index].addmm_((error[rows] * own[:, None]).T, scaled)
                self.second[index].addmm_((scaled * own[:, None]).T, scaled)
            self.sums[0, index] += own.sum(dtype=torch.float64)
            self.sums[1, index] += own.double().square().sum()

    def total(self) -> Moments:
        mass, squares = self.sums.tolist()
        return Moments(self.second, self.cross, (mass[0], mass[1]), (squares[0], squares[1]), int(self.dropped))


def halves(tokens: int, window: int, device: torch.device | str) -> torch.Tensor:
    """[T] bool: the half that every token of T = S * window belongs to: the later windows, or the end of a lone one.

    Not every other window: neighbours may come from one document, and then judge one another too kindly.
    """
    first = -(-(tokens // window) // 2) * window if tokens >= 2 * window else tokens // 2
    return torch.arange(tokens, device=device) >= first
