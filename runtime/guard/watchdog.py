"""Detects a hang that vLLM does not report: requests waiting, none running, the KV cache empty, for too long.

vLLM's scheduler waits for ever, without a log line, for a request larger than its pool (vllm#39734, #35541), and its /health stays 200.
An engine that stops stepping altogether also stops updating its gauges: they stay as they were, so requests that the guard let in and that
get no answer count as waiting too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

WAITING, RUNNING, USAGE = "vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"
GAUGES = (WAITING, RUNNING, USAGE)
IDLE_USAGE = 0.01  # of the pool; a cached prefix is not use, so an engine that runs nothing shows 0


class Watchdog:
    """Fed with the engine's gauges; `stalled_s` is how long they have shown a hang, 0 while they do not."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self.clock = clock
        self.since: float | None = None

    def see(self, gauges: Mapping[str, float], unanswered: int = 0) -> None:
        """`unanswered`: requests inside the application that are not just waiting for their client to read.

        Without the engine's gauges (vLLM's --disable-log-stats) nothing is concluded.
        """
        waiting = gauges.get(WAITING, 0) > 0 or unanswered > 0
        stuck = waiting and gauges.get(RUNNING) == 0 and gauges.get(USAGE, 1) < IDLE_USAGE
        if not stuck:
            self.since = None
        elif self.since is None:
            self.since = self.clock()

    @property
    def stalled_s(self) -> float:
        return 0.0 if self.since is None else self.clock() - self.since

    @property
    def hanging(self) -> bool:
        return self.limit_s > 0 and self.since is not None and self.stalled_s >= self.limit_s
