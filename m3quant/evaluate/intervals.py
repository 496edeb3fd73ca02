"""Wilson's score interval of a share. Torch-free."""

from __future__ import annotations

from math import sqrt

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(hits: int, samples: int, z: float = Z95) -> tuple[float, float]:
    """Bounds (0 to 1) of the share behind `hits` of `samples` independent trials (Wilson 1927, without correction).

    Raises ValueError unless 0 <= hits <= samples and samples >= 1.
    """
    if samples < 1 or not 0 <= hits <= samples:
        raise ValueError(f"{hits} hits of {samples} samples")
    share, square = hits / samples, z * z / samples
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * sqrt(share * (1 - share) / samples + square / (4 * samples))
    # At 0 and all hits one bound is exact, and rounding must not take it past the share.
    return 0.0 if hits == 0 else middle - half, 1.0 if hits == samples else middle + half
