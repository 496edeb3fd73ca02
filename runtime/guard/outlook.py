"""RESERVE=learned: which waiting requests fit by forecast, next to what the running ones are likely still to take.

A ticket's `tokens` stay what they are with RESERVE=all, the most that the engine may use for it. Here is only the second opinion: the prompt and
what has been written, the length that such answers usually reach (lengths.py), and the peak of all of them together (forecast.py). It is asked
only while the referee allows it; what has no growth (several sequences, a body that can be read in two ways) always counts in full.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

from .forecast import Course, Forecast
from .growth import Growth
from .lengths import LengthTable
from .referee import Referee
from .tickets import Ticket

PREFILL_STEP = (
    512  # prompt tokens a step, at least: a request whose first token cannot be seen begins to write that much later
)
TOLERANCE = 0.02  # of the pool, that the engine's cache may hold above the forecast's present before it is corrected
FRESH_S = 0.02  # how old the gauges may be when a decision is made
SOONEST_LOOK = 16  # tokens that an answer grows before its likely length is looked up again


class Outlook:
    """Follows the admitted tickets. `gauges` reads the engine's (referee.HEARD); it may raise, and then there are none."""

    def __init__(self, gauges: Callable[[], Mapping[str, float]], clock: Callable[[], float] = time.monotonic) -> None:
        self.gauges = gauges
        self.clock = clock
        self.referee = Referee(clock)
        self.table = LengthTable()
        self._heard = -math.inf
        self.running: dict[Ticket, None] = {}
        self.block_size = 1
        self.pool = 0  # tokens of which the engine's usage is a share
        self._forecast: tuple[float, float, int, Forecast] | None = None

    @property
    def open(self) -> bool:
        """Whether forecasts count now."""
        now = self.clock()
        if now - self._heard >= FRESH_S:
            self._heard = now
            try:
                heard = self.gauges()
            except Exception:  # prometheus_client, on a file that another process writes or removes just now
                heard = {}
            self.referee.see(heard, len(self.running))
        return not self.referee.against

    def resize(self, pool: int, block_size: int) -> None:
        if (pool, block_size) != (self.pool, self.block_size):
            self.pool, self.block_size, self._forecast = pool, block_size, None

    def begin(self, ticket: Ticket) -> None:
        self.running[ticket] = None
        self._forecast = None
        if (growth := ticket.growth) is not None:
            growth.likely = 0  # looked up when it is asked for, however long ago it began to wait
            growth.began = self.referee.steps + math.ceil(growth.prompt / PREFILL_STEP)

    def first_token(self, ticket: Ticket) -> None:
        if (
            ticket.growth is not None and ticket.growth.tally.events
        ):  # a stream's; plain answers come when they are over
            ticket.growth.began = self.referee.steps - 1

    def end(self, ticket: Ticket) -> None:
        self.running.pop(ticket, None)
        self._forecast = None

    def learn(self, growth: Growth, finished: bool) -> None:
        """What an answer teaches that is over. `finished`: the engine ended it, without an error."""
        if finished:
            self.referee.answered()
        tokens = growth.tally.tokens
        if finished and not growth.tally.usage:  # a stream that came in lumps has fewer events than tokens
            tokens = round(growth.written(self.referee.steps))
        if tokens > 0:
            cut = growth.tally.cut or tokens >= growth.most
            self.table.learn(growth.name, min(tokens, growth.most), ended=finished and not cut)

    def course(self, ticket: Ticket, hits: int) -> Course:
        """What the ticket's own blocks hold and will hold, beside `hits` that others hold; half a block more than its tokens, the mean of rounding up."""
        growth = ticket.growth
        if growth is None:
            return Course(ticket.tokens - self.block_size * hits, None)
        running = ticket in self.running
        written = growth.written(self.referee.steps) if running else 0.0
        due = written >= growth.look or not growth.likely
        if due or not running:
            self._look_up(growth, written, due)
        held = growth.prompt - self.block_size * hits + (self.block_size - 1) / 2
        return Course(held + written, max(1.0, growth.likely - written))

    def _look_up(self, growth: Growth, written: float, due: bool) -> None:
        """What the answer will likely be in all, if that is due or more is known than when it was last looked up."""
        known, share = self.table.of(growth.name), self.referee.share
        lore = (known.learned if known else 0, share)
        if not due and lore == growth.lore:
            return
        growth.lore = lore
        growth.likely = growth.most if known is None else known.likely(int(written), growth.most, share)
        next_look = written + max(SOONEST_LOOK, (growth.likely - written) / 4)
        growth.look = max(written + 1, min(growth.likely, next_look))  # at once when it passes what was expected

    def forecast(self, shared: int) -> Forecast:
        """Of all that runs; `shared`: tokens of blocks that several hold."""
        steps, usage = self.referee.steps, self.referee.usage
        if self._forecast is not None and self._forecast[:3] == (steps, usage, shared):
            return self._forecast[3]
        courses = [self.course(ticket, len(ticket.shared)) for ticket in self.running]
        present = shared + sum(course.held for course in courses)
        surplus = usage * self.pool - present - TOLERANCE * self.pool
        found = Forecast(courses, shared + max(0.0, surplus))
        self._forecast = (steps, usage, shared, found)
        return found

    def admits(self, ticket: Ticket, capacity: int, shared: int, hits: int) -> bool:
        """Whether the ticket can join all that runs without a peak above the capacity, less the referee's margin."""
        return self.open and self._within(self.forecast(shared), self.course(ticket, hits), capacity)

    def admits_beside(self, ticket: Ticket, others: Iterable[Ticket], capacity: int, shared: int) -> bool:
        """The same next to the `others` only, as if all else had ended."""
        if not self.open:
            return False
        beside = Forecast([self.course(other, len(other.shared)) for other in others], shared)
        return self._within(beside, self.course(ticket, 0), capacity)

    def _within(self, forecast: Forecast, course: Course, capacity: int) -> bool:
        return forecast.with_course(course) <= capacity * (1 - self.referee.margin)
