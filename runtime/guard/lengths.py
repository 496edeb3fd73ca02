"""How long answers become: a running survival curve of their lengths for each class of requests, in bounded memory.

Lengths are counted in bins whose edges grow by 2^(1/8), so a quantile is right within 9 % (below 12 tokens, exactly). An answer that was cut (by
`max_tokens`, by a client that hung up) says only that it would have been at least that long: it leaves the set of those at risk without an end,
as in the product-limit estimate (Kaplan and Meier 1958). So a client that asks for short answers teaches nothing about long ones.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable
from itertools import accumulate

AT_RISK = 16  # answers at least that a step of the curve must rest on; beyond the last such step nothing is known
REMEMBERED = 512.0  # answers; above that all counts are halved, so that old ones fade
CLASSES = 1024  # of a table; the least recently used is forgotten


def edges() -> list[int]:
    """Upper ends (inclusive) of the bins, in tokens, up to 2^24."""
    found = [1]
    while found[-1] < 2**24:
        found.append(max(found[-1] + 1, round(found[-1] * 2**0.125)))
    return found


EDGES = edges()


class Lengths:
    """The lengths of one class, in output tokens of one sequence."""

    def __init__(self) -> None:
        self.ended = array("f", bytes(4 * len(EDGES)))
        self.cut = array("f", bytes(4 * len(EDGES)))
        self.total = 0.0
        self.learned = 0  # answers in all
        self._at_risk: list[float] | None = None  # answers at least as long as each bin

    def learn(self, tokens: int, ended: bool) -> None:
        """One answer of at least one token. `ended`: by itself; else it was cut, and might have been longer."""
        at = min(bisect_left(EDGES, tokens), len(EDGES) - 1)
        (self.ended if ended else self.cut)[at] += 1
        self.total += 1
        self.learned += 1
        self._at_risk = None
        if self.total > REMEMBERED:
            for counts in (self.ended, self.cut):
                for number, count in enumerate(counts):
                    counts[number] = count / 2
            self.total /= 2

    def likely(self, written: int, most: int, share: float) -> int:
        """The length that this share of answers does not pass, of those that have reached `written` tokens; at most `most`.

        `most` as well where too few answers were that long to say.
        """
        if self._at_risk is None:
            both = (ended + cut for ended, cut in zip(reversed(self.ended), reversed(self.cut), strict=True))
            self._at_risk = list(accumulate(both))[::-1]
        alive = 1.0
        for at in range(bisect_left(EDGES, written + 1), len(EDGES)):
            if EDGES[at] >= most or self._at_risk[at] < AT_RISK:
                break
            alive *= 1 - self.ended[at] / self._at_risk[at]
            if alive <= 1 - share:
                return EDGES[at]
        return most


class LengthTable:
    """Lengths by class (route, key, model): at most `limit` classes, the least recently used is forgotten."""

    def __init__(self, limit: int = CLASSES) -> None:
        self.limit = limit
        self.classes: OrderedDict[Hashable, Lengths] = OrderedDict()

    def of(self, name: Hashable) -> Lengths | None:
        """What is known of a class; asking makes no entry, so that what is never answered takes no room."""
        found = self.classes.get(name)
        if found is not None:
            self.classes.move_to_end(name)
        return found

    def learn(self, name: Hashable, tokens: int, ended: bool) -> None:
        if name not in self.classes and len(self.classes) >= self.limit:
            self.classes.popitem(last=False)
        self.classes.setdefault(name, Lengths()).learn(tokens, ended)
        self.classes.move_to_end(name)
