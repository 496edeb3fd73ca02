"""Moments against float64; rows that are not finite have no part in them."""

import pytest
import torch

from m3quant.calibration.feedback import moments
from m3quant.calibration.feedback.moments import MomentSum, Segment, boundary, halves_of
from tests.support.calibration.feedback_cases import moments_of, normal, rows


def test_sums_of_each_half_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ROWS", 64)
    x, error = rows(1, 300, 48)[0], normal(300, 5, seed=3)
    weight, half = normal(300, seed=4).square(), normal(300, seed=5) > 0.3
    x[7, 3], error[11, 0], x[20, 1] = torch.inf, torch.nan, -torch.inf
    found = moments_of(x, error, weight, half)
    good = torch.isfinite(x).all(1) & torch.isfinite(error).all(1)
    assert found.dropped == 3
    for index in (0, 1):
        own = good & (half == bool(index))
        wide, short, mass = x[own].double(), error[own].double(), weight[own].double()
        second, cross = (wide * mass[:, None]).T @ wide, (short * mass[:, None]).T @ wide
        assert torch.allclose(found.second[index, 0].double(), second, rtol=1e-4, atol=1e-5 * float(second.abs().max()))
        assert torch.allclose(found.cross[index, 0].double(), cross, rtol=1e-4, atol=1e-5 * float(cross.abs().max()))
        assert float(found.mass[index]) == pytest.approx(float(mass.sum()), rel=1e-6)
        assert float(found.of(index)[3]) == pytest.approx(float(mass.sum() ** 2 / mass.square().sum()), rel=1e-6)
    second, _, mass, count = found.of(None)
    assert torch.allclose(second, found.second.sum(0)) and float(mass) == pytest.approx(float(found.mass.sum()))
    assert 0 < float(count) < int(good.sum())


def test_rows_of_equal_weight_count_in_full() -> None:
    x = normal(40, 8)
    assert moments_of(x, x, torch.full((40,), 0.3), torch.arange(40) >= 20).of(None)[3].item() == pytest.approx(40)


def test_halves_are_whole_windows_where_there_are_several() -> None:
    assert boundary(6, 2) == 4 and boundary(8, 2) == 4
    assert boundary(4, 4) == 2 and boundary(1, 1) == 0


def test_units_side_by_side_are_each_added_as_alone() -> None:
    x, error, weight = normal(90, 8), normal(90, 3, seed=1), normal(90, seed=2).square()
    x[4, 1] = torch.nan
    spans = [(0, 0, 20), (0, 1, 31), (2, 0, 60), (0, 0, 75), (2, 1, 90)]  # the second of three units has no row
    starts = [0, *(stop for *_, stop in spans)]
    segments = [
        Segment(unit, half, slice(first, stop)) for first, (unit, half, stop) in zip(starts, spans, strict=False)
    ]
    whole = MomentSum(3, 8, 3, "cpu")
    whole.add(x, error, weight, segments)
    found = whole.total()
    assert found.dropped.tolist() == [1, 0, 0] and not found.second[:, 1].any() and not found.mass[:, 1].any()
    for unit in (0, 2):
        alone = MomentSum(1, 8, 3, "cpu")
        for segment in segments:
            if segment.unit == unit:
                rows = segment.rows
                own = Segment(0, segment.half, slice(0, rows.stop - rows.start))
                alone.add(x[rows], error[rows], weight[rows], [own])
        for name in ("second", "cross", "mass", "squares"):
            assert torch.equal(getattr(found, name)[:, unit], getattr(alone.total(), name)[:, 0])


def test_the_boundary_cuts_a_block_that_holds_tokens_of_both_halves() -> None:
    assert halves_of(8, 16, 12) == [Segment(0, 0, slice(0, 4)), Segment(0, 1, slice(4, 8))]
    assert halves_of(0, 8, 12) == [Segment(0, 0, slice(0, 8))] and halves_of(12, 20, 12) == [Segment(0, 1, slice(0, 8))]
