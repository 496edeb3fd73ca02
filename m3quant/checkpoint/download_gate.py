"""How many downloads run at once: as many as make the network faster, and no more.

Where one download fills the network, a second one only takes half of it: the layer that is converted next waits for shards of later
layers. Where a server or a proxy limits each connection, several are faster. Which of the two it is can only be measured: one more is
let in, and stays if all together bring more than before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .shard_cache import Abandoned

# A rate is measured over so many seconds and pieces at least: bytes are told in pieces of up to 10 MB.
WINDOW_SECONDS = 1.0
WINDOW_PIECES = 50
SETTLE_SECONDS = 0.25  # of a new download, before that: its connection is not at full speed yet
GAIN = 1.04  # times the rate, which one more must bring to stay
FALLEN = 0.7  # times the rate, below which the network is not what it was
AGAIN_SECONDS = 60.0  # after which one more is tried again
# A download that needs less than this does not count: the next one connects meanwhile, and it may be comparing what came.
ENDING_SECONDS = 0.5
POLL_SECONDS = 0.2


@dataclass
class _Running:
    left: int  # bytes that are still to come


class DownloadGate:
    """Lets downloads in, on any threads, at most `most` at once. clock: seconds."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self._clock = most, clock
        self.allowed = 1
        self._probing = True  # the last one that was let in has still to show that it brings something
        self._before = 0.0  # the rate with one less, or that of `allowed` where nothing is tried
        self._settled = 0.0  # when the last trial ended
        self._rate = 0.0
        self._running: list[_Running] = []
        self._waiting: list[tuple[float, int]] = []
        self._tickets = 0
        self._measuring, self._since, self._bytes, self._pieces = False, 0.0, 0, 0  # the window
        self._changed = threading.Condition()

    @contextmanager
    def download(self, size: int, order: float, left: Callable[[], bool]) -> Iterator[Callable[[int], None]]:
        """Wait for a place, those of smaller `order` first, and keep it while the block runs. The block tells the bytes that have come.

        size: of the download, in bytes. Raises Abandoned once `left()` while it waits.
        """
        running = self._enter(size, order, left)
        try:
            yield lambda count: self._came(running, count)
        finally:
            with self._changed:
                self._running.remove(running)
                self._changed.notify_all()

    def _enter(self, size: int, order: float, left: Callable[[], bool]) -> _Running:
        with self._changed:
            ticket = (order, self._tickets)
            self._tickets += 1
            self._waiting.append(ticket)
            try:
                while self._full() or ticket != min(self._waiting):
                    if left():
                        raise Abandoned("a download is not wanted any more.")
                    self._changed.wait(POLL_SECONDS)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            running = _Running(size)
            self._running.append(running)
            return running

    def _full(self) -> bool:
        return len(self._running) >= self.most or self._busy() >= self.allowed

    def _busy(self) -> int:
        return sum(running.left > self._rate * ENDING_SECONDS for running in self._running)

    def _measure_anew(self, now: float) -> None:
        self._measuring, self._since, self._bytes, self._pieces = True, now + SETTLE_SECONDS, 0, 0

    def _came(self, running: _Running, count: int) -> None:
        with self._changed:
            running.left -= count
            now = self._clock()
            busy = self._busy()
            if busy < self.allowed:
                self._changed.notify_all()
            # A rate is that of `allowed` downloads: not where one that was let in too many goes on, nor where nobody wants the next place.
            if busy > self.allowed or (busy < self.allowed and not self._waiting):
                self._measuring = False
            elif not self._measuring:
                self._measure_anew(now)
            elif now >= self._since:
                self._bytes, self._pieces = self._bytes + count, self._pieces + 1
                if now - self._since >= WINDOW_SECONDS and self._pieces >= WINDOW_PIECES:
                    self._judge(self._bytes / (now - self._since), now)
                    self._measure_anew(now)

    def _judge(self, rate: float, now: float) -> None:
        """With `allowed` downloads so many bytes came per second."""
        self._rate = rate
        if self._probing:
            better = self.allowed == 1 or rate >= GAIN * self._before
            if better:
                self._before = rate
            else:
                self.allowed -= 1
            self._probing, self._settled = better and self.allowed < self.most, now
        else:
            fallen = rate < FALLEN * self._before
            self._before = rate if fallen else max(self._before, rate)
            self._probing = self.allowed < self.most and (fallen or now - self._settled >= AGAIN_SECONDS)
        if self._probing:
            self.allowed += 1
            self._changed.notify_all()
