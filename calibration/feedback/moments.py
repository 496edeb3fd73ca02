"""Second and cross moments of the rows that a stack of weights reads.

Rows x [n, K] are a weight's inputs in the quantized stream; e [n, M] is how far the weight's output (or its input, M = K)
differs from the source's. Both are weighted by the squared gate for an expert, as an error of it counts in the layer's output.

Sums are kept apart for two halves of the rows, so that one half can test what was computed from the other. Rows of many experts
pass through everything but the products together, side by side in one block: expert by expert, a GPU waits for launches longer
than for the products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from m3quant.calibration.precision import tf32

ROWS = 4096  # of one product; what products give is added in float32
HALVES = (0, 1)


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of a block that belong to one half of one unit's."""

    unit: int
    half: int
    rows: slice

    def pieces(self) -> Iterator[slice]:
        """The rows in order, `ROWS` at most together."""
        for start in range(self.rows.start, self.rows.stop, ROWS):
            yield slice(start, min(start + ROWS, self.rows.stop))


@dataclass
class Moments:
    """Of E units. second: [2, E, K, K], sum of w x^T x; cross: [2, E, M, K], sum of w e^T x; float32, halves first.

    mass, squares: [2, E] float64, sums of w and of w^2 over the rows of each half. dropped: [E] int64, rows left out because
    they are not finite. All on the device, which a number fetched from it would keep waiting.
    """

    second: torch.Tensor
    cross: torch.Tensor
    mass: torch.Tensor
    squares: torch.Tensor
    dropped: torch.Tensor

    def __len__(self) -> int:
        return len(self.dropped)

    def of(self, half: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(second, cross, mass, effective rows) of one half, as views, or of all rows for None; mass and rows [E] float64.

        Effective rows (Kish 1965), (sum w)^2 / sum w^2: as many rows of equal weight tell as much. 0 without a row.
        """
        if half is None:
            second, cross = self.second[0] + self.second[1], self.cross[0] + self.cross[1]
            mass, squares = self.mass[0] + self.mass[1], self.squares[0] + self.squares[1]
        else:
            second, cross = self.second[half], self.cross[half]
            mass, squares = self.mass[half], self.squares[half]
        return second, cross, mass, torch.where(squares > 0, mass * mass / squares, 0.0)


class MomentSum:
    """Collects `Moments` block by block. width: K; outputs: M."""

    def __init__(self, units: int, width: int, outputs: int, device: torch.device | str) -> None:
        self.second = torch.zeros(2, units, width, width, device=device)
        self.cross = torch.zeros(2, units, outputs, width, device=device)
        self.sums = torch.zeros(2, units, 3, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, error: torch.Tensor, weight: torch.Tensor, segments: Iterable[Segment]) -> None:
        """x: [n, K], error: [n, M], any float dtype; weight: [n] float32; segments: whose rows these are.

        A row that is not finite has no part in the sums; how many there were is kept.
        """
        x, error = x.float(), error.float()
        # The sum of a row is not finite if one of its numbers is not, or if they are near the end of float32.
        usable = torch.isfinite(x.sum(1) + error.sum(1) + weight)
        weight = torch.where(usable, weight, 0.0)
        x, error = (torch.where(usable[:, None], part, 0.0) for part in (x, error))
        shares = weight.double()
        counted = torch.stack([shares, shares.square(), (~usable).double()])
        error = error * weight[:, None]
        weighted = x * weight[:, None]
        for segment in segments:
            unit, half = segment.unit, segment.half
            self.sums[half, unit] += counted[:, segment.rows].sum(1)
            for rows in segment.pieces():
                with tf32():
                    self.cross[half, unit].addmm_(error[rows].T, x[rows])
                    self.second[half, unit].addmm_(weighted[rows].T, x[rows])

    def total(self) -> Moments:
        mass, squares, dropped = self.sums.unbind(2)
        return Moments(self.second, self.cross, mass, squares, dropped.sum(0).long())


def boundary(tokens: int, window: int) -> int:
    """The first of T = S * window tokens that belongs to the second half: the later windows, or the end of a lone one.

    Not every other window: neighbours may come from one document, so that a test of one by the other would be too favourable.
    """
    return -(-(tokens // window) // 2) * window if tokens >= 2 * window else tokens // 2


def halves_of(first: int, last: int, second_half: int) -> list[Segment]:
    """Segments of the lone unit of a block that holds tokens first .. last - 1 in order."""
    middle = min(max(second_half, first), last) - first
    spans = (0, 0, middle), (1, middle, last - first)
    return [Segment(0, half, slice(start, stop)) for half, start, stop in spans if start < stop]
