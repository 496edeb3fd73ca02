"""The most KV cache that running requests will hold together, if each goes on as expected. Pure.

A request holds its prompt and what it has written, takes one more token each step, and gives everything back when it ends. Requests do not end
at the same time, so the peak of the sum is below the sum of the peaks: as one is long, another is gone. With the requests sorted by the tokens
they have left, the sum can only have its peak where one of them ends, because between two ends it grows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Course:
    """One sequence: cache tokens it holds now, and how many more it takes before it ends. `left` None: it never ends, `held` is its most."""

    held: float
    left: float | None


class Forecast:
    """`peak`: the most tokens held at one time by the courses and by `fixed` tokens that stay."""

    def __init__(self, courses: Iterable[Course], fixed: float = 0.0) -> None:
        ending: list[tuple[float, float]] = []
        for course in courses:
            if course.left is None:
                fixed += course.held
            else:
                ending.append((course.left, course.held))
        ending.sort()
        self.fixed = fixed
        self.ends = [left for left, _ in ending]
        self.after = [
            *reversed(list(accumulate(held for _, held in reversed(ending)))),
            0.0,
        ]  # held by this one and later ones
        at = [self._held(number, left) for number, left in enumerate(self.ends)]
        self.peak = max(at, default=fixed)
        self.with_one_more = list(accumulate((held + left for held, left in zip(at, self.ends, strict=True)), max))

    def _held(self, first: int, steps: float) -> float:
        """Tokens held after that many steps by the courses from number `first` on."""
        return self.fixed + self.after[first] + (len(self.ends) - first) * steps

    def with_course(self, course: Course) -> float:
        """The peak if that course began now. O(log n)."""
        if course.left is None:
            return self.peak + course.held
        later = bisect_right(self.ends, course.left)
        meanwhile = self.with_one_more[later - 1] + course.held if later else 0.0
        at_its_end = self._held(later, course.left) + course.held + course.left
        return max(self.peak, meanwhile, at_its_end)
