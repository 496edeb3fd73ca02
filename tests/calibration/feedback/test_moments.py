"""Moments against float64; rows that are not finite have no part in them."""

import pytest
import torch

from m3quant.calibration.feedback import moments
from m3quant.calibration.feedback.moments import MomentSum, boundary
from tests.support.calibration.feedback_cases import moments_of, normal, rows


def test_sums_of_each_half_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_ROWS", 64)
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
        assert torch.allclose(found.second[index].double(), second, rtol=1e-4, atol=1e-5 * float(second.abs().max()))
        assert torch.allclose(found.cross[index].double(), cross, rtol=1e-4, atol=1e-5 * float(cross.abs().max()))
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


def test_rows_of_one_half_are_added_as_by_a_mask() -> None:
    x, error, weight = normal(90, 8), normal(90, 3, seed=1), normal(90, seed=2).square()
    x[4, 1] = torch.nan
    half = torch.arange(90) >= 50
    expected, total = moments_of(x, error, weight, half), MomentSum(8, 3, "cpu")
    for index, part in ((0, slice(50)), (1, slice(50, 90))):
        total.add(x[part], error[part], weight[part], index)
    found = total.total()
    for name in ("second", "cross", "mass", "squares", "dropped"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
