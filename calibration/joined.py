"""Windows of several lengths in one grid of hidden states [S, L, H]: some rows are joined with those after them.

The rows of a joined window are consecutive text, so that it is a view: [n * rows, L, H] is [n, rows * L, H]. Everything that treats
tokens one by one sees rows; only attention sees windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from m3quant.planning.calibration_text import WindowGroup


def batches(count: int, most: int, groups: Sequence[WindowGroup]) -> Iterator[slice]:
    """Slices of at most `most` rows, but of whole windows, that cover `count` rows in order. groups: as they follow one another."""
    for group in groups or (WindowGroup(0, count, 1),):
        stop = min(group.start + group.windows * group.rows, count)
        step = max(1, most // group.rows) * group.rows
        for start in range(group.start, stop, step):
            yield slice(start, min(start + step, stop))


def rows_at(groups: Sequence[WindowGroup], row: int) -> int:
    """Rows of the window that `row` is in."""
    return next((g.rows for g in groups if g.start <= row < g.start + g.windows * g.rows), 1)


def joined(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x [n * rows, L, ...] as windows [n, rows * L, ...]."""
    return x if rows == 1 else x.reshape(-1, rows * x.shape[1], *x.shape[2:])
