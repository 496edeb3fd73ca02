"""How far each stored weight is from its source: recorded by the conversion, computed again by verify.

Codes with error feedback are not the nearest ones, so no rule gives the right code. Their squared distance from
the source is a number of each tensor, exact to float64's rounding wherever it is computed: a changed code, a scale one
step off or a weight rounded from another source changes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROUNDING_ERROR = "rounding_error"  # key of the journal's records and of the manifest
# Relative. Products of a code and a BF16 scale, and their differences from BF16 weights, are the same float32 numbers on
# any device; only the order of the sum over up to 2^30 of them differs.
TOLERANCE = 1e-9


def squared_distance(source: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Sum over the last two dimensions of (stored - source)^2, accumulated in float64: [..., N, K] -> [...]."""
    return (stored.float() - source.float()).square_().sum((-2, -1), dtype=torch.float64)


class RoundingErrors:
    """Collects the squared distances of a layer's weights without waiting for the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: list[torch.Tensor] = []

    def add(self, names: Sequence[str], source: torch.Tensor, stored: torch.Tensor) -> None:
        """names: of the weights; source, stored [e, N, K]: before, and as an engine computes with them."""
        self._names += names
        self._values.append(squared_distance(source, stored))

    def to_json(self) -> dict[str, float]:
        values = [value for part in self._values for value in part.tolist()]
        return dict(zip(self._names, values, strict=True))
