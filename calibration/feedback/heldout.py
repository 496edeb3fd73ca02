"""The test on held-out rows: whether feedback helps a weight at all.

Errors on the other half of the rows follow from its moments alone: with D = Q - W,

    sum w |y' - x Q^T|^2 = tr D (sum w x^T x) D^T - 2 tr D (sum w e^T x)^T + a constant.

Output rows are independent, so a sample of them is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from m3quant.calibration.feedback.evidence import Estimate, Rule, estimate
from m3quant.calibration.feedback.moments import HALVES, Moments
from m3quant.calibration.feedback.products import matmul
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.feedback.solve import Solver
from m3quant.calibration.feedback.targets import targets
from m3quant.schemes import FP8_BLOCK, Scheme

Key = TypeVar("Key")

_SAMPLE_ROWS = 32  # output rows of a weight that are tried


@dataclass(frozen=True)
class Readers:
    """Weights of one scheme that read the same rows: weight [E, N, K] float32, the output rows of each behind one another.

    sizes: output rows of each. inputs: the cross moment is of the inputs, [K, K]; else of the outputs, [N, K].
    """

    weight: torch.Tensor
    sizes: tuple[int, ...]
    scheme: Scheme
    inputs: bool

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], scheme: Scheme, inputs: bool) -> Readers:
        """Stacks [E, N_i, K] of one scheme. Those in FP8 blocks must be of whole blocks of rows, all but the last."""
        return cls(torch.cat(list(weights), dim=1), tuple(weight.shape[1] for weight in weights), scheme, inputs)

    def sampled(self) -> tuple[Readers, torch.Tensor]:
        """The same of some output rows of each, evenly spread, and which they are."""
        picked, first = [], 0
        for size in self.sizes:
            count = min(_SAMPLE_ROWS, size)
            picked.append(first + torch.arange(count) * size // count)
            first += size
        rows = torch.cat(picked).to(self.weight.device)
        # Blocks of rows that are not adjacent share no scale here: one scale per row is used in place of theirs.
        scheme = replace(self.scheme, block=False)
        return Readers(self.weight[:, rows], tuple(map(len, picked)), scheme, self.inputs), rows

    def cross(self, cross: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """[E, N, K] of the output rows (`rows` of all of them) from a cross moment [E, M, K]."""
        if self.inputs:
            return matmul(self.weight, cross)
        return cross if rows is None else cross[:, rows]

    def sums(self, by_row: torch.Tensor) -> torch.Tensor:
        """[E, N] -> [E, weights]."""
        return torch.stack([part.sum(1) for part in torch.split(by_row, list(self.sizes), dim=1)], dim=1)


def joined_by_scheme(weights: Mapping[Key, tuple[Scheme, int]]) -> list[tuple[Key, ...]]:
    """Which weights, given as (scheme, output rows), can be solved as one stack of rows: those of one scheme, in their order.

    One in FP8 blocks is handled alone if its rows are not whole blocks.
    """
    sets: dict[object, list[Key]] = {}
    for key, (scheme, rows) in weights.items():
        ragged = scheme.block and rows % FP8_BLOCK
        sets.setdefault((scheme, key) if ragged else scheme, []).append(key)
    return [tuple(keys) for keys in sets.values()]


def heldout_errors(
    moments: Moments, readers: Readers, rule: Rule, prior: torch.Tensor | None, settings: FeedbackSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors [E, weights] on the second half of the rows of weights made from the first half: (rounded to nearest with searched
    ranges, with feedback).

    Relative to the energy of the outputs there, less a constant; NaN where the second half has no rows.
    """
    fitted, tested = HALVES
    known = estimate(moments, rule, prior, fitted)
    part, rows = readers.sampled()
    quick = replace(
        settings, rounds=0
    )  # the sweep alone: what follows it can only do better on the rows that were used
    plain = Solver(part.weight, known.second, part.scheme, quick)
    nearest = plain.stored(plain.nearest()).dequantized()
    found = Solver(aimed(part, known, rows), known.second, part.scheme, quick).solve().stored.dequantized()
    second, cross, mass, _ = moments.of(tested)
    energy = part.sums(_quadratic(part.weight, second))
    pull = part.cross(cross, rows)

    def error(values: torch.Tensor) -> torch.Tensor:
        difference = values - part.weight
        by_row = _quadratic(difference, second) - 2 * (difference * pull).sum(2)
        return torch.where(mass[:, None] > 0, part.sums(by_row) / energy, torch.nan)

    return error(nearest), error(found)


def aimed(readers: Readers, known: Estimate, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The targets [E, N, K] of readers, of which `rows` are the output rows."""
    return targets(readers.weight, readers.cross(known.cross, rows), known.system, known.ridge)[0]


def _quadratic(rows: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """r H r^T of rows [E, N, K], second [E, K, K]: [E, N]."""
    return (matmul(rows, second) * rows).sum(2)
