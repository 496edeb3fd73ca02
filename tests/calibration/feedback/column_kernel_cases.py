"""Feedback's kernels against their plain forms; run as kernel_cases.py is."""

import pytest
import torch

from m3quant.calibration.feedback.columns import (
    Block,
    descent_factor,
    kernel_block,
    plain_block,
    sweep_factor,
)
from m3quant.calibration.feedback.factors import blocked
from m3quant.calibration.feedback.gram_kernel import gram
from m3quant.calibration.feedback.grids import Grid
from m3quant.calibration.feedback.kernels import round_points
from m3quant.calibration.feedback.refit import plain_gram
from tests.support.calibration.feedback_cases import SCHEMES, moment, normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["int4-g64", "int2-g64-asym", "int8-channel", "fp8-channel"])
@pytest.mark.parametrize("descent", [False, True])
@pytest.mark.parametrize(("first", "count"), [(64, 42)])
def test_a_block_is_rounded_as_by_plain_steps(name: str, descent: bool, first: int, count: int) -> None:
    scheme, experts, rows, columns = SCHEMES[name], 2, 34, 128  # a whole tile of rows and a part of one
    weight, second = normal(experts, rows, columns).to(DEVICE), moment(experts, columns).to(DEVICE)
    grid, span = Grid(scheme), slice(first, first + count)
    levels = grid.start(weight, second.diagonal(dim1=1, dim2=2), torch.bfloat16, True)
    target = weight.transpose(1, 2).contiguous()
    factor = descent_factor(second) if descent else sweep_factor(second)
    errors = normal(experts, columns, rows, seed=5).to(DEVICE) * 0.05
    aim = target[:, span] + normal(experts, count, rows, seed=6).to(DEVICE) * 0.05
    found = []
    for step in (plain_block, kernel_block):
        codes, after = torch.full_like(target, torch.nan), errors.clone()
        moved = torch.full_like(aim, torch.nan) if descent else after[:, span]
        block = Block(
            aim.clone(),
            target[:, span],
            factor.lines[:, span, span].transpose(1, 2).contiguous(),
            levels.columns(grid.groups(columns).to(DEVICE).expand(experts, -1)[:, span]),
            factor.weight[:, span].contiguous(),
            codes[:, span],
            after[:, span],
            moved,
            descent,
        )
        loss = torch.ones(experts, rows, device=DEVICE)
        step(block, grid, loss)
        found.append((codes, after, moved, loss))
    plain, fused = found
    # A quotient that lies on the border of two codes may fall either way, since corrections are summed in another order;
    # what follows in that row then differs.
    same = (plain[0][:, span] == fused[0][:, span]).all(1)
    assert float(same.float().mean()) > 0.8
    agree = same[:, None, :].expand(-1, count, -1)
    assert torch.allclose(plain[1][:, span][agree], fused[1][:, span][agree], atol=1e-5)
    assert torch.allclose(plain[2][agree], fused[2][agree], atol=1e-5)
    # On a GPU what earlier parts of the block changed is added by products in TF32.
    assert torch.allclose(plain[3][same], fused[3][same], rtol=1e-2, atol=1e-2 * float(plain[3].std()))
    outside = [column for column in range(columns) if not first <= column < first + count]
    assert bool(torch.isnan(fused[0][:, outside]).all()) and torch.equal(fused[1][:, outside], errors[:, outside])


@pytest.mark.parametrize("name", ["int4-g64", "int2-g64-asym", "int8-channel", "fp8-channel", "fp8-block"])
def test_all_columns_are_rounded_as_by_plain_steps(name: str) -> None:
    scheme, experts, rows, columns = SCHEMES[name], 2, 70, 192 if SCHEMES[name].block else 128
    weight = normal(experts, rows, columns).to(DEVICE)
    grid = Grid(scheme)
    levels = grid.start(weight, torch.ones(experts, columns, device=DEVICE), torch.bfloat16, True)
    target = (weight + 0.3 * normal(experts, rows, columns, seed=1).to(DEVICE)).transpose(1, 2).contiguous()
    groups = grid.groups(columns).to(DEVICE).expand(experts, -1)
    expected = grid.codes(target, levels.columns(groups))
    codes, errors = round_points(target, levels, grid.size(columns), grid.limits)
    assert torch.equal(codes, expected)
    assert torch.equal(errors, target - grid.values(expected, levels.columns(groups)))
    given = round_points(target * 2, levels, grid.size(columns), grid.limits, codes)
    assert given[0] is codes and torch.equal(given[1], 2 * target - grid.values(expected, levels.columns(groups)))


@pytest.mark.parametrize("size", [32, 64])
def test_small_systems_are_those_of_whole_products(size: int) -> None:
    points, second = normal(2, 128, 70, seed=1).mul_(3).round_().to(DEVICE), moment(2, 128, seed=2).to(DEVICE)
    expected, found = plain_gram(points, second, size), gram(points, second, size)
    assert float((found - expected).abs().max()) < 3e-3 * float(expected.abs().max())
    assert torch.equal(found, found.transpose(2, 3))


@pytest.mark.parametrize("columns", [200, 512])
def test_blocks_of_columns_factor_and_solve_as_the_library_does(columns: int) -> None:
    second, right = moment(3, columns, seed=3).to(DEVICE), normal(3, columns, 5, seed=4).to(DEVICE)
    second[1] -= 2 * second[1].diagonal().mean() * torch.eye(columns, device=DEVICE)
    found = blocked(second.clone())
    assert found.failed.tolist() == [False, True, False]
    for expert in (0, 2):
        lower = torch.linalg.cholesky(second[expert].double())
        assert torch.allclose(found.lower[expert].double(), lower, atol=1e-4 * float(lower.abs().max()))
    expected = torch.linalg.solve(second.double(), right.double())
    solved = found.solve(right).double()
    assert float((solved - expected)[::2].norm() / expected[::2].norm()) < 1e-3
