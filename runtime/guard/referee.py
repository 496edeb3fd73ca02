"""Whether the engine's own gauges allow requests to be admitted on a forecast, and how many tokens a running request has written since.

The engine is right about its cache and the forecast is a guess, so the guess counts only while the engine can be heard and has room: with gauges
that are missing, stale or no such number, with a cache that is nearly full, or after a preemption, every request is reserved in full again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from .watchdog import RUNNING, USAGE, WAITING

PREEMPTIONS, WRITTEN = "vllm:num_preemptions_total", "vllm:generation_tokens_total"
HEARD = (WAITING, RUNNING, USAGE, PREEMPTIONS, WRITTEN)

EDGE = 0.98  # share of the cache in use from which on forecasts do not count,
BACK = 0.90  # until it is below this
EXACT = 2.0**53  # counts above are no whole numbers any more
MOST = {USAGE: 1.0}
STALE_S = 5.0  # without any change of the gauges while requests are inside
MARGIN = 0.02  # share of the pool that forecasts always leave free,
LESSON = 0.02  # what each preemption adds to it,
MOST_LESSONS = 0.3  # at most, and
FORGET_S = 60.0  # the time in which it falls to 1/e
# The quantile of an answer's length that is expected: a preemption raises it, each answer without one lowers it, so that it comes to rest where
# `AIM` of the answers are preempted; between the bounds, from the start value on.
LEAST_SHARE, FIRST_SHARE, MOST_SHARE = 0.1, 0.7, 0.95
RAISE, AIM = 0.2, 0.005


class Referee:
    """Fed with the gauges of HEARD. `against`: why forecasts do not count now; empty while they do. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.against = "gauges"
        self.usage = 0.0  # share of the cache
        self.steps = 0.0  # tokens that a request has written which ran all the time
        self._last: dict[str, float] = {}
        self._changed = clock()
        self.share = FIRST_SHARE
        self._lessons = 0.0
        self._learned = clock()

    def see(self, gauges: Mapping[str, float], inside: int) -> None:
        """`inside`: requests that hold a reservation; without any, gauges that stand still are no sign."""
        now = self.clock()
        heard = {name: gauges[name] for name in HEARD if 0 <= gauges.get(name, math.nan) <= MOST.get(name, EXACT)}
        if len(heard) < len(HEARD):
            self.against, self._last = "gauges", {}
            return
        before, self._last = self._last or heard, heard
        if heard != before or not inside:
            self._changed = now
        self.usage = heard[USAGE]
        self._step(before, heard)
        preempted = max(0.0, heard[PREEMPTIONS] - before[PREEMPTIONS])
        if preempted:
            self.share = min(MOST_SHARE, self.share + RAISE * preempted)
            self._lessons, self._learned = min(MOST_LESSONS, self._remembered() + LESSON * preempted), now
        if now - self._changed > STALE_S:
            self.against = "stale"
        elif preempted:
            self.against = "preempted"
        elif self.usage >= EDGE and self.against != "preempted":
            self.against = "full"
        elif self.usage < BACK or self.against in ("gauges", "stale"):
            self.against = ""

    def answered(self) -> None:
        """An answer has ended."""
        self.share = max(LEAST_SHARE, self.share - RAISE * AIM)

    def _step(self, before: Mapping[str, float], now: Mapping[str, float]) -> None:
        """Every running request writes its share of what the engine counted: one token a step, more with a draft."""
        running = max(1.0, (before[RUNNING] + now[RUNNING]) / 2)
        self.steps += max(0.0, now[WRITTEN] - before[WRITTEN]) / running

    @property
    def margin(self) -> float:
        """Share of the pool that a forecast has to leave free."""
        return MARGIN + self._remembered()

    def _remembered(self) -> float:
        return self._lessons * math.exp((self._learned - self.clock()) / FORGET_S)
