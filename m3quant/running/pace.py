"""How fast a stream of bytes goes and when it ends, told from what came lately: streams begin late, leap by whole files, and stall.

A rate is that of the bytes after one arrival until another, over the time between them. So neither the wait for the first bytes nor the
part of a leap that is not there yet counts, and a stream of a constant rate has that rate from its second arrival on. What has been
quiet for longer than it ever was between two arrivals has slowed down: that time counts, and the time left grows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# A rate is of the last arrivals that are older than this and hold this share of the work: a few leaps, or layers, of unequal times.
RECENT_SECONDS = 30.0
RECENT_SHARE = 0.1
# The share of the work after which a rate says when all is done. Of computing, the first bytes of M2's 62 layers, and the embeddings, come
# long before what takes the time; of a network all bytes are alike.
KNOWN_SHARE = 0.02
KNOWN_SHARE_OF_NETWORK = 0.005
LEAST_SECONDS = 5.0  # several files that are sent at once arrive at once
# Arrivals within this time, or with together less than this share of the work, count as one: about a hundred are kept.
MARK_SECONDS = 1.0
MARK_SHARE = RECENT_SHARE / 60


@dataclass
class _Mark:
    """Arrivals that count as one. began, at: seconds, of the first and the last of them. count: their bytes; done: of the whole stream
    until then; moved: those and the lost ones, there and back. quiet: the longest time without a byte before one of them."""

    began: float
    at: float
    count: int
    done: int
    moved: int
    quiet: float


class Pace:
    """total: bytes that are to come; done: those that did. known: the share of them after which the time left is told. Times are
    seconds of one clock."""

    def __init__(self, total: int, known: float = KNOWN_SHARE) -> None:
        self.total, self.done = total, 0
        self._moved = 0
        self._known = known
        self._marks: deque[_Mark] = deque()

    def advance(self, count: int, now: float) -> None:
        """Bytes have come; less than none if some are lost again."""
        if not count:
            return
        self.done += count
        self._moved += abs(count)
        last = self._marks[-1] if self._marks else None
        quiet = now - last.at if last else 0.0
        if last and (now - last.began < MARK_SECONDS or abs(last.count) < MARK_SHARE * self.total):
            last.at, last.count, last.done, last.moved = now, last.count + count, self.done, self._moved
            last.quiet = max(last.quiet, quiet)
            return
        self._marks.append(_Mark(now, now, count, self.done, self._moved, quiet))
        while len(self._marks) > 2 and self._tells_enough(self._marks[1], now):
            self._marks.popleft()

    def rate(self, now: float) -> float | None:
        """Bytes a second lately, 0 before the first of them; None while that cannot be told."""
        if not self._marks:
            return 0.0
        first, last = self._marks[0], self._marks[-1]
        if now - first.at < LEAST_SECONDS or last is first:
            return None
        return max(0, last.done - first.done) / (last.at - first.at + self._overdue(now))

    def seconds_left(self, now: float) -> float | None:
        """Until the last byte has come; None while too little did to tell."""
        if self.done >= self.total:
            return 0.0
        rate = self.rate(now)
        if not rate or self._marks[-1].done - self._marks[0].done < self._known * self.total:
            return None
        under_way = now - self._marks[-1].at - self._overdue(now)  # the next leap, of which a part is there
        return max(0.0, (self.total - self.done) / rate - under_way)

    def _tells_enough(self, mark: _Mark, now: float) -> bool:
        # What is lost counts too: of bytes that come again and again, the last ones tell the rate as well.
        return now - mark.at >= RECENT_SECONDS and self._moved - mark.moved >= RECENT_SHARE * self.total

    def _overdue(self, now: float) -> float:
        """Seconds for which nothing has come, beyond the longest such time between two arrivals."""
        longest = max((mark.quiet for mark in list(self._marks)[1:]), default=0.0)
        return max(0.0, now - self._marks[-1].at - longest)
