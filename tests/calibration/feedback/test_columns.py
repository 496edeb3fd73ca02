"""The column loop: the sweep is GPTQ, the descent is exact coordinate minimisation."""

import pytest
import torch

from m3quant.calibration.feedback import columns
from m3quant.calibration.feedback.columns import descent_factor, falling_order, permuted, round_columns, sweep_factor
from m3quant.calibration.feedback.grids import Grid
from m3quant.schemes import Scheme
from tests.support.calibration.feedback_cases import SCHEMES, levels_in_float64, moment, normal, objective, plain_gptq

NAMES = ["int4-g64", "int2-g64-asym", "int8-channel", "fp8-channel"]


def taken(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return values.gather(1, order[:, :, None].expand_as(values))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [8, 40, 64])
def test_the_sweep_is_gptq(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_BLOCK", {"cpu": block})
    weight, second, grid = normal(2, 9, 128), moment(2, 128), Grid(SCHEMES[name])
    levels = levels_in_float64(grid, weight, second.diagonal(dim1=1, dim2=2))
    order = falling_order(second)
    factor = sweep_factor(permuted(second.double(), order))
    target = taken(weight.double().transpose(1, 2), order)
    rounded = round_columns(target, factor, levels, grid, grid.groups(128)[order])
    codes, errors = rounded.codes, rounded.errors
    assert not bool(factor.failed.any())
    found = torch.empty_like(codes)
    found.scatter_(1, order[:, :, None].expand_as(codes), codes)
    for expert in range(2):
        own = type(levels)(
            levels.scale[expert : expert + 1], None if levels.zero is None else levels.zero[expert : expert + 1]
        )
        expected = plain_gptq(weight[expert], second[expert], order[expert].tolist(), grid, own)
        assert torch.equal(found[expert].T, expected)
    values = target - errors
    assert torch.equal(values, grid.values(codes, levels.columns(grid.groups(128)[order])))
    reached = objective(target.transpose(1, 2), values.transpose(1, 2), permuted(second, order))
    assert torch.allclose(rounded.loss, reached, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_of_the_descent_raises_the_objective(name: str) -> None:
    weight, second, grid = normal(2, 9, 128, seed=3), moment(2, 128, seed=4), Grid(SCHEMES[name])
    levels = levels_in_float64(grid, weight, second.diagonal(dim1=1, dim2=2))
    groups, target = grid.groups(128).expand(2, -1), weight.double().transpose(1, 2)
    wide = levels.columns(groups)
    errors = target - grid.values(grid.codes(target, wide), wide)
    before = objective(target.transpose(1, 2), (target - errors).transpose(1, 2), second)
    rounded = round_columns(target, descent_factor(second.double()), levels, grid, groups, errors.clone())
    after = rounded.errors
    # A plain descent, column by column.
    values = (target - errors).transpose(1, 2).clone()
    for k in range(128):
        gradient = (values - weight.double()) @ second.double()[:, :, k, None]
        wanted = values[:, :, k] - gradient[..., 0] / second.double()[:, k, k, None]
        level = wide.at(k)
        values[:, :, k] = grid.values(grid.codes(wanted, level), level)
    assert torch.allclose(target - after, values.transpose(1, 2), atol=1e-12)
    found = objective(weight, values, second)
    assert torch.allclose(before + rounded.loss, found, rtol=1e-10) and bool((rounded.loss <= 0).all())
    assert bool((found <= before * (1 + 1e-12)).all()) and float(found.sum()) < 0.95 * float(before.sum())


def test_the_order_falls_and_ties_go_to_the_earlier_column() -> None:
    second = torch.diag_embed(torch.tensor([[1.0, 3.0, 3.0, 2.0]]))
    assert falling_order(second).tolist() == [[1, 2, 3, 0]]
    assert permuted(second, falling_order(second)).diagonal(dim1=1, dim2=2).tolist() == [[3.0, 3.0, 2.0, 1.0]]


def test_a_moment_that_cannot_be_factored_feeds_nothing_forward() -> None:
    second = moment(2, 64)
    second[1] = -torch.eye(64)
    factor = sweep_factor(second)
    assert factor.failed.tolist() == [False, True]
    assert bool((factor.lines[1] == 0).all()) and bool((factor.lines[0] != 0).any())
    grid = Grid(Scheme("int", 4, 64))
    weight = normal(2, 5, 64)
    levels = grid.start(weight, torch.ones(2, 64), torch.bfloat16, True)
    target = weight.transpose(1, 2).contiguous()
    rounded = round_columns(target, factor, levels, grid, grid.groups(64).expand(2, -1))
    assert not bool(torch.isfinite(rounded.loss[1]).any())  # so that it is never taken for the better one
    assert torch.equal(rounded.codes[1], grid.codes(target, levels.columns(grid.groups(64).expand(2, -1)))[1])
