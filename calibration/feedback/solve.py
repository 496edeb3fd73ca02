"""Codes and scales of a stack of weights for given moments and targets: start, sweep, then rounds of descent and refit.

Rows of a weight are independent of each other, so each keeps its best result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from m3quant.calibration.feedback.columns import (
    Factor,
    descent_factor,
    falling_order,
    permuted,
    round_columns,
    sweep_factor,
)
from m3quant.calibration.feedback.grids import Grid, Levels
from m3quant.calibration.feedback.points import errors_of, rounded
from m3quant.calibration.feedback.products import matmul
from m3quant.calibration.feedback.refit import refit
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.quantized_layer import StoredWeight
from m3quant.planning.quantizers import feedback_rounds
from m3quant.schemes import Scheme


@dataclass
class State:
    """codes (on a GPU in BF16), errors (target minus value): [E, K, N] in the natural order of columns; loss: [E, N]."""

    codes: torch.Tensor
    errors: torch.Tensor
    levels: Levels
    loss: torch.Tensor

    def better_rows(self, other: State) -> State:
        """Row by row, the other where its loss is lower. Codes and errors of this state are overwritten."""
        better = other.loss < self.loss
        pick = better[:, None, :]
        zero = self.levels.zero
        if zero is not None and other.levels.zero is not None:
            zero = torch.where(pick, other.levels.zero, zero)
        return State(
            torch.where(pick, other.codes, self.codes, out=self.codes),
            torch.where(pick, other.errors, self.errors, out=self.errors),
            Levels(torch.where(pick, other.levels.scale, self.levels.scale), zero),
            torch.where(better, other.loss, self.loss),
        )


@dataclass
class Solution:
    """stored: the stack of weights. loss, nearest: [E, N], (t - q) H (t - q)^T of its rows and of those rounded to nearest
    under searched ranges. failed: [E] bool, where H could not be factored and no error was fed forward.
    """

    stored: StoredWeight
    loss: torch.Tensor
    nearest: torch.Tensor
    failed: torch.Tensor


class Solver:
    """One scheme, one stack. target: [E, N, K] float32; second: [E, K, K] float32, positive definite."""

    def __init__(self, target: torch.Tensor, second: torch.Tensor, scheme: Scheme, settings: FeedbackSettings) -> None:
        self.grid, self.settings, self.second, self.rows_first = Grid(scheme), settings, second, target
        self.target = target.transpose(1, 2).contiguous()
        self.groups = self.grid.groups(target.shape[2]).to(target.device).expand(len(target), -1)

    # Only the loop over columns asks for these; rounding to nearest does without.
    @cached_property
    def order(self) -> torch.Tensor:
        return falling_order(self.second)

    @cached_property
    def back(self) -> torch.Tensor:
        return torch.argsort(self.order, dim=1)

    @cached_property
    def ordered_target(self) -> torch.Tensor:
        return _take(self.target, self.order)

    @cached_property
    def ordered_groups(self) -> torch.Tensor:
        return self.groups.gather(1, self.order)

    def nearest(self) -> State:
        """Rounded to nearest, under ranges searched with the diagonal of H."""
        diagonal = self.second.diagonal(dim1=1, dim2=2)
        levels = self.grid.start(self.rows_first, diagonal, self.settings.scale_dtype, self.settings.signed_scales)
        codes, errors = rounded(self.target, self.grid, levels)
        return State(codes, errors, levels, (matmul(self.second, errors) * errors).sum(1))

    def solve(self) -> Solution:
        nearest = self.nearest()
        ordered = permuted(self.second, self.order)
        factor = sweep_factor(ordered)
        state = nearest.better_rows(self._sweep(factor, nearest.levels))
        rounds = feedback_rounds(self.grid.scheme, self.settings.rounds)
        if rounds:
            descent = descent_factor(ordered)
            for index in range(rounds):
                state = self._refitted(state)
                if index % 2 == 0:
                    # The scales have moved since the last sweep: a new one, and its own descent, end somewhere else.
                    other = self._descended(descent, self._sweep(factor, state.levels))
                    state = state.better_rows(self._refitted(other))
                state = self._descended(descent, state)
            state = self._refitted(state)
        return Solution(self.stored(state), state.loss, nearest.loss, factor.failed)

    def stored(self, state: State) -> StoredWeight:
        return self.grid.stored(state.codes, state.levels)

    def _sweep(self, factor: Factor, levels: Levels) -> State:
        """Once through the columns in falling order, in which factor is given."""
        found = round_columns(self.ordered_target, factor, levels, self.grid, self.ordered_groups)
        return State(_take(found.codes, self.back), _take(found.errors, self.back), levels, found.loss)

    def _descended(self, factor: Factor, state: State) -> State:
        """The same from a state, whose loss no step raises."""
        given = _take(state.errors, self.order)
        found = round_columns(self.ordered_target, factor, state.levels, self.grid, self.ordered_groups, given)
        codes, errors = _take(found.codes, self.back), _take(found.errors, self.back)
        return State(codes, errors, state.levels, state.loss + found.loss)

    def _refitted(self, state: State) -> State:
        scheme = self.grid.scheme
        if not self.settings.refit or scheme.block:  # the scale of a block belongs to 128 rows together
            return state
        levels, size = state.levels, self.grid.size(self.groups.shape[1])
        points = state.codes if levels.zero is None else state.codes - levels.zero.repeat_interleave(size, dim=1)
        dtype = self.settings.scale_dtype if scheme.kind == "int" else None
        found = refit(points, levels.scale, state.errors, self.second, size, dtype)
        levels = Levels(found.scale, levels.zero)
        return State(
            state.codes, errors_of(state.codes, self.target, self.grid, levels), levels, state.loss - found.gain
        )


def _take(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return values.gather(1, order[:, :, None].expand_as(values))
