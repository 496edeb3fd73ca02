"""How long a decoding step of a plan takes, by steps that were measured near it.

Figures of one checkpoint and node lie on one curve: the time of a step against the least time in which memory gives what the step reads
(`decode_step`), whatever the requests and contexts are that it comes from. Between two figures that are no more than GAP apart the time is
interpolated, both axes logarithmic, and the range is that time, divided by a spread and times it: for the measured recipe the largest error
with which the curve's other figures give one of them, at least LEAST_SPREAD, which is more than what two runs differ by; else SPREAD, within
which all figures that ship are given so (tests/runtime/test_near.py). Farther apart, and beyond the first and the last figure, the range is
all that a time can be which grows with what is read, but by no larger ratio, so that it narrows towards a figure; and the spread.

A curve of another GPU with the same chip (`Gpu.chip`) bounds a plan from both sides (`share_on`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..engines.device import Gpu
from .fit import Fit
from .measured import MeasuredSet, measured_sets

GAP = 3.0
SPREAD, LEAST_SPREAD = 1.15, 1.05
ENOUGH = 3  # errors, to know a curve's spread by
# How far a plan may be beyond the figures of a curve. Below SHORT, the cache that a step reads is small beside the weights.
REACH, SHORT, BYTES = 2.0, 8192, 1.25
SAME_BYTES = 1.01  # of one recipe


@dataclass(frozen=True)
class Near:
    """Shares of the bound, least and most, by `count` figures on both sides of a plan: as they were measured, or, where others names the GPUs
    of the same chip that they are of, what they leave the plan's own. sources: where they are from, one line a set."""

    low: float
    high: float
    count: int
    sources: tuple[str, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """The sets of one recipe on one node. points: least and measured seconds of each step, the shortest first."""

    sets: tuple[MeasuredSet, ...]

    @property
    def known(self) -> MeasuredSet:
        return self.sets[0]

    @property
    def points(self) -> list[tuple[float, float]]:
        return sorted((count / bound, count / speed) for known in self.sets for count, _, speed, bound in known.figures)

    @property
    def most(self) -> int:
        """Requests at once."""
        return max(count for known in self.sets for count, _, _, _ in known.figures)

    @property
    def longest(self) -> int:
        """Tokens of a request, at least SHORT."""
        return max(SHORT, *(tokens for known in self.sets for _, tokens, _, _ in known.figures))

    @property
    def errors(self) -> list[float]:
        """By how many times each figure is off what the others on its two sides give, at least 1.0; of those whose sides are close."""
        points, found = self.points, []
        for index in range(1, len(points) - 1):
            least, time = points[index]
            between = _between([*points[:index], *points[index + 1 :]], least)
            if between.close:
                found.append(_ratio(between.low, time))
        return found

    @property
    def spread(self) -> float:
        errors = self.errors
        return max(LEAST_SPREAD, *errors) if len(errors) >= ENOUGH else SPREAD


@dataclass(frozen=True)
class Span:
    """Least and most seconds of a step, by `count` figures. close: interpolated between two that are near each other."""

    low: float
    high: float
    count: int
    close: bool


def near(fit: Fit, context: int, requests: int, least: float) -> Near | None:
    """By figures of the same family, kind of weights and node and of about as many bytes; where there is none of that GPU, by those of others
    with its chip. Curves that interpolate come first, then those of the same recipe. least: seconds in which the GPU's memory gives what a step reads.

    None where nothing is near, with a draft, whose accepted tokens no figure has, and where the model is not split into tensor-parallel parts
    alone, as in all figures.
    """
    split = fit.setup.split
    if fit.setup.draft is not None or requests < 1 or split.tp != fit.node.count or split.expert_parallel:
        return None
    gpu = fit.node.gpu
    found = []
    for curve in curves():
        if _same_kind(fit, curve.known):
            there = least * gpu.bandwidth / curve.known.measured_on.bandwidth
            spread = curve.spread if _same_recipe(fit, curve.known) else SPREAD
            if span := span_of(curve, context, requests, there, spread):
                found.append((curve, span, there))
    found = [one for one in found if one[0].known.gpu == gpu.name] or found
    found = [one for one in found if one[1].close] or found
    found = [one for one in found if _same_recipe(fit, one[0].known)] or found
    if not found:
        return None
    known = [one for curve, _, _ in found for one in curve.sets]
    return Near(
        min(share_on(gpu, curve.known.measured_on, there / span.high)[0] for curve, span, there in found),
        max(share_on(gpu, curve.known.measured_on, there / span.low)[1] for curve, span, there in found),
        sum(span.count for _, span, _ in found),
        tuple(dict.fromkeys(_source(fit, one) for one in known)),
        tuple(dict.fromkeys(one.gpu for one in known if one.gpu != gpu.name)),
    )


def curves() -> list[Curve]:
    found = dict[tuple[str, str, str, int], list[MeasuredSet]]()
    for known in measured_sets():
        found.setdefault((known.model_type, known.recipe, known.gpu, known.gpus), []).append(known)
    return [Curve(tuple(sets)) for sets in found.values()]


def span_of(curve: Curve, context: int, requests: int, least: float, spread: float) -> Span | None:
    """What a step of the measured GPU takes. None where it is more than REACH beyond the figures."""
    points = curve.points
    if (
        requests > REACH * curve.most
        or context > REACH * curve.longest
        or not points[0][0] / REACH <= least <= REACH * points[-1][0]
    ):
        return None
    span = _between(points, least)
    beyond = max(1.0, requests / curve.most)  # at most all of a step's time is that of its requests
    return Span(max(least, span.low / spread), span.high * spread * beyond, span.count, span.close and beyond == 1)


def _between(points: Sequence[tuple[float, float]], least: float) -> Span:
    (first, first_time), (last, last_time) = points[0], points[-1]
    if least <= first:
        return Span(first_time * least / first, first_time, 1, least == first)
    if least >= last:
        return Span(last_time, last_time * least / last, 1, least == last)
    (below, lower), (above, upper) = next(pair for pair in pairwise(points) if pair[1][0] >= least)
    if above > GAP * below:
        ends = max(lower, upper * least / above), min(upper, lower * least / below)
        return Span(min(ends), max(ends), 2, False)
    part = math.log(least / below) / math.log(above / below)
    time = lower ** (1 - part) * upper**part
    return Span(time, time, 2, True)


def share_on(gpu: Gpu, measured: Gpu, share: float) -> tuple[float, float]:
    """The least and the most of `gpu`'s bound that a step can reach which reached `share` of the bound of `measured`, of the same chip.

    Between the two only what a step reads from memory changes its time, by the ratio of the bandwidths; launches, compute and all-reduce take
    as long. A step that is all memory reaches the same share of its GPU's bound, a step that is none the same speed, which is share x
    (bandwidth measured on / bandwidth planned for) of the bound. Every other step lies between the two.
    """
    ends = share, share * measured.bandwidth / gpu.bandwidth
    return min(ends), min(1.0, max(ends))


def _source(fit: Fit, known: MeasuredSet) -> str:
    gpu = fit.node.gpu
    other = (
        ""
        if known.gpu == gpu.name
        else f", not on {fit.node.name}, which has the same chip ({gpu.chip}) and {gpu.bandwidth / known.measured_on.bandwidth:.2f} times the "
        "memory bandwidth"
    )
    return f"{known.recipe} on {known.gpus}x{known.gpu}{other}: {known.source}"


def _same_kind(fit: Fit, known: MeasuredSet) -> bool:
    weights = "int" if any(scheme.kind == "int" for scheme in fit.model.schemes) else "float"
    return (
        (known.model_type, known.weights) == (fit.model.family.model_type, weights)
        and known.gpus == fit.node.count
        and _same_chip(fit.node.gpu, known.measured_on)
        and _ratio(known.stored_bytes, fit.model.stored_bytes) <= BYTES
    )


def _same_recipe(fit: Fit, known: MeasuredSet) -> bool:
    """As far as the bytes say: an output read from its folder does not name its recipe."""
    return _ratio(known.stored_bytes, fit.model.stored_bytes) <= SAME_BYTES


def _same_chip(a: Gpu, b: Gpu) -> bool:
    return a.name == b.name or (a.chip == b.chip != "")


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)
