"""The multiple-choice knapsack, solved exactly: one option of each item, the least loss within a budget of costs.

A dynamic program over the items keeps the Pareto frontier of (cost, loss) and drops what cannot be part of the answer:
states that no completion brings into the budget, and states whose relaxed completion (options may be mixed) already
loses more than a known solution. Both bounds are exact, so that the answer is. Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem", European Journal of Operational Research 83 (1995), has the relaxation.

Costs and losses are integers: sums are exact, and the answer does not depend on the order of the items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Option:
    """One way to settle an item. cost, loss: not negative; index: its place among the options given."""

    cost: int
    loss: int
    index: int


@dataclass(frozen=True)
class Solution:
    """chosen: the index of the option of every item."""

    chosen: tuple[int, ...]
    cost: int
    loss: int


def pareto(options: Sequence[tuple[int, int]]) -> list[Option]:
    """The (cost, loss) options that no other beats in both, by rising cost and falling loss."""
    kept: list[Option] = []
    order = sorted(range(len(options)), key=lambda i: (*options[i], i))
    for i in order:
        cost, loss = options[i]
        if not kept or loss < kept[-1].loss:
            kept.append(Option(cost, loss, i))
    return kept


def hull(options: Sequence[Option]) -> list[Option]:
    """The corners of the lower convex hull of Pareto options: the loss saved by each further byte falls along it."""
    corners: list[Option] = []
    for option in options:
        while len(corners) > 1 and _above(corners[-2], corners[-1], option):
            corners.pop()
        corners.append(option)
    return corners


def _above(left: Option, middle: Option, right: Option) -> bool:
    """Whether the middle is on or above the line from left to right."""
    saved, spent = left.loss - middle.loss, middle.cost - left.cost
    return saved * (right.cost - middle.cost) <= (middle.loss - right.loss) * spent


@dataclass(frozen=True)
class _Step:
    """From one corner of an item's hull to the next."""

    item: int
    corner: Option
    cost: int
    saved: int


def _steps(items: Sequence[Sequence[Option]]) -> list[_Step]:
    """All steps along the items' hulls, those that save most per cost first; an item's own keep their order."""
    steps = []
    for number, options in enumerate(items):
        corners = hull(options)
        for before, after in pairwise(corners):
            steps.append(_Step(number, after, after.cost - before.cost, before.loss - after.loss))
    return sorted(steps, key=lambda step: (-step.saved / step.cost, step.item, step.corner.cost))


def efficient(items: Sequence[Sequence[tuple[int, int]]]) -> list[Solution]:
    """Solutions by rising cost, each the best that its cost can buy: the corners of the frontier's convex hull."""
    kept = [pareto(options) for options in items]
    chosen = [options[0] for options in kept]
    found = [_solution(chosen)]
    for step in _steps(kept):
        chosen[step.item] = step.corner
        found.append(_solution(chosen))
    return found


def _solution(chosen: Sequence[Option]) -> Solution:
    return Solution(tuple(o.index for o in chosen), sum(o.cost for o in chosen), sum(o.loss for o in chosen))


def solve(items: Sequence[Sequence[tuple[int, int]]], budget: int) -> Solution | None:
    """The least loss whose cost is within the budget, and of those the least cost; None if nothing is within it.

    items: for every item its options as (cost, loss).
    """
    kept = [pareto(options) for options in items]
    least = sum(options[0].cost for options in kept)
    if least > budget:
        return None
    bounds = _Bounds(kept)
    known = _greedy(kept, budget).loss
    states = _States(np.zeros(1, np.int64), np.zeros(1, np.int64))
    trail: list[tuple[Ints, Ints]] = []
    for number, options in enumerate(kept):
        states, parents, picks = states.extended(options)
        within = states.costs + bounds.least_cost[number + 1] <= budget
        within &= bounds.at_least(number + 1, states, budget) <= known
        states, kept_rows = states.only(within).frontier(np.flatnonzero(within))
        trail.append((parents[kept_rows], picks[kept_rows]))
    row = len(states.costs) - 1  # of a frontier by rising cost the last loses least
    cost, loss, chosen = int(states.costs[row]), int(states.losses[row]), []
    for options, (parents, picks) in zip(reversed(kept), reversed(trail), strict=True):
        chosen.append(options[int(picks[row])].index)
        row = int(parents[row])
    return Solution(tuple(reversed(chosen)), cost, loss)


def _greedy(items: Sequence[Sequence[Option]], budget: int) -> Solution:
    """A good solution within the budget: every step of the hulls that still fits, best first."""
    chosen = [options[0] for options in items]
    left = budget - sum(option.cost for option in chosen)
    for step in _steps(items):
        cost = step.corner.cost - chosen[step.item].cost
        if cost <= left:  # a corner that was skipped is passed over: its successors are dearer
            left -= cost
            chosen[step.item] = step.corner
    return _solution(chosen)


@dataclass
class _States:
    """Partial solutions: their costs and losses."""

    costs: Ints
    losses: Ints

    def extended(self, options: Sequence[Option]) -> tuple[_States, Ints, Ints]:
        """Every state with every option: the new states, the old state of each and the place of its option."""
        costs = np.array([o.cost for o in options], np.int64)
        losses = np.array([o.loss for o in options], np.int64)
        parents = np.repeat(np.arange(len(self.costs)), len(options))
        picks = np.tile(np.arange(len(options)), len(self.costs))
        return _States(self.costs[parents] + costs[picks], self.losses[parents] + losses[picks]), parents, picks

    def only(self, rows: npt.NDArray[np.bool_]) -> _States:
        return _States(self.costs[rows], self.losses[rows])

    def frontier(self, names: Ints) -> tuple[_States, Ints]:
        """The Pareto states by rising cost, and their names."""
        order = np.lexsort((self.losses, self.costs))
        losses = self.losses[order]
        best = np.minimum.accumulate(losses)
        rows = order[np.concatenate(([True], losses[1:] < best[:-1]))]
        return _States(self.costs[rows], self.losses[rows]), names[rows]


class _Bounds:
    """What the items from one on cost and lose at least."""

    def __init__(self, items: Sequence[Sequence[Option]]) -> None:
        count = len(items)
        self.least_cost = [0] * (count + 1)
        self._worst = [0] * (count + 1)
        for number in reversed(range(count)):
            self.least_cost[number] = self.least_cost[number + 1] + items[number][0].cost
            self._worst[number] = self._worst[number + 1] + items[number][0].loss
        steps = _steps(items)
        self._curves = []
        for number in range(count + 1):
            own = [step for step in steps if step.item >= number]
            spent = np.cumsum([0, *(step.cost for step in own)], dtype=np.float64)
            saved = np.cumsum([0, *(step.saved for step in own)], dtype=np.float64)
            self._curves.append((spent, saved))

    def at_least(self, number: int, states: _States, budget: int) -> npt.NDArray[np.float64]:
        """A lower bound of the loss of every state's best completion by the items from `number` on."""
        spare = (budget - self.least_cost[number] - states.costs).astype(np.float64)
        saved = np.interp(spare, *self._curves[number])
        # float64 carries 53 bits: what the interpolation may be off by must not drop a state
        return states.losses + self._worst[number] - saved * (1 + 1e-9) - 1
