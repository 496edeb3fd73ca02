"""Turns at a bounded resource, shared fairly between keys: the next turn is decided by the bytes already processed for each key.

Start-time fair queuing as in ledger.py, without reservations: work has a size, runs when it has a place, and ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .inbox import ClientGone, Inbox
from .ledger import IDLE_LANES

T = TypeVar("T")

# Of the time until the deadline. With more, those whose turn comes under load are those that have waited longest, and no work would be done in time.
WAITING = 0.75


@dataclass
class Line:
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)
    start: int = 0
    inside: int = 0


class Turns:
    """`places` at once, and of these at most half for one key while there is more than one place, so that others find one free."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.share = max(1, places // 2)
        self.inside = 0
        self.virtual = 0
        self.lines: dict[str, Line] = {}
        self._running: set[asyncio.Task[Any]] = set()

    async def run(
        self,
        key: str,
        size: int,
        inbox: Inbox,
        deadline: float,
        work: Callable[[], Coroutine[Any, Any, T]],
    ) -> T:
        """The result of the work, once its turn has come.

        Raises ClientGone when the client hangs up first, TimeoutError when the work is not done at `deadline` (time.monotonic), its turn
        included. Work that has begun is not interrupted: it keeps its place until it is done, whoever has left, so it has to end by itself.
        """
        if not self.enter(key, size):
            await self._wait(self.queue(key, size), key, inbox, WAITING * seconds_to(deadline))
        running = asyncio.ensure_future(work())
        self._running.add(running)
        running.add_done_callback(lambda _: self.leave(key))
        running.add_done_callback(self._running.discard)
        running.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # seen, also if no one waits any more
        either: set[asyncio.Future[Any]] = {running, inbox.hang_up()}
        await asyncio.wait(either, timeout=seconds_to(deadline), return_when=asyncio.FIRST_COMPLETED)
        if inbox.gone:
            raise ClientGone
        if not running.done():
            raise TimeoutError
        return running.result()

    async def _wait(self, turn: asyncio.Future[None], key: str, inbox: Inbox, most_s: float) -> None:
        try:
            either: set[asyncio.Future[Any]] = {turn, inbox.hang_up()}
            await asyncio.wait(either, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)
            if inbox.gone:
                raise ClientGone
            if not turn.done():
                raise TimeoutError
        except BaseException:
            if turn.done():  # it came in the same instant
                self.leave(key)
            else:
                turn.cancel()
            raise

    def enter(self, key: str, size: int) -> bool:
        """Whether a place was free and is taken now: whoever got it leaves it once. Nothing is left behind where it was not."""
        line = self.lines.get(key)
        if self.inside >= self.places or (line and (line.waiting or line.inside >= self.share)):
            return False
        self._admit(self.lines.setdefault(key, Line(start=self.virtual)), size)
        return True

    def queue(self, key: str, size: int) -> asyncio.Future[None]:
        """What to wait for where `enter` found no place: done once a place is taken for the asker, who cancels it to wait no more."""
        line = self.lines.setdefault(key, Line(start=self.virtual))
        if not line.waiting:
            line.start = max(line.start, self.virtual)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.waiting.append((size, turn))
        return turn

    def leave(self, key: str) -> None:
        self.lines[key].inside -= 1
        self.inside -= 1
        self._next()

    def _next(self) -> None:
        while self.inside < self.places:
            for line in self.lines.values():
                while line.waiting and line.waiting[0][1].done():  # its asker has gone
                    line.waiting.popleft()
            ready = [line for line in self.lines.values() if line.waiting and line.inside < self.share]
            if not ready:
                break
            line = min(ready, key=lambda line: line.start)
            size, turn = line.waiting.popleft()
            self._admit(line, size)
            turn.set_result(None)
        for key in [key for key, line in self.lines.items() if not line.inside and not line.waiting]:
            if self.lines[key].start <= self.virtual or not self.inside:
                del self.lines[key]
        if len(self.lines) > IDLE_LANES:
            idle = [key for key, line in self.lines.items() if not line.inside and not line.waiting]
            for key in sorted(idle, key=lambda key: self.lines[key].start)[: -IDLE_LANES // 2]:
                del self.lines[key]
        if not self.lines:
            self.virtual = 0

    def _admit(self, line: Line, size: int) -> None:
        self.virtual = max(self.virtual, line.start)
        line.start = self.virtual + size
        line.inside += 1
        self.inside += 1


def seconds_to(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
