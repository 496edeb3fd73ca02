"""Lists of modules in files from other people: whole names, globs with `*`, regexes after `re:`.

Whole names are looked up, so that thousands of them cost what one does. Patterns are compared one by one, within an `Allowance`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import translate

from .patterns import Allowance, BoundedPattern

MOST_PATTERNS = 10_000  # of one list; releases have hundreds
GLOB_CHARACTERS = 1000  # a comparison takes time that grows with these and with the name's
_LITERAL = re.compile(r"[^*?\[]*")  # what every name of a glob begins with


class NameList:
    """The entries of one list.

    globs, regexes: whether entries with `*`, and those after `re:`, are patterns, or names like the others. Raises the allowance's error for
    what is no pattern, for more than MOST_PATTERNS, for a glob of more than GLOB_CHARACTERS, and where the allowance is used up.
    """

    def __init__(
        self, entries: Iterable[str], allowance: Allowance, *, globs: bool = False, regexes: bool = False
    ) -> None:
        self._allowance = allowance
        self.exact = frozenset(entries)
        self._regexes: list[BoundedPattern] = []
        self._globs: dict[str, list[re.Pattern[str]]] = {}
        patterns = [e for e in self.exact if (regexes and e.startswith("re:")) or (globs and "*" in e)]
        self._lengths = sorted({entry.count(".") + 1 for entry in self.exact.difference(patterns)})
        where, error = allowance.where, allowance.error
        if len(patterns) > MOST_PATTERNS:
            raise error(
                f"{where}: {len(patterns):,} patterns in one list of modules, more than {MOST_PATTERNS:,}. {allowance.remedy}"
            )
        for entry in allowance.timed(sorted(patterns)):
            if regexes and entry.startswith("re:"):
                self._regexes.append(BoundedPattern(entry[3:], where, error, allowance))
                continue
            if len(entry) > GLOB_CHARACTERS:
                raise error(
                    f"{where}: a pattern of {len(entry):,} characters, '{entry[:60]}...', more than {GLOB_CHARACTERS:,}. {allowance.remedy}"
                )
            head = _LITERAL.match(entry)
            self._globs.setdefault(head[0] if head else "", []).append(re.compile(translate(entry)))
        self._heads = sorted({len(head) for head in self._globs})

    def names(self, module: str) -> bool:
        """Whether an entry is this very name, or a pattern for it."""
        return (
            module in self.exact
            or any(glob.match(module) for glob in self._allowance.timed(self._globs_for(module)))
            or any(regex.match(module) for regex in self._regexes)
        )

    def _globs_for(self, module: str) -> Iterator[re.Pattern[str]]:
        for length in self._heads:
            if length > len(module):
                return
            yield from self._globs.get(module[:length], ())

    def has_run(self, module: str) -> bool:
        """Whether an entry is a run of the name's parts: "layers.3.mlp" of "model.layers.3.mlp.gate"."""
        return any(run in self.exact for run in self._allowance.timed(self.runs(module)))

    def runs(self, module: str) -> Iterator[str]:
        """Runs of the name's parts that have as many parts as any entry has."""
        parts = module.split(".")
        for length in self._lengths:
            if length > len(parts):
                return
            for first in range(len(parts) - length + 1):
                yield ".".join(parts[first : first + length])

    def has_piece(self, module: str) -> bool:
        """Whether an entry is any piece of the name."""
        return any(entry in module for entry in self._allowance.timed(self.exact))
