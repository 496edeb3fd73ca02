"""Second and cross moments of the rows that a weight reads.

Rows x [n, K] are the weight's inputs in the quantized stream; e [n, M] is how far the weight's output (or its input, M = K)
differs from the source's. Both are weighted by the squared gate for an expert, as an error of it counts in the layer's output.

Sums are kept apart for two halves of the rows, so that one half can test what was computed from the other.
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

    mass, squares: [2] float64, sums of w and of w^2 over the rows of each half. dropped: int64, rows left out because they are
    not finite. All on the device, which a number fetched from it would keep waiting.
    """

    second: torch.Tensor
    cross: torch.Tensor
    mass: torch.Tensor
    squares: torch.Tensor
    dropped: torch.Tensor

    def of(self, half: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(second, cross, mass, effective rows) of one half, or of all rows for None; mass and rows float64 scalars.

        Effective rows (Kish 1965), (sum w)^2 / sum w^2: as many rows of equal weight tell as much. 0 without a row.
        """
        if half is None:
            second, cross = self.second[0] + self.second[1], self.cross[0] + self.cross[1]
            mass, squares = self.mass.sum(), self.squares.sum()
        else:
            second, cross = self.second[half], self.cross[half]
            mass, squares = self.mass[half], self.squares[half]
        return second, cross, mass, torch.where(squares > 0, mass * mass / squares, 0.0)


class MomentSum:
    """Collects `Moments` block by block. width: K; outputs: M."""

    def __init__(self, width: int, outputs: int, device: torch.device | str) -> None:
        self.second = torch.zeros(2, width, width, device=device)
        self.cross = torch.zeros(2, outputs, width, device=device)
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, x: torch.Tensor, error: torch.Tensor, weight: torch.Tensor, half: torch.Tensor | int) -> None:
        """x: [n, K], error: [n, M], any float dtype; weight: [n] float32; half: that of all rows, or [n] bool, True for the second.

        A row that is not finite has no part in the sums; how many there were is kept.
        """
        for start in range(0, len(x), _ROWS):
            rows = slice(start, start + _ROWS)
            given = x[rows].float(), error[rows].float(), weight[rows].float()
            if isinstance(half, int):
                self._add(*given, half)
                continue
            for index in HALVES:
                own = (half[rows] == bool(index)).nonzero()[:, 0]
                inputs, errors, weights = (part[own] for part in given)
                self._add(inputs, errors, weights, index)

    def _add(self, x: torch.Tensor, error: torch.Tensor, weight: torch.Tensor, half: int) -> None:
        # The sum of a row is not finite if one of its numbers is not, or if they are near the end of float32.
        usable = torch.isfinite(x.sum(1) + error.sum(1) + weight)
        self.dropped += (~usable).sum()
        weight = torch.where(usable, weight, 0.0)
        x, error = (torch.where(usable[:, None], part, 0.0) for part in (x, error))
        with tf32():
            self.cross[half].addmm_((error * weight[:, None]).T, x)
            self.second[half].addmm_((x * weight[:, None]).T, x)
        self.sums[0, half] += weight.sum(dtype=torch.float64)
        self.sums[1, half] += weight.double().square().sum()

    def total(self) -> Moments:
        return Moments(self.second, self.cross, self.sums[0], self.sums[1], self.dropped)


def boundary(tokens: int, window: int) -> int:
    """The first of T = S * window tokens that belongs to the second half: the later windows, or the end of a lone one.

    Not every other window: neighbours may come from one document, so that a test of one by the other would be too favourable.
    """
    return -(-(tokens // window) // 2) * window if tokens >= 2 * window else tokens // 2
