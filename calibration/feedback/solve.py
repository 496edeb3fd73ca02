"""Codes and scales of a stack of weights for given moments and targets: start, sweep, then rounds of descent and refit.

Rows of a weight are independent of each other, so each keeps whatever served it best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3quant.calibration.feedback.columns import descent_factor, falling_order, permuted, round_columns, sweep_factor
from m3quant.calibration.feedback.grids import Grid, Levels
from m3quant.calibration.feedback.products import matmul
from m3quant.calibration.feedback.refit import refit
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.quantized_layer import StoredWeight
from m3quant.schemes import Scheme


@dataclass
class State:
    """codes, errors (target minus value): [E, K, N] float32 in the natural order of columns; loss: [E, N]."""

    codes: torch.Tensor
    errors: torch.Tensor
    levels: Levels
    loss: torch.Tensor

    def keep_better(self, other: State) -> State:
        """Row by row, the other where its loss is lower."""
        better = other.loss < self.loss
        pick = better[:, None, :]
        zero = self.levels.zero
        if zero is not None and other.levels.zero is not None:
            zero = torch.where(pick, other.levels.zero, zero)
        return State(
            torch.where(pick, other.codes, self.codes),
            torch.where(pick, other.errors, self.errors),
            Levels(torch.where(pick, other.levels.scale, self.levels.scale), zero),
            torch.where(better, other.loss, self.loss),
        )


class Solver:
    """One scheme, one stack of targets. target: [E, N, K] float32; second: [E, K, K] float32, positive definite."""

    def __init__(self, target: torch.Tensor, second: torch.Tensor, scheme: Scheme, settings: FeedbackSettings) -> None:
        self.grid, self.settings, self.second = Grid(scheme), settings, second
        self.natural = target
        self.target = target.transpose(1, 2).contiguous()
        self.groups = self.grid.groups(target.shape[2]).to(target.device)
        self.order = falling_order(second)
        self.back = torch.argsort(self.order, dim=1)

    def loss(self, errors: torch.Tensor) -> torch.Tensor:
        """[E, N]: d H d^T of every row, errors [E, K, N]."""
        return (matmul(self.second, errors) * errors).sum(1)

    def rounded(self, levels: Levels) -> State:
        """To nearest."""
        wide = levels.columns(self.groups.expand(len(self.target), -1))
        codes = self.grid.codes(self.target, wide)
        return self.under(codes, levels)

    def under(self, codes: torch.Tensor, levels: Levels) -> State:
        wide = levels.columns(self.groups.expand(len(self.target), -1))
        errors = self.target - self.grid.values(codes, wide)
        return State(codes, errors, levels, self.loss(errors))

    def start(self) -> Levels:
        diagonal = self.second.diagonal(dim1=1, dim2=2)
        return self.grid.start(self.natural, diagonal, self.settings.scale_dtype, self.settings.signed_scales)

    def pass_over(self, factor: torch.Tensor, levels: Levels, errors: torch.Tensor | None = None) -> State:
        """One pass of the column loop in falling order; factor is in that order."""
        given = None if errors is None else self._take(errors, self.order)
        groups = self.groups[self.order]
        codes, found = round_columns(self._take(self.target, self.order), factor, levels, self.grid, groups, given)
        found = self._take(found, self.back)
        return State(self._take(codes, self.back), found, levels, self.loss(found))

    def run(self) -> tuple[StoredWeight, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(weight, loss [E], loss of rounding to nearest with searched ranges [E], failed [E])."""
        levels = self.start()
        plain = self.rounded(levels)
        ordered = permuted(self.second, self.order)
        factor, failed = sweep_factor(ordered)
        state = plain.keep_better(self.pass_over(factor, levels))
        descent = descent_factor(ordered)
        for _ in range(self.settings.rounds):
            state = self.refitted(state)
            state = state.keep_better(self.pass_over(descent, state.levels, state.errors))
        if self.settings.rounds:
            state = self.refitted(state)
        stored = self.grid.stored(state.codes, state.levels)
        return stored, state.loss.sum(1), plain.loss.sum(1), failed

    def refitted(self, state: State) -> State:
        scheme = self.grid.scheme
        if not self.settings.refit or scheme.block:  # the scale of a block belongs to 128 rows together
            return state
        dtype = self.settings.scale_dtype if scheme.kind == "int" else None
        size = scheme.group_size or len(self.groups)
        levels = refit(state.codes, state.levels, self.target, self.second, size, dtype)
        return state.keep_better(self.under(state.codes, levels))

    @staticmethod
    def _take(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return values.gather(1, order[:, :, None].expand_as(values))
