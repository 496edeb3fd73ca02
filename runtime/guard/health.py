"""The guard's and the engine's condition: watched while the server runs, told to /health, /metrics and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

from .admission import Admission
from .answer import Answer, Send
from .metrics import Metrics, read_gauges
from .outlook import Outlook
from .pool import Pool
from .referee import HEARD
from .replies import send_json
from .settings import GuardSettings
from .watchdog import GAUGES, Watchdog

logger = logging.getLogger("vllm.m3quant.guard")  # under vLLM's logger, so that its handlers print it


class Health:
    """inside: answers to requests that hold a reservation."""

    def __init__(
        self,
        settings: GuardSettings,
        admission: Admission,
        outlook: Outlook | None,
        inside: set[Answer],
        metrics: Metrics,
    ) -> None:
        self.settings = settings
        self.admission = admission
        self.outlook = outlook
        self.inside = inside
        self.metrics = metrics
        self.watchdog = Watchdog(settings.watchdog_s)
        self.pool: Pool | None = None
        self._reported = False
        self.metrics.healthy.set(1)

    def warn_of_missing_gauges(self) -> None:
        if self.settings.watchdog_s and GAUGES[1] not in read_gauges(GAUGES):
            logger.warning(
                "m3quant guard: no engine gauges to watch (--disable-log-stats?): the watchdog sees nothing."
            )
        if self.outlook is not None and len(read_gauges(HEARD)) < len(HEARD):
            logger.warning(
                "m3quant guard: M3QUANT_GUARD_RESERVE=learned needs the engine's gauges (--disable-log-stats?): "
                "every request is reserved in full until they can be read."
            )

    async def watch(self) -> None:
        """Empties the queue once the server drains, and looks at the engine's gauges; a forecast changes without any request that ends."""
        seen, failed = 0.0, False
        while True:
            await asyncio.sleep(min(0.2, self.settings.watchdog_interval_s))
            if self.admission.draining:
                self.admission.drain()
            elif self.outlook is not None:
                self.admission.look_again()
            if time.monotonic() - seen >= self.settings.watchdog_interval_s:
                seen = time.monotonic()
                try:
                    self.look(read_gauges(GAUGES))
                    failed = False
                except Exception as error:
                    # prometheus_client, on a file that another process writes or removes just now
                    if not failed:
                        logger.warning("m3quant guard: the engine's gauges cannot be read now: %s", error)
                    failed = True

    def look(self, gauges: dict[str, float]) -> None:
        unanswered = len(self._unanswered())
        self.watchdog.see(gauges, unanswered)
        self.show()
        hanging = self.watchdog.hanging
        self.metrics.healthy.set(0 if hanging else 1)
        if hanging and not self._reported:
            logger.error(
                "m3quant guard: the engine hangs: %d requests waiting, none running, KV cache idle for %.0f s; /health is 503 now. "
                "State: %s",
                max(unanswered, gauges.get(GAUGES[0], 0)),
                self.watchdog.stalled_s,
                json.dumps(self.state(gauges)),
            )
        elif self._reported and not hanging:
            logger.warning("m3quant guard: the engine moves again; /health passes through.")
        self._reported = hanging

    def _unanswered(self) -> list[Answer]:
        """The requests inside that wait for the engine, not for their client to read."""
        return [answer for answer in self.inside if not answer.sending]

    @property
    def failing(self) -> bool:
        return self.admission.draining or self.watchdog.hanging

    async def report(self, send: Send) -> None:
        """The answer of /health while it fails."""
        status = "draining" if self.admission.draining else "hanging"
        await send_json(send, 503, json.dumps({"status": status, **self.state()}).encode())

    def state(self, gauges: dict[str, float] | None = None) -> dict[str, Any]:
        """The guard's and the engine's figures; no key, no prompt."""
        ledger, pool, now = self.admission.ledger, self.pool, time.monotonic()
        return {
            "engine": read_gauges(GAUGES) if gauges is None else gauges,
            "pool": None if pool is None else pool.__dict__,
            "capacity_tokens": ledger.capacity,
            "reserved_tokens": ledger.promised,
            "maximum_tokens": ledger.reserved,
            "forecasting": ledger.forecasting,
            "requests_in_flight": ledger.admitted,
            "queued_tokens": ledger.queued,
            "requests_waiting": ledger.waiting,
            "keys_waiting": sum(1 for lane in ledger.lanes.values() if lane.queue),
            "requests_unanswered": len(self._unanswered()),
            "oldest_unanswered_s": round(max((now - answer.began for answer in self._unanswered()), default=0.0), 1),
            "draining": self.admission.draining,
            "stalled_s": round(self.watchdog.stalled_s, 1),
        }

    def show(self) -> None:
        """Brings the Prometheus gauges up to date."""
        ledger = self.admission.ledger
        self.metrics.pool.set(ledger.capacity)
        self.metrics.reserved.set(ledger.promised)
        self.metrics.maximum.set(ledger.reserved)
        self.metrics.forecasting.set(ledger.forecasting)
        self.metrics.queued.set(ledger.queued)
        self.metrics.admitted.set(ledger.admitted)
        self.metrics.waiting.set(ledger.waiting)
