"""From errors of single layers to the KL divergence of a whole recipe: the arithmetic of `sensitivity`. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_MOST_LEFT = 4.0  # times its estimate, that the error outside the bulk of the weights may count, and a quarter at least


def kl_of_error(error: float, probes: Sequence[tuple[float, float]]) -> float:
    """The KL divergence that an error would end in, from probes (error, KL divergence) of the same layer and role.

    A divergence is proportional to the squared norm of a small error. Between two probes a power law leads from one to
    the other; beyond them it is in proportion to the nearer one.
    """
    known = sorted(probe for probe in probes if min(probe) > 0)
    if not known or error <= 0:
        return 0.0
    for (low, kl), (high, kl_high) in pairwise(known):
        if low <= error <= high and low < high:
            return kl * math.pow(error / low, math.log(kl_high / kl) / math.log(high / low))
    nearest = known[0] if error < known[0][0] else known[-1]
    return nearest[1] * error / nearest[0]


def kl_through(pilots: Sequence[tuple[float, float]], total: float) -> float:
    """The KL divergence that a sum of estimates means, by (sum, KL divergence) of recipes that were measured.

    Straight lines between the pilots in logarithms; in proportion below the first and above the last. Never falls.
    """
    known: list[tuple[float, float]] = []
    for estimate, kl in sorted(pilots):
        if estimate > 0 and kl > 0 and (not known or estimate > known[-1][0]):
            known.append((estimate, max(kl, known[-1][1] if known else 0.0)))
    if not known or total <= 0:
        return max(total, 0.0)
    if total <= known[0][0]:
        return known[0][1] * total / known[0][0]
    for (x, y), (x2, y2) in pairwise(known):
        if total <= x2:
            share = math.log(total / x) / math.log(x2 / x)
            return math.exp(math.log(y) + share * math.log(y2 / y))
    return known[-1][1] * total / known[-1][0]


def others_left(pilots: Sequence[tuple[tuple[float, float], float, bool]]) -> float:
    """By what the estimates outside the bulk of the weights are to be multiplied so that the last pilot is predicted.

    pilots: ((estimates of the bulk, of others), KL measured, whether it is the one that this is for). 1 without that one.
    """
    asked = next(((sums, kl) for sums, kl, others in pilots if others), None)
    known = [(sums, kl) for sums, kl, others in pilots if not others]
    if asked is None or not known or asked[0][1] <= 0:
        return 1.0
    (experts, others), kl = asked

    def predicted(left: float) -> float:
        return kl_through([(e + left * o, own) for (e, o), own in known], experts + left * others)

    low, high = 1 / _MOST_LEFT, _MOST_LEFT
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if predicted(middle) < kl else (low, middle)
    return math.sqrt(low * high)
