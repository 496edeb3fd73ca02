"""ASGI middleware that prevents vLLM's KV cache from being promised twice.

    vllm serve CKPT --middleware m3quant.runtime.guard.Guard

A generating request is admitted only when its prompt and its output tokens have room in the KV cache, all that it may write or what it will
likely write (RESERVE); what can never fit is refused with vLLM's words, what does not fit now waits, or is refused with a time to come back.
Bodies and streams pass through unchanged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from m3quant.errors import GuardError

from .admission import Admission
from .answer import Answer, Send
from .aside import Aside
from .bodies import Bodies
from .demand import ROUTES, local_path
from .door import Door, known_keys
from .generation import App, Call, Generation, Scope
from .health import Health
from .inbox import ClientGone, Inbox, Receive, check_length
from .metrics import metrics, read_gauges
from .outlook import Outlook
from .pool import Pool, PoolReader
from .referee import HEARD
from .replies import Refusal, send_refusal, unavailable
from .settings import GuardSettings, read_settings
from .signals import chain_signals

logger = logging.getLogger("vllm.m3quant.guard")  # under vLLM's logger, so that its handlers print it

QUEUE_OF_POOLS = 4  # default bound of the queue, in pools


class Guard:
    """The middleware. Without `settings` it reads the environment; what is wrong there stops the server when it starts."""

    def __init__(self, app: App, settings: GuardSettings | None = None) -> None:
        self.app = app
        self.problem: GuardError | None = None
        try:
            self.settings = settings or read_settings()
        except (
            GuardError
        ) as error:  # raised here it would only be a warning: servers take it for an app without lifespan
            self.problem, self.settings = error, GuardSettings()
        self.reader = PoolReader(self.settings)
        self.inside: set[Answer] = set()  # answers to requests that hold a reservation
        self.metrics = metrics()
        self.door: Door | None = None
        self.outlook = Outlook(lambda: read_gauges(HEARD)) if self.settings.reserve == "learned" else None
        self.admission = Admission(0, 0, self.settings.queue_timeout_s, self.settings.retry_after_s, self.outlook)
        self.aside = Aside()
        self.bodies = Bodies(self.settings, self.aside)
        shared = (self.settings, self.admission, self.outlook)
        self.generation = Generation(app, *shared, self.bodies, self.inside, self.metrics)
        self.counter = self.generation.counter
        self.health = Health(*shared, self.inside, self.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    # Start and end

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            pool, _ = self._prepare(scope)
        except GuardError as error:
            logger.error("m3quant guard: %s", error)
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"m3quant guard: {error}"})
            return
        logger.info(
            "m3quant guard: %d of %d KV cache tokens to reserve in blocks of %d, longest sequence %d tokens, queue of %d tokens.",
            pool.usable,
            pool.tokens,
            pool.block_size,
            pool.longest,
            self._queue_limit(pool),
        )
        self.health.warn_of_missing_gauges()
        self._chain_signals()
        watching = asyncio.create_task(self.health.watch())
        try:
            await self.app(scope, receive, send)
        finally:
            watching.cancel()
            self.aside.close()

    def _prepare(self, scope: Scope) -> tuple[Pool, Door]:
        if self.problem is not None:
            raise self.problem
        pool = self.reader.read(scope)
        if self.settings.prefix_hits == "count" and not pool.prefix_caching:
            raise GuardError(
                "M3QUANT_GUARD_PREFIX_HITS=count needs vLLM's prefix caching, and this server runs without."
            )
        if self.door is None:
            self.door = Door(known_keys(self.settings, scope), self.settings.open_paths)
        self.health.pool = pool
        if self.outlook is not None:
            self.outlook.resize(pool.tokens - pool.block_size, pool.block_size)
        self.admission.resize(pool.usable, self._queue_limit(pool), pool.block_size)
        return pool, self.door

    def _queue_limit(self, pool: Pool) -> int:
        given = self.settings.queue_tokens
        return QUEUE_OF_POOLS * pool.usable if given is None else given

    def _chain_signals(self) -> None:
        def going_down() -> None:
            self.admission.draining = True  # the queue is emptied in the event loop, by the watch

        chain_signals(going_down)

    def state(self) -> dict[str, Any]:
        """The guard's and the engine's figures; no key, no prompt."""
        return self.health.state()

    # Requests

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            _, door = self._prepare(scope)
            door.check(local_path(scope), "GET", scope["headers"])
        except (Refusal, GuardError):
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        path = local_path(scope)
        guarded = scope["method"] == "POST" and path in ROUTES
        inbox = Inbox(receive, self.settings.max_body_bytes)
        answer = Answer(send, self.settings.send_timeout_s, self.settings.send_floor_bytes_s, inbox)
        try:
            pool, door = self._prepare(scope)
            key = door.check(path, scope["method"], scope["headers"])
            check_length(scope["headers"], self.settings.max_body_bytes)
            if guarded:
                await self.generation.run(Call(scope, path, key, inbox, answer, pool, door, began))
            elif path in ("/health", "/ping") and self.health.failing:
                await self.health.report(send)
            else:
                if path == "/metrics":
                    self.health.show()
                await self.app(scope, inbox.counted, answer.send)
        except Refusal as refusal:
            if answer.started:
                raise
            if guarded:
                self.metrics.request_of(refusal.reason).inc()
            await send_refusal(send, refusal)
        except GuardError as error:
            await send_refusal(send, unavailable(f"m3quant guard: {error}", "misconfigured", 60))
        except ClientGone:
            self.metrics.request_of("disconnected").inc()
        finally:
            inbox.close()
