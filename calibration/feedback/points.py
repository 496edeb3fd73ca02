"""Codes and errors of a whole stack of weights at once, columns in their natural order."""

from __future__ import annotations

import torch

from m3quant.calibration.feedback.grids import Grid, Levels


def rounded(target: torch.Tensor, grid: Grid, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """(nearest codes, target minus their values) of target [E, K, N] under levels [E, G, N]; codes on a GPU as `CODES_ON_GPU`."""
    if target.is_cuda:
        from m3quant.calibration.feedback.kernels import round_points

        return round_points(target, levels, grid.size(target.shape[1]), grid.limits)
    codes = grid.codes(target, _wide(target, grid, levels))
    return codes, errors_of(codes, target, grid, levels)


def errors_of(codes: torch.Tensor, target: torch.Tensor, grid: Grid, levels: Levels) -> torch.Tensor:
    """Target minus the values of these codes under levels [E, G, N]: [E, K, N]."""
    if target.is_cuda:
        from m3quant.calibration.feedback.kernels import round_points

        return round_points(target, levels, grid.size(target.shape[1]), grid.limits, codes)[1]
    return target - grid.values(codes, _wide(target, grid, levels))


def _wide(target: torch.Tensor, grid: Grid, levels: Levels) -> Levels:
    """Those of every column, [E, K, N]."""
    return levels.columns(grid.groups(target.shape[1]).to(target.device).expand(len(target), -1))
