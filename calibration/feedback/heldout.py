"""What rows that took no part say: which damping suits a layer, and whether feedback helps an expert at all.

Errors on the other half of the rows follow from its moments alone: with D = Q - W,

    sum w |y' - x Q^T|^2 = tr D (sum w x^T x) D^T - 2 tr D (sum w e^T x)^T + a constant.

Output rows are independent, so a sample of them is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from m3quant.calibration.feedback.evidence import Estimate, Rule, estimate
from m3quant.calibration.feedback.moments import HALVES, Moments
from m3quant.calibration.feedback.products import matmul
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.feedback.solve import Solver
from m3quant.calibration.feedback.targets import targets
from m3quant.schemes import Scheme

FACTORS = (1.0, 0.25, 4.0)  # of the rule's damping; on a tie the earlier
SAMPLE_UNITS = 8
_SAMPLE_ROWS = 32
_ROUNDS = 1


@dataclass(frozen=True)
class Member:
    """A stack of weights [E, N, K] float32 that read the rows of one list of moments. inputs: the cross moment is of the inputs, [K, K]."""

    weight: torch.Tensor
    scheme: Scheme
    inputs: bool

    def sampled(self) -> tuple[Member, torch.Tensor]:
        """The same of some output rows, evenly spread, and which they are."""
        rows = self.weight.shape[1]
        count = min(_SAMPLE_ROWS, rows)
        picked = torch.arange(count, device=self.weight.device) * rows // count
        return replace(self, weight=self.weight[:, picked].contiguous()), picked

    def cross(self, cross: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """[E, N, K] of the output rows from a cross moment [E, M, K]."""
        if self.inputs:
            return matmul(self.weight, cross)
        return cross if rows is None else cross[:, rows]


def judged(
    moments: list[Moments],
    member: Member,
    rule: Rule,
    factor: float,
    prior: torch.Tensor | None,
    settings: FeedbackSettings,
    half: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors [E] on the other half of what `half` taught: (rounded to nearest with searched ranges, with feedback).

    Per unit of mass and relative to the energy of the output there, less a constant; NaN where the other half has no rows.
    """
    known = estimate(moments, rule, factor, prior, half)
    part, rows = member.sampled()
    quick = replace(settings, rounds=min(_ROUNDS, settings.rounds))
    plain = Solver(part.weight, known.second, member.scheme, quick)
    nearest = plain.stored(plain.nearest()).dequantized()
    target = aimed(part, known, rows)
    found = Solver(target, known.second, member.scheme, quick).solve().stored.dequantized()
    other = 1 - half
    return _error(nearest, part, rows, moments, other), _error(found, part, rows, moments, other)


def aimed(member: Member, known: Estimate, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The targets [E, N, K] of a member, of which `rows` are the output rows."""
    cross = member.cross(known.cross, rows)
    return targets(member.weight, cross, known.system, known.ridge)[0]


def _error(values: torch.Tensor, member: Member, rows: torch.Tensor, moments: list[Moments], half: int) -> torch.Tensor:
    out = []
    for slot, own in enumerate(moments):
        second, cross, mass, _ = own.of(half)
        weight = member.weight[slot]
        pull = weight @ cross if member.inputs else cross[rows]
        difference = values[slot] - weight
        error = ((difference @ second) * difference).sum() - 2 * (difference * pull).sum()
        energy = ((weight @ second) * weight).sum()
        out.append(error / energy if mass > 0 else torch.full_like(error, torch.nan))
    return torch.stack(out)


def choose_factor(
    moments: list[Moments],
    members: list[Member],
    rule: Rule,
    prior: torch.Tensor | None,
    settings: FeedbackSettings,
) -> float:
    """The factor of the rule's damping with the least error on held-out rows, each half judging the other, over all units given."""
    best, least = FACTORS[0], torch.inf
    for factor in FACTORS:
        parts = [
            judged(moments, member, rule, factor, prior, settings, half)[1] for member in members for half in HALVES
        ]
        error = float(torch.stack(parts).double().nansum())
        if error < least:
            best, least = factor, error
    return best
