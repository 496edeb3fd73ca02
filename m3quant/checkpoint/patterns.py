"""Regexes in files from other people: refused if they are invalid, and matched with a limit on time.

One such as (a+)+$ takes time that doubles with every character of the name, and Python's own `re` cannot be interrupted.
"""

from __future__ import annotations

import time

import regex

from ..errors import M3QuantError

SECONDS = 5.0  # of all matches of one pattern; those of releases take a microsecond a name
CHARACTERS = 100_000


class BoundedPattern:
    """A pattern and the time that its matches may still take.

    where: begins the error's sentence. Raises `error` for what is no regex, or is longer than CHARACTERS.
    """

    def __init__(self, pattern: str, where: str, error: type[M3QuantError]) -> None:
        self.pattern, self._where, self._error, self._left = pattern, where, error, SECONDS
        if len(pattern) > CHARACTERS:
            raise error(f"{where}: a regular expression of {len(pattern):,} characters; write it shorter.")
        try:
            self._compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as fault:
            raise error(f"{where}: '{pattern[:200]}' is not a regular expression: {fault}.") from None

    def match(self, name: str) -> bool:
        """Whether the pattern matches at the beginning of `name`. Raises the error once its matches have taken SECONDS."""
        began = time.perf_counter()
        try:
            if self._left <= 0:
                raise TimeoutError
            found = self._compiled.match(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise self._error(
                f"{self._where}: the regular expression '{self.pattern[:200]}' takes more than {SECONDS:g} s on names of modules; "
                "write it without repetitions inside repetitions."
            ) from None
        self._left -= time.perf_counter() - began
        return found
