"""Damping, ridge and prior of moments and targets, from the number of rows that they were computed from.

With few rows for each column, the sample misses directions in which the inputs do move, and errors
placed there appear on other text. So the moment is damped, and the target pulled to the weight, in inverse proportion
to the effective rows for each column; and weights of experts that read a norm get the whole layer's moment as a prior.

The constants are those with the least error on held-out rows of the trained fixtures (experts of layer 1, 0.3 to 40
effective rows per column): rows times damping is best between 0.3 and 3 for w1 and w3, between 3 and 10 for w2, whose
inputs have heavier tails and no prior. Letting each layer choose a quarter or four times as much on held-out halves of
its own text was no better with much text and worse with little (docs/rounding.md).
"""

from __future__ import annotations

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
    moments: Moments,
    rule: Rule,
    prior: torch.Tensor | None = None,
    half: int | None = None,
) -> Estimate:
    """Estimates of a stack from all rows or from one half. prior: [K, K], a second moment per row."""
    system, cross, mass, rows = moments.of(half)
    width = system.shape[1]
    states = _states(system, cross, mass)
    dead = (system.diagonal(dim1=1, dim2=2) == 0).sum(1)
    # The one place where the device is waited for.
    facts = torch.stack([states, dead, moments.dropped]).tolist()
    notes = [_notes(state, silent, lost, prior is not None) for state, silent, lost in zip(*facts, strict=True)]
    usable = states == _USABLE
    rows = torch.where(usable, rows, 0.0)
    mass = torch.where(usable, mass, 1.0)
    share = torch.ones_like(rows) if prior is None else rows / (rows + PRIOR_ROWS * width)
    scale = (share / mass).float()[:, None, None]
    system, cross = system * scale, cross * scale
    if prior is not None:
        system.addcmul_(prior, (1 - share).float()[:, None, None])
    for slot, state in enumerate(facts[0]):
        if state != _USABLE:
            system[slot] = torch.eye(width, device=system.device) if prior is None else prior
            cross[slot] = 0.0
    mean = system.diagonal(dim1=1, dim2=2).mean(1)
    per_column = rows.clamp(min=1.0) / width
    damping = (rule.damping / per_column).clamp(*_DAMPING)
    ridge = (rule.ridge / per_column).clamp(*_RIDGE)
    second = system.clone()
    second.diagonal(dim1=1, dim2=2).add_((mean * damping.float())[:, None])
    said = torch.stack([damping, rows]).tolist()
    return Estimate(second, system, cross, mean * ridge.float(), said[0], said[1], notes)


_USABLE = 0
# Why sums cannot be used, by state.
_PROBLEMS = ("", "no rows", "moments exceed float32", "all inputs are zero")


def _states(second: torch.Tensor, cross: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """[E] int64: what is wrong with the sums of a stack; earlier problems hide later ones."""
    largest = [torch.linalg.vector_norm(part, float("inf"), dim=(1, 2)) for part in (second, cross)]
    finite = torch.isfinite(largest[0]) & torch.isfinite(largest[1])
    mean = second.diagonal(dim1=1, dim2=2).mean(1) / mass
    seen = mean > torch.finfo(torch.float32).tiny
    return torch.where(mass == 0, 1, torch.where(~finite, 2, torch.where(~seen, 3, _USABLE)))


def _notes(state: int, dead: int, dropped: int, prior: bool) -> list[str]:
    notes = [f"{dropped} rows are not finite and were left out"] if dropped else []
    if state != _USABLE:
        instead = "the layer's moment was used" if prior else "all input channels were taken to be alike"
        return [*notes, f"{_PROBLEMS[state]}: {instead}"]
    return [*notes, f"{dead} input channels are always zero"] if dead else notes
