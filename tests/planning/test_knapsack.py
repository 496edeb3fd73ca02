"""The knapsack against brute force, and its promise that more budget never loses more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.planning.knapsack import Solution, efficient, hull, pareto, solve

Items = list[list[tuple[int, int]]]
option = st.tuples(st.integers(0, 60), st.integers(0, 1000))
problems = st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=5)


def brute_force(items: Items, budget: int) -> tuple[int, int] | None:
    """(loss, cost) of the best combination within the budget."""
    sums = ((sum(o[1] for o in c), sum(o[0] for o in c)) for c in itertools.product(*items))
    return min((pair for pair in sums if pair[1] <= budget), default=None)


def check(items: Items, solution: Solution) -> None:
    chosen = [options[i] for options, i in zip(items, solution.chosen, strict=True)]
    assert (sum(o[0] for o in chosen), sum(o[1] for o in chosen)) == (solution.cost, solution.loss)


@settings(max_examples=300, deadline=None)
@given(problems, st.integers(0, 320))
def test_solution_is_the_best_of_all(items: Items, budget: int) -> None:
    solution = solve(items, budget)
    expected = brute_force(items, budget)
    assert (solution and (solution.loss, solution.cost)) == expected
    if solution:
        check(items, solution)


@settings(max_examples=100, deadline=None)
@given(problems, st.integers(0, 300), st.integers(0, 100))
def test_more_budget_never_loses_more(items: Items, budget: int, more: int) -> None:
    small, large = solve(items, budget), solve(items, budget + more)
    if small:
        assert large and large.loss <= small.loss


@settings(max_examples=100, deadline=None)
@given(problems)
def test_efficient_solutions_are_the_best_at_their_cost(items: Items) -> None:
    found = efficient(items)
    assert [s.cost for s in found] == sorted(s.cost for s in found)
    for solution in found:
        check(items, solution)
        assert brute_force(items, solution.cost) == (solution.loss, solution.cost)


def test_corners_leave_out_what_a_mixture_beats() -> None:
    options = pareto([(0, 100), (1, 90), (2, 20), (3, 30), (4, 0)])
    assert [o.cost for o in options] == [0, 1, 2, 4]
    assert [o.cost for o in hull(options)] == [0, 2, 4]


@pytest.mark.parametrize("layers", [62])
def test_a_real_model_is_solved_exactly_in_units_of_its_layers(layers: int) -> None:
    """As many layers as M2 has, losses over four decades: against a plain table of all sums, which equal costs allow."""
    random = np.random.default_rng(1)
    costs = [0, 1, 2, 4, 6, 9, 12]
    items: Items = []
    for _ in range(layers):
        weight = 10 ** random.uniform(6, 10)
        items.append([(c, int(weight * 4.0 ** (-c / 4) * random.uniform(0.8, 1.2))) for c in costs])
    budget = layers * 3
    best = np.full(budget + 1, np.iinfo(np.int64).max // 2)
    best[0] = 0
    for options in items:
        rows = [np.concatenate((np.full(c, best.max()), best[: budget + 1 - c])) + loss for c, loss in options]
        best = np.min(rows, axis=0)
    solution = solve(items, budget)
    assert solution is not None and solution.loss == best.min()
    check(items, solution)
