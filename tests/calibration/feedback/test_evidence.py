"""What is believed of few, broken or no rows, and that it is said."""

import pytest
import torch

from m3quant.calibration.feedback.evidence import GATED, NORMED, Rule, estimate
from m3quant.calibration.feedback.moments import Moments
from tests.support.calibration.feedback_cases import moments_of, normal, rows, stacked

WIDTH = 16


def from_rows(x: torch.Tensor) -> Moments:
    return moments_of(x, normal(len(x), 3), torch.ones(len(x)), torch.arange(len(x)) >= len(x) // 2)


def positive(second: torch.Tensor) -> bool:
    return int(torch.linalg.cholesky_ex(second.double())[1].sum()) == 0


@pytest.mark.parametrize("rule", [NORMED, GATED])
def test_damping_and_ridge_fall_as_rows_grow(rule: Rule) -> None:
    found = estimate(stacked([from_rows(rows(1, count, WIDTH)[0]) for count in (4, 64, 1024, 100_000)]), rule)
    assert found.damping == sorted(found.damping, reverse=True) and found.damping[0] > 5 * found.damping[-1]
    share = found.ridge / found.system.diagonal(dim1=1, dim2=2).mean(1)
    assert bool((share[:-1] >= share[1:]).all()) and float(share[0]) > 10 * float(share[-1])
    assert positive(found.second) and found.notes == [[], [], [], []]
    mean = found.system.diagonal(dim1=1, dim2=2).mean(1)
    added = (found.second - found.system).diagonal(dim1=1, dim2=2)
    assert torch.allclose(added, (mean * torch.tensor(found.damping))[:, None].expand_as(added), rtol=1e-3)


def test_few_rows_lean_on_the_prior_and_many_do_not() -> None:
    prior = torch.diag(torch.linspace(1, 2, WIDTH))
    few, many = (from_rows(rows(1, count, WIDTH)[0]) for count in (2, 5000))
    found = estimate(stacked([few, many]), NORMED, prior)
    for slot, own in enumerate((few, many)):
        second, cross, mass, count = (part[0] for part in own.of(None))
        share = float(count / (count + WIDTH))
        assert torch.allclose(found.system[slot], second / mass * share + prior * (1 - share), rtol=1e-5, atol=1e-6)
        assert torch.allclose(found.cross[slot], cross / mass * share, rtol=1e-5, atol=1e-6)


CASES = {
    "no rows": lambda x: x[:0],
    "moments exceed float32": lambda x: x * 1e25,
    "all inputs are zero": lambda x: x * 0,
}


@pytest.mark.parametrize("problem", CASES)
def test_unusable_moments_are_replaced_and_named(problem: str) -> None:
    own = from_rows(CASES[problem](rows(1, 50, WIDTH)[0]))
    prior = torch.diag(torch.linspace(1, 2, WIDTH))
    for given, expected in ((prior, prior), (None, torch.eye(WIDTH))):
        found = estimate(own, GATED, given)
        assert torch.equal(found.system[0], expected) and positive(found.second)
        assert bool((found.cross == 0).all()) and found.rows == [0.0]
        assert len(found.notes[0]) == 1 and found.notes[0][0].startswith(problem)


def test_dead_channels_and_dropped_rows_are_named() -> None:
    x = rows(1, 60, WIDTH)[0]
    x[:, 2] = x[:, 5] = 0
    x[9] = torch.nan
    found = estimate(from_rows(x), GATED)
    assert found.notes == [["1 rows are not finite and were left out", "2 input channels are always zero"]]
    assert positive(found.second) and bool(torch.isfinite(found.second).all())


def test_fewer_rows_than_columns_give_a_moment_that_can_be_factored() -> None:
    found = estimate(from_rows(rows(1, 3, WIDTH)[0]), GATED)
    assert positive(found.second) and found.damping == [4.0]
