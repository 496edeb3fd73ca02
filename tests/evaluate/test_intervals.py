"""Wilson's interval against its definition and against exact coverage."""

from math import comb, isclose, sqrt

import pytest

from m3quant.evaluate.intervals import Z95, wilson


@pytest.mark.parametrize(("hits", "samples"), [(1, 10), (5, 10), (9, 10), (37, 200), (0, 10), (10, 10)])
def test_the_bounds_solve_the_score_equation(hits: int, samples: int) -> None:
    share = hits / samples
    for bound in wilson(hits, samples):
        if 0 < bound < 1:
            assert isclose(abs(share - bound), Z95 * sqrt(bound * (1 - bound) / samples), rel_tol=1e-9)
    low, high = wilson(hits, samples)
    assert 0 <= low <= share <= high <= 1 and low < high


@pytest.mark.parametrize("truth", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_coverage_is_near_95_percent(truth: float) -> None:
    covered = 0.0
    for hits in range(51):
        low, high = wilson(hits, 50)
        covered += comb(50, hits) * truth**hits * (1 - truth) ** (50 - hits) * (low <= truth <= high)
    assert 0.90 < covered < 0.99


@pytest.mark.parametrize(("hits", "samples"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(hits: int, samples: int) -> None:
    with pytest.raises(ValueError):
        wilson(hits, samples)
