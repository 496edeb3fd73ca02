"""How many downloads run at once: as many as make the network faster, and no more.

Where one download fills the network, a second one only takes half of it: the layer that is converted next waits for shards of later
layers. Where a server or a proxy limits each connection, several are faster. Which of the two it is can only be measured: one more is
let in, and stays if all together bring more than before. Networks change, and a rate is sometimes measured wrong: now and then one more
is tried again, and one less.

Nobody in the gate waits for somebody outside, so that each place becomes free; and who has none is not kept out by a download that stands
still, of which a server may want it for minutes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .shard_cache import Abandoned

# A rate is measured over so many seconds and pieces at least: bytes are told in pieces of up to 10 MB. The first ones are short, as a server may
# limit each connection, and all wait for that to be found; later ones are not misled by noise so easily.
FIRST_WINDOW_SECONDS = 1.0
WINDOW_SECONDS = 3.0
WINDOW_PIECES = 50
SETTLE_SECONDS = 0.25  # after a download's first bytes: its connection is not at full speed yet
SHORT_BYTES = 64 * 10**6  # a download of fewer is mostly connecting, and tells no rate: it does not count
GAIN = 1.04  # times the rate, which one more must bring to stay
FALLEN = 0.7  # times the rate, below which the network is not what it was, if it stays there for so many windows:
FALLEN_WINDOWS = 3  # one more that is tried in a short dip of the network would seem to end it
MORE_SECONDS = 60.0  # after which one more is tried again
LESS_SECONDS = 300.0  # and one less, which costs its share of the rate meanwhile where each connection is limited
# Without a byte, after which a download does not count (a connection that hangs, a server that has it wait, a file that comes from the Hub's cache
# here). Xet tells of some ten MB at a time.
STALLED_SECONDS = 10.0
# A download that needs less than this does not count: the next one connects meanwhile, and it may be comparing what came.
ENDING_SECONDS = 0.5
POLL_SECONDS = 0.2


@dataclass(eq=False)  # two downloads of one size are two
class _Running:
    size: int
    left: int  # bytes that are still to come
    moved: float  # when bytes last came; at first, when it was let in
    begun: bool = False  # whether any came


class DownloadGate:
    """Lets downloads in, on any threads, at most `most` at once. clock: seconds."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self._clock = most, clock
        self.allowed = 1
        self._trial = 1  # 1: the last one that was let in has still to show that it brings something; -1: the one that was left out did not
        self._before = 0.0  # the rate before the trial, or that of `allowed` where nothing is tried
        self._tried = {1: 0.0, -1: 0.0}  # when that was last known to be of no use
        self._first = True  # until the first trials have ended
        self._low = 0  # how many windows in succession were below FALLEN
        self._rate = 0.0
        self._running: list[_Running] = []
        self._waiting: list[tuple[float, int]] = []
        self._tickets = 0
        self._bytes, self._pieces, self._seconds = 0, 0, 0.0  # of the window, while as many as are allowed were at work
        self._steady_from: float | None = None  # None while they are not
        self._last: float | None = None  # the last arrival since then
        self._changed = threading.Condition()

    @contextmanager
    def download(self, size: int, order: float, left: Callable[[], bool]) -> Iterator[Callable[[int], None]]:
        """Wait for a place, those of smaller `order` first, and keep it while the block runs. The block tells the bytes that have come.

        size: of the download, in bytes. Raises Abandoned once `left()` before it begins.
        """
        running = self._enter(size, order, left)
        try:
            yield lambda count: self._came(running, count)
        finally:
            with self._changed:
                self._running.remove(running)
                self._steady_from = None
                self._changed.notify_all()

    def _enter(self, size: int, order: float, left: Callable[[], bool]) -> _Running:
        with self._changed:
            ticket = (order, self._tickets)
            self._tickets += 1
            self._waiting.append(ticket)
            try:
                while True:
                    if left():
                        raise Abandoned("a download is not wanted any more.")
                    if not self._full() and ticket == min(self._waiting):
                        break
                    self._changed.wait(POLL_SECONDS)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            running = _Running(size, size, self._clock())
            self._running.append(running)
            self._steady_from = None
            return running

    def _full(self) -> bool:
        return len(self._running) >= self.most or self._busy() >= self.allowed

    def _busy(self) -> int:
        """How many take a place: not who is short or about to end, nor who stands still."""
        ending = self._rate / self.allowed * ENDING_SECONDS
        return sum(running.left > ending and running.size > SHORT_BYTES for running in self._moving())

    def _moving(self) -> list[_Running]:
        now = self._clock()
        return [running for running in self._running if now - running.moved < STALLED_SECONDS]

    def _came(self, running: _Running, count: int) -> None:
        with self._changed:
            now, at_work = self._clock(), [other for other in self._moving() if other.left > 0]
            steady = len(at_work) == self.allowed and all(other.begun for other in at_work)
            running.left -= count
            if count <= 0:
                if count:  # lost again: it connects anew
                    running.begun = False
                return
            running.moved, running.begun = now, True
            if self._busy() < self.allowed:
                self._changed.notify_all()
            if steady:
                self._measure(count, now)
            else:
                self._steady_from = None

    def _measure(self, count: int, now: float) -> None:
        """The bytes after one arrival until another, and the time between them, while `allowed` downloads are at full speed."""
        if self._steady_from is None:
            self._steady_from, self._last = now + SETTLE_SECONDS, None
        if now < self._steady_from:
            return
        if self._last is not None:
            self._bytes += count
            self._pieces += 1
            self._seconds += now - self._last
        self._last = now
        enough = FIRST_WINDOW_SECONDS if self._first else WINDOW_SECONDS
        if self._seconds >= enough and self._pieces >= WINDOW_PIECES:
            self._judge(self._bytes / self._seconds, now)
            self._bytes, self._pieces, self._seconds, self._steady_from = 0, 0, 0.0, None

    def _judge(self, rate: float, now: float) -> None:
        """With `allowed` downloads so many bytes came per second."""
        self._rate = rate
        if self._trial:
            self._end_trial(rate, now)
        else:
            self._low = self._low + 1 if rate < FALLEN * self._before else 0
            fallen = self._low >= FALLEN_WINDOWS
            self._before = rate if fallen else max(self._before, rate)
            if self.allowed < self.most and (fallen or now - self._tried[1] >= MORE_SECONDS):
                self._trial = 1
            elif self.allowed > 1 and now - self._tried[-1] >= LESS_SECONDS:
                self._trial, self._before = -1, rate
        if 1 <= self.allowed + self._trial <= self.most:
            self.allowed += self._trial
            self._changed.notify_all()
        else:
            self._trial = 0
        self._first = self._first and self._trial != 0

    def _end_trial(self, rate: float, now: float) -> None:
        """Keep what is tried, so that the next one is tried, or go back."""
        kept = rate >= GAIN * self._before if self._trial > 0 else GAIN * rate >= self._before
        self._tried[self._trial] = now
        if kept:
            self._before = rate
            self._tried[-self._trial] = now
        else:
            self.allowed -= self._trial
            self._trial = 0
