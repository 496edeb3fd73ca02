"""How far moments and targets may be trusted, from the rows that they were taken over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3quant.calibration.feedback.moments import Moments


@dataclass(frozen=True)
class Trust:
    """Regularisation of one kind of weight. damping and ridge: shares of the mean diagonal; prior: rows."""

    damping: float = 0.1
    ridge: float = 0.5
    prior: float = 0.0
    shrink: float = 0.0  # off-diagonal entries of the own moment times 1 - shrink
    slope: float = 0.0  # damping, ridge ~ (1 + slope * K / rows)


def regularised(
    moments: list[Moments], trust: Trust, prior: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(second [E, K, K] with prior and damping, plain second + prior, cross [E, M, K], ridge [E]), all per unit of mass."""
    seconds, plain, crosses, ridges = [], [], [], []
    for own in moments:
        mass = max(float(own.mass.sum()), torch.finfo(torch.float32).tiny)
        second, cross = own.second.sum(0) / mass, own.cross.sum(0) / mass
        rows, width = own.effective_rows, second.shape[0]
        if trust.shrink:
            diagonal = second.diagonal().clone()
            a = trust.shrink / (1 + rows / width)
            second = second * (1 - a)
            second.diagonal().copy_(diagonal)
        if prior is not None and trust.prior:
            share = rows / (rows + trust.prior * width)
            second, cross = second * share + prior * (1 - share), cross * share
        mean = second.diagonal().mean()
        grow = 1 + trust.slope * width / max(rows, 1.0)
        damped = second.clone()
        damped.diagonal().add_(mean * trust.damping * grow)
        seconds.append(damped)
        plain.append(second)
        crosses.append(cross)
        ridges.append(mean * trust.ridge * grow)
    return torch.stack(seconds), torch.stack(plain), torch.stack(crosses), torch.stack(ridges)
