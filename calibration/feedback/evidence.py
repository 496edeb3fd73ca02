"""How far moments and targets may be trusted, by the number of rows that they were taken over.

With few rows for each column, the directions in which the inputs seem not to move are those that the sample missed, and errors
steered there come back on other text. So the moment is damped, and the target pulled to the weight, in inverse proportion
to the effective rows for each column; and weights of experts that read a norm get the whole layer's moment as a prior.

The constants are those with the least error on held-out rows of the trained fixtures (experts of layer 1, 0.3 to 40
effective rows a column): rows times damping is best between 0.3 and 3 for w1 and w3, between 3 and 10 for w2, whose
inputs have heavier tails and no prior. Letting each layer choose a quarter or four times as much on held-out halves of
its own text was no better with much text and worse with little (docs/rounding.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m3quant.calibration.feedback.moments import Moments

PRIOR_ROWS = 1.0  # the prior counts as so many rows for each column
_DAMPING = (0.03, 4.0)  # floor and cap, of the mean diagonal
_RIDGE = (0.05, 4.0)


@dataclass(frozen=True)
class Rule:
    """damping, ridge: shares of the mean diagonal at one effective row for each column."""

    damping: float
    ridge: float


NORMED = Rule(0.35, 3.0)  # w1, w3, gate, up, q, k, v: inputs out of a norm
GATED = Rule(5.0, 10.0)  # w2, down: products of two activations
HEADS = Rule(1.0, 3.0)  # o


@dataclass
class Estimate:
    """What is believed of the inputs of a stack of weights, per unit of mass.

    second: [E, K, K] float32, positive definite: with prior and damping. system: the same without damping. cross:
    [E, M, K]. ridge: [E] float32. damping: [E], shares of the mean diagonal. rows: [E], effective. notes: for each, what was wrong.
    """

    second: torch.Tensor
    system: torch.Tensor
    cross: torch.Tensor
    ridge: torch.Tensor
    damping: list[float]
    rows: list[float]
    notes: list[list[str]]


def estimate(
    moments: Sequence[Moments],
    rule: Rule,
    prior: torch.Tensor | None = None,
    half: int | None = None,
) -> Estimate:
    """Estimates of a stack from all rows or from one half. prior: [K, K], a second moment per row."""
    seconds, systems, crosses, ridges, dampings, counts, notes = [], [], [], [], [], [], []
    for own in moments:
        system, cross, rows, said = _blended(own, prior, half)
        width = len(system)
        mean = system.diagonal().mean()
        per_column = max(rows, 1.0) / width
        damping = _within(rule.damping / per_column, _DAMPING)
        second = system.clone()
        second.diagonal().add_(mean * damping)
        seconds.append(second)
        systems.append(system)
        crosses.append(cross)
        ridges.append(mean * _within(rule.ridge / per_column, _RIDGE))
        dampings.append(damping)
        counts.append(rows)
        notes.append(said)
    return Estimate(
        torch.stack(seconds), torch.stack(systems), torch.stack(crosses), torch.stack(ridges), dampings, counts, notes
    )


def _blended(
    own: Moments, prior: torch.Tensor | None, half: int | None
) -> tuple[torch.Tensor, torch.Tensor, float, list[str]]:
    """(second, cross, effective rows, notes) per unit of mass, with the prior; the prior alone, or the identity, if nothing usable is left."""
    second, cross, mass, rows = own.of(half)
    notes = []
    if own.dropped:
        notes.append(f"{own.dropped} rows are not finite and were left out")
    problem = _problem(second, cross, mass)
    if problem is None:
        second, cross = second / mass, cross / mass
        dead = int((second.diagonal() == 0).sum())
        if dead:
            notes.append(f"{dead} input channels are always zero")
        if prior is not None:
            share = rows / (rows + PRIOR_ROWS * len(second))
            second, cross = second * share + prior * (1 - share), cross * share
        return second, cross, rows, notes
    cross = torch.zeros_like(cross)
    if prior is not None:
        return prior, cross, 0.0, [*notes, f"{problem}: the layer's moment was used"]
    identity = torch.eye(len(second), device=second.device)
    return identity, cross, 0.0, [*notes, f"{problem}: all input channels were taken to be alike"]


def _problem(second: torch.Tensor, cross: torch.Tensor, mass: float) -> str | None:
    """Why sums cannot be used, if they cannot."""
    if mass == 0:
        return "no rows"
    if not bool(torch.isfinite(second).all() & torch.isfinite(cross).all()):
        return "moments exceed float32"
    if not float(second.diagonal().mean() / mass) > torch.finfo(torch.float32).tiny:
        return "all inputs are zero"
    return None


def _within(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])
