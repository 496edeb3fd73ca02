"""Patterns in files from other people: refused if they are invalid, and compared with a limit on time.

A regex such as (a+)+$ takes time that doubles with every character of the name, and Python's own `re` cannot be interrupted. Thousands of
quick patterns, each compared with every tensor of a checkpoint, take hours all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import regex

from ..errors import M3QuantError

T = TypeVar("T")
SECONDS = 5.0  # of all matches of one pattern; those of releases take a microsecond a name
# Of all comparisons with the lists of one file: a regex of a recipe takes 0.4 s for M2.7's 47,000 experts.
LIST_SECONDS = 120.0
CHARACTERS = 100_000


class Allowance:
    """Time for comparing the lists of one file with names of modules. What else is done in between does not count.

    where: begins the error's sentence. remedy: ends it, a sentence.
    """

    def __init__(self, where: str, remedy: str, error: type[M3QuantError], seconds: float | None = None) -> None:
        self.where, self.remedy, self.error = where, remedy, error
        self._seconds = LIST_SECONDS if seconds is None else seconds
        self.left = self._seconds

    def timed(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the time that passes until the caller has done with them counts. Raises the error once none is left.

        Also around matches of a `BoundedPattern` with this allowance, whose time is not counted twice.
        """
        began, left = time.perf_counter(), self.left
        try:
            for item in items:
                self.check()
                yield item
                self.left = min(self.left, left - (time.perf_counter() - began))
        finally:
            self.left = min(self.left, left - (time.perf_counter() - began))

    def check(self) -> None:
        """Raises the error where no time is left."""
        if self.left <= 0:
            raise self.error(
                f"{self.where}: to compare its lists of modules with the names of tensors takes more than {self._seconds:g} s. {self.remedy}"
            )


class BoundedPattern:
    """A pattern and the time that its matches may still take, of the list's allowance too if it has one.

    where: begins the error's sentence. Raises `error` for what is no regex, or is longer than CHARACTERS.
    """

    def __init__(self, pattern: str, where: str, error: type[M3QuantError], allowance: Allowance | None = None) -> None:
        self.pattern, self._where, self._error, self._left = pattern, where, error, SECONDS
        self._allowance = allowance
        if len(pattern) > CHARACTERS:
            raise error(f"{where}: a regular expression of {len(pattern):,} characters; write it shorter.")
        try:
            self._compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as fault:
            raise error(f"{where}: '{pattern[:200]}' is not a regular expression: {fault}.") from None

    def match(self, name: str) -> bool:
        """Whether the pattern matches at the beginning of `name`. Raises the error once its matches have taken SECONDS."""
        return self._found(self._compiled.match, name, "names of modules")

    def fullmatch(self, text: str, what: str) -> bool:
        """Whether the pattern matches the whole of `text`. what: the texts, for the error. Raises as `match`."""
        return self._found(self._compiled.fullmatch, text, what)

    def _found(self, match: Callable[..., object], text: str, what: str) -> bool:
        allowance, left = self._allowance, self._left
        if allowance is not None:
            allowance.check()
            left = min(left, allowance.left)
        began = time.perf_counter()
        try:
            if left <= 0:
                raise TimeoutError
            found = match(text, timeout=max(left, 1e-3)) is not None
        except TimeoutError:
            if allowance is not None and self._left > allowance.left:
                allowance.left = 0.0
                allowance.check()
            raise self._error(
                f"{self._where}: the regular expression '{self.pattern[:200]}' takes more than {SECONDS:g} s on {what}; "
                "write it without repetitions inside repetitions."
            ) from None
        taken = time.perf_counter() - began
        self._left -= taken
        if allowance is not None:
            allowance.left -= taken
        return found
