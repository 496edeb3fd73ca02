"""Waiting for KV cache tokens: the ledger with tasks, a deadline, and an estimate of when tokens will be free."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from .inbox import ClientGone, Message
from .ledger import Ledger
from .outlook import Outlook
from .replies import Refusal, busy, unavailable
from .tickets import State, Ticket

WINDOW_S = 60.0
LONGEST_RETRY_S = 3600
PATIENCE = 0.25  # of the longest wait: how long a request of the whole pool may hold its room back (ledger.py)


class ReleaseRate:
    """Tokens given back per second, over the last minute of the present busy spell."""

    def __init__(self) -> None:
        self.released: deque[tuple[float, int]] = deque()
        self.total = 0
        self.busy_since: float | None = None

    def start(self, now: float) -> None:
        if self.busy_since is None:
            self.busy_since = now

    def add(self, tokens: int, now: float, idle: bool) -> None:
        self.released.append((now, tokens))
        self.total += tokens
        self._forget(now)
        if idle:
            self.released.clear()
            self.total = 0
            self.busy_since = None

    def seconds_for(self, tokens: int, now: float) -> float | None:
        """Seconds until that many tokens are released at the present rate; None while nothing has been observed."""
        self._forget(now)
        if not self.total or self.busy_since is None:
            return None
        observed = min(WINDOW_S, max(now - self.busy_since, 1e-3))
        return tokens * observed / self.total

    def _forget(self, now: float) -> None:
        while self.released and self.released[0][0] < now - WINDOW_S:
            self.total -= self.released.popleft()[1]


class Admission:
    """Admits requests by their tokens. All methods run in the server's event loop."""

    def __init__(
        self, capacity: int, queue_limit: int, timeout_s: float, first_guess_s: float, outlook: Outlook | None = None
    ) -> None:
        self.ledger = Ledger(
            capacity,
            queue_limit,
            patience=timeout_s * PATIENCE,
            clock=lambda: self.clock(),  # tests turn the clock
            outlook=outlook,
        )
        self.timeout_s = timeout_s
        self.first_guess_s = first_guess_s
        self.rate = ReleaseRate()
        self.clock: Callable[[], float] = time.monotonic
        self.draining = False
        self._waiters: dict[Ticket, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None  # for the end of a block
        self._timer_at: float | None = None

    def retry_after(self, tokens: int) -> int:
        """Whole seconds after which `tokens` should fit: what must be released first, at the observed rate."""
        free = max(self.ledger.free, 0) if self.ledger.forecasting else self.ledger.free
        ahead = max(0, self.ledger.queued + tokens - free)
        seconds = self.rate.seconds_for(ahead, self.clock())
        return max(1, min(LONGEST_RETRY_S, math.ceil(self.first_guess_s if seconds is None else seconds)))

    def precheck(self, key: str, tokens: int, guess: int) -> None:
        """Raises the refusal that a request of at least that many tokens would meet, before its prompt is counted.

        `guess` is what it may turn out to need, for the time to come back.
        """
        if self.draining:
            raise going_down(self.timeout_s)
        if self.ledger.would_drop(key, tokens):
            raise self.full(guess)

    async def admit(self, ticket: Ticket, hang_up: Callable[[], asyncio.Task[Message]], waited_s: float = 0.0) -> float:
        """Returns the seconds waited once the ticket holds its tokens; raises Refusal or ClientGone, and then it holds none.

        `waited_s`: how much of the longest wait has gone by already.
        """
        began = self.clock()
        if self.draining:
            raise going_down(self.timeout_s)
        evicted = self.ledger.offer(ticket)
        for other in evicted:
            self._waiters[other].set_exception(self.full(other.tokens))
        self._pump()
        if ticket.state is State.QUEUED:
            await self._wait(ticket, hang_up(), max(0.0, self.timeout_s - waited_s))
        if ticket.state is not State.ADMITTED:
            raise self.full(ticket.tokens)
        self.rate.start(self.clock())
        return self.clock() - began

    async def _wait(self, ticket: Ticket, hang_up: asyncio.Task[Message], left_s: float) -> None:
        waiter = self._waiters[ticket] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait({waiter, hang_up}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if hang_up.done():
                raise ClientGone
            if not waiter.done():
                raise busy(
                    f"The KV cache of this server had no {ticket.tokens} tokens free within {self.timeout_s:g} seconds. "
                    "Please retry later.",
                    "queue_timeout",
                    self.retry_after(ticket.tokens),
                )
            waiter.result()
        except BaseException:
            self.release(ticket)
            raise
        finally:
            del self._waiters[ticket]
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # seen, also when the client hung up in the same instant

    def release(self, ticket: Ticket) -> None:
        """Gives back whatever the ticket holds or waits for; harmless when repeated."""
        released = self.ledger.release(ticket)
        self._pump()
        if released:
            # After the pump: between two requests that each fill the pool the server is not idle, and the rate continues.
            self.rate.add(ticket.tokens, self.clock(), idle=not self.ledger.admitted)

    def resize(self, capacity: int, queue_limit: int, block_size: int) -> None:
        ledger = self.ledger
        if (capacity, queue_limit, block_size) == (ledger.capacity, ledger.queue_limit, ledger.block_size):
            return
        for ticket in ledger.resize(capacity, queue_limit, block_size):
            self._waiters[ticket].set_exception(self.full(ticket.tokens))
        self._pump()

    def prefilled(self, ticket: Ticket) -> None:
        """The ticket's prompt is computed: whoever waits with the same beginning may need no more than there is."""
        self.ledger.prefilled(ticket)
        self._pump()

    def look_again(self) -> None:
        """Whether requests that wait fit by now."""
        self._pump()

    def drain(self) -> None:
        """No request is admitted any more; those waiting are refused."""
        self.draining = True
        for ticket in self.ledger.drop_waiting():
            self._waiters[ticket].set_exception(going_down(self.timeout_s))

    def full(self, tokens: int) -> Refusal:
        return busy(
            f"The KV cache of this server is in use ({self.ledger.promised} of {self.ledger.capacity} tokens reserved, "
            f"{self.ledger.queued} waiting), and this request needs about {tokens}. Please retry later.",
            "no_room",
            self.retry_after(tokens),
        )

    def _pump(self) -> None:
        if not self.ledger.queued:
            return
        for ticket in self.ledger.advance():
            waiter = self._waiters.get(ticket)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        self._set_timer()

    def _set_timer(self) -> None:
        ends = self.ledger.block_ends()
        if ends == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, ends
        if ends is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, ends - self.clock()), self._block_over)

    def _block_over(self) -> None:
        self._timer = self._timer_at = None
        self._pump()


def going_down(seconds: float) -> Refusal:
    return unavailable("The server is shutting down.", "draining", max(1, math.ceil(seconds)))
