"""The peak of what running requests will hold, against stepping through time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3quant.runtime.guard.forecast import Course, Forecast

courses = st.builds(Course, st.integers(0, 500), st.none() | st.integers(1, 60))


def peak_by_steps(all_courses: list[Course], fixed: int) -> float:
    """A course holds one token more after each step, until its last, after which it holds none."""
    last = max((course.left for course in all_courses if course.left is not None), default=0)
    found = 0.0
    for step in range(int(last) + 1):
        held = sum(c.held if c.left is None else c.held + step for c in all_courses if c.left is None or step <= c.left)
        found = max(found, held + fixed)
    return found


@given(st.lists(courses, max_size=12), st.integers(0, 100))
def test_the_peak_is_that_of_every_step(running: list[Course], fixed: int) -> None:
    assert Forecast(running, fixed).peak == peak_by_steps(running, fixed)


@given(st.lists(courses, max_size=12), courses, st.integers(0, 100))
def test_one_more_is_as_if_it_had_been_there(running: list[Course], one: Course, fixed: int) -> None:
    assert Forecast(running, fixed).with_course(one) == Forecast([*running, one], fixed).peak


@given(st.lists(courses, max_size=12))
def test_the_peak_is_at_most_the_sum_of_the_peaks(running: list[Course]) -> None:
    assert Forecast(running).peak <= sum(course.held + (course.left or 0) for course in running)


def test_what_ends_makes_room_for_what_grows() -> None:
    short, long = Course(held=500, left=10), Course(held=100, left=500)
    assert Forecast([short, long]).peak == pytest.approx(500 + 10 + 100 + 10)
    assert Forecast([]).peak == 0 and Forecast([], 7).with_course(Course(3, None)) == 10
