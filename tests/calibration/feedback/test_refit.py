"""Scales refitted for given codes are the least-squares ones, exact in their stored dtype, and never worse where kept."""

import pytest
import torch

from m3quant.calibration.feedback.grids import Grid, Levels
from m3quant.calibration.feedback.refit import plain_gram, refit
from tests.support.calibration.feedback_cases import SCHEMES, moment, normal, objective


@pytest.mark.parametrize("name", ["int4-g64", "int2-g64-asym", "int8-channel", "fp8-channel"])
def test_refitted_scales_minimise_the_objective(name: str) -> None:
    scheme = SCHEMES[name]
    weight, second, grid = normal(2, 7, 128, seed=5), moment(2, 128, seed=6), Grid(scheme)
    levels = grid.start(weight, second.diagonal(dim1=1, dim2=2), torch.bfloat16, True)
    groups, target = grid.groups(128).expand(2, -1), weight.transpose(1, 2).contiguous()
    codes = grid.codes(target, levels.columns(groups))
    size = scheme.group_size or 128
    points = codes if levels.zero is None else codes - levels.zero.repeat_interleave(size, dim=1)
    errors = target - grid.values(codes, levels.columns(groups))
    found = refit(points, levels.scale, errors, second, size, None)

    def loss(scale: torch.Tensor) -> torch.Tensor:
        values = grid.values(codes, Levels(scale, levels.zero).columns(groups))
        return objective(weight, values.transpose(1, 2), second)

    least = loss(found.scale)
    assert bool((least <= loss(levels.scale) * (1 + 1e-6)).all())
    assert float(least.sum()) < 0.999 * float(loss(levels.scale).sum())
    before = loss(levels.scale)
    assert bool(((before - least - found.gain).abs() <= 1e-3 * found.gain + 1e-5 * before).all())
    # The same by least squares in float64: |L^T (t - sum of s_g b_g)|, H = L L^T.
    for expert in range(2):
        lower = torch.linalg.cholesky(second[expert].double())
        for row in range(7):
            basis = torch.zeros(128, 128 // size, dtype=torch.float64)
            for group in range(128 // size):
                span = slice(group * size, (group + 1) * size)
                basis[span, group] = points[expert, span, row].double()
            expected = torch.linalg.lstsq(lower.T @ basis, lower.T @ weight[expert, row].double()[:, None]).solution
            assert torch.allclose(found.scale[expert, :, row].double(), expected[:, 0], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refitted_scales_are_exact_in_their_dtype(dtype: torch.dtype) -> None:
    weight, second, grid = normal(1, 6, 128), moment(1, 128), Grid(SCHEMES["int4-g64"])
    weight[0, 0, :64] = 0.0  # a group without information keeps its scale
    levels = grid.start(weight, second.diagonal(dim1=1, dim2=2), dtype, True)
    target = weight.transpose(1, 2).contiguous()
    wide = levels.columns(grid.groups(128)[None])
    codes = grid.codes(target, wide)
    found = refit(codes, levels.scale, target - grid.values(codes, wide), second, 64, dtype).scale
    assert torch.equal(found, found.to(dtype).float()) and bool((found != 0).all())
    assert float(found[0, 0, 0]) == float(levels.scale[0, 0, 0])
    assert bool((found != levels.scale).any())


def test_the_small_systems_hold_every_pair_of_groups() -> None:
    points, second = normal(2, 96, 5, seed=1).round_(), moment(2, 96, seed=2)
    found = plain_gram(points, second, 32)
    parts = points.double().unflatten(1, (3, 32))
    expected = torch.einsum(
        "egin,egihj,ehjn->engh", parts, second.double().unflatten(2, (3, 32)).unflatten(1, (3, 32)), parts
    )
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)
