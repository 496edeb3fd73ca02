"""The column loop's kernel against its plain form; run as kernel_cases.py is."""

import pytest
import torch

from m3quant.calibration.feedback import kernels
from m3quant.calibration.feedback.columns import descent_factor, plain_block, sweep_factor
from m3quant.calibration.feedback.grids import Grid
from m3quant.quant.integer import int_range
from tests.support.calibration.feedback_cases import SCHEMES, moment, normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["int4-g64", "int2-g64-asym", "int8-channel", "fp8-channel"])
@pytest.mark.parametrize("descent", [False, True])
@pytest.mark.parametrize(("first", "count"), [(0, 16), (96, 10)])
def test_a_block_is_rounded_as_by_plain_steps(name: str, descent: bool, first: int, count: int) -> None:
    scheme, experts, rows, columns = SCHEMES[name], 2, 66, 128
    weight, second = normal(experts, rows, columns).to(DEVICE), moment(experts, columns).to(DEVICE)
    grid = Grid(scheme)
    levels = grid.start(weight, second.diagonal(dim1=1, dim2=2), torch.bfloat16, True)
    groups = grid.groups(columns).to(DEVICE).expand(experts, -1).contiguous()
    target = weight.transpose(1, 2).contiguous()
    factor = descent_factor(second) if descent else sweep_factor(second)[0]
    errors = normal(experts, columns, rows, seed=5).to(DEVICE) * 0.05 if descent else torch.zeros_like(target)
    aim = target[:, first : first + count] + normal(experts, count, rows, seed=6).to(DEVICE) * 0.05
    plain = (torch.full_like(target, torch.nan), errors.clone())
    plain_block(aim.clone(), target, factor, levels, grid, groups, *plain, first, not descent)
    fused = (torch.full_like(target, torch.nan), errors.clone())
    limits = None if scheme.kind == "fp8" else int_range(scheme)
    kernels.round_block(
        aim.clone(), target, factor.contiguous(), levels.scale, levels.zero, groups, *fused, first, limits, descent
    )
    span = slice(first, first + count)
    # A quotient that lies on the border of two codes may fall either way, since corrections are summed in another order;
    # what follows in that row then differs.
    same = (plain[0][:, span] == fused[0][:, span]).all(1)
    assert float(same.float().mean()) > 0.9
    agree = same[:, None, :].expand(-1, count, -1)
    assert torch.allclose(plain[1][:, span][agree], fused[1][:, span][agree], atol=1e-5)
    outside = [column for column in range(columns) if not first <= column < first + count]
    assert bool(torch.isnan(fused[0][:, outside]).all()) and torch.equal(fused[1][:, outside], errors[:, outside])
