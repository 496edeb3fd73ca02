"""ASGI middleware that prevents vLLM's KV cache from being promised twice.

    vllm serve CKPT --middleware m3quant.runtime.guard.Guard

A generating request is admitted only when its prompt and its output tokens have room in the KV cache, all that it may write or what it will
likely write (RESERVE); what can never fit is refused with vLLM's words, what does not fit now waits, or is refused with a time to come back.
Bodies and streams pass through unchanged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from m3quant.errors import GuardError

from .admission import Admission
from .answer import Answer, Send
from .aside import ASIDE_BYTES, Aside
from .clamp import with_number
from .counting import LEAST_S, Counter
from .demand import ID_NAMES, MOST_PROMPTS, ROUTES, TOKEN_ROUTE, Unreadable, local_path
from .door import Door, known_keys
from .growth import Growth
from .idspan import IdSpan, shorten
from .inbox import ClientGone, Inbox, Receive, check_length
from .metrics import metrics, read_gauges
from .need import Need, guess_tokens, plan_all, refuse_certain
from .outlook import Outlook
from .pool import Pool, PoolReader
from .prefix import block_chain
from .reading import Reading, read_short, read_whole
from .referee import HEARD
from .replies import Refusal, bad_request, busy, send_json, send_refusal, unavailable
from .settings import GuardSettings, read_settings
from .signals import chain_signals
from .tickets import Ticket
from .turns import Turns
from .watchdog import GAUGES, Watchdog

logger = logging.getLogger("vllm.m3quant.guard")  # under vLLM's logger, so that its handlers print it

Scope = dict[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

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
        self.counter = Counter(app, self.settings)
        self.aside = Aside()
        self.turns = Turns(1)  # at the process aside
        self.watchdog = Watchdog(self.settings.watchdog_s)
        self.reader = PoolReader(self.settings)
        self.inside: set[Answer] = set()  # answers to requests that hold a reservation
        self.metrics = metrics()
        self.metrics.healthy.set(1)
        self.pool: Pool | None = None
        self.door: Door | None = None
        self.outlook = Outlook(lambda: read_gauges(HEARD)) if self.settings.reserve == "learned" else None
        self.admission = Admission(0, 0, self.settings.queue_timeout_s, self.settings.retry_after_s, self.outlook)
        self._watching: asyncio.Task[None] | None = None
        self._reported = False

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
            self._prepare(scope)
        except GuardError as error:
            logger.error("m3quant guard: %s", error)
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"m3quant guard: {error}"})
            return
        assert self.pool is not None
        logger.info(
            "m3quant guard: %d of %d KV cache tokens to reserve in blocks of %d, longest sequence %d tokens, queue of %d tokens.",
            self.pool.usable,
            self.pool.tokens,
            self.pool.block_size,
            self.pool.longest,
            self._queue_limit(self.pool),
        )
        if self.settings.watchdog_s and GAUGES[1] not in read_gauges(GAUGES):
            logger.warning(
                "m3quant guard: no engine gauges to watch (--disable-log-stats?): the watchdog sees nothing."
            )
        if self.outlook is not None and len(read_gauges(HEARD)) < len(HEARD):
            logger.warning(
                "m3quant guard: M3QUANT_GUARD_RESERVE=learned needs the engine's gauges (--disable-log-stats?): "
                "every request is reserved in full until they can be read."
            )
        self._chain_signals()
        self._watching = asyncio.create_task(self._watch())
        try:
            await self.app(scope, receive, send)
        finally:
            self._watching.cancel()
            self.aside.close()

    def _prepare(self, scope: Scope) -> None:
        if self.problem is not None:
            raise self.problem
        pool = self.reader.read(scope)
        if self.settings.prefix_hits == "count" and not pool.prefix_caching:
            raise GuardError(
                "M3QUANT_GUARD_PREFIX_HITS=count needs vLLM's prefix caching, and this server runs without."
            )
        if self.door is None:
            self.door = Door(known_keys(self.settings, scope), self.settings.open_paths)
        self.pool = pool
        if self.outlook is not None:
            self.outlook.resize(pool.tokens - pool.block_size, pool.block_size)
        self.admission.resize(pool.usable, self._queue_limit(pool), pool.block_size)

    def _queue_limit(self, pool: Pool) -> int:
        given = self.settings.queue_tokens
        return QUEUE_OF_POOLS * pool.usable if given is None else given

    def _chain_signals(self) -> None:
        def going_down() -> None:
            self.admission.draining = True  # the queue is emptied in the event loop, by the watch

        chain_signals(going_down)

    async def _watch(self) -> None:
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
                    self._look(read_gauges(GAUGES))
                    failed = False
                except Exception as error:
                    # prometheus_client, on a file that another process writes or removes just now
                    if not failed:
                        logger.warning("m3quant guard: the engine's gauges cannot be read now: %s", error)
                    failed = True

    def _look(self, gauges: dict[str, float]) -> None:
        unanswered = len(self._unanswered())
        self.watchdog.see(gauges, unanswered)
        self._show()
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

    def _show(self) -> None:
        ledger = self.admission.ledger
        self.metrics.pool.set(ledger.capacity)
        self.metrics.reserved.set(ledger.promised)
        self.metrics.maximum.set(ledger.reserved)
        self.metrics.forecasting.set(ledger.forecasting)
        self.metrics.queued.set(ledger.queued)
        self.metrics.admitted.set(ledger.admitted)
        self.metrics.waiting.set(ledger.waiting)

    # Requests

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._prepare(scope)
            assert self.door is not None
            self.door.check(local_path(scope), "GET", scope["headers"])
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
            self._prepare(scope)
            assert self.door is not None
            key = self.door.check(path, scope["method"], scope["headers"])
            check_length(scope["headers"], self.settings.max_body_bytes)
            if guarded:
                await self._generate(scope, path, key, inbox, answer, began)
            elif path in ("/health", "/ping") and self._unhealthy():
                await self._report_unhealthy(send)
            else:
                if path == "/metrics":
                    self._show()
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

    def _unhealthy(self) -> bool:
        return self.admission.draining or self.watchdog.hanging

    async def _report_unhealthy(self, send: Send) -> None:
        status = "draining" if self.admission.draining else "hanging"
        await send_json(send, 503, json.dumps({"status": status, **self.state()}).encode())

    async def _generate(self, scope: Scope, path: str, key: str, inbox: Inbox, answer: Answer, began: float) -> None:
        """Reads, counts, admits, passes on; whatever happens, the reservation is given back once."""
        assert self.pool is not None
        waited_for_body = time.perf_counter()
        body = await inbox.read()
        came = time.perf_counter()
        deadline = time.monotonic() + self.settings.queue_timeout_s
        began += came - waited_for_body
        try:
            readings = await self._read(path, key, body, inbox, deadline)
        except Unreadable:
            self.metrics.request_of("passed").inc()
            await self.app(scope, inbox.receive, answer.send)
            return
        for reading in readings if len(readings) == 1 else []:
            refuse_certain(reading, self.pool, self.settings)
        guess = max(guess_tokens(reading, len(body), self.pool) for reading in readings)
        self.admission.precheck(key, self.pool.block_size, guess)
        counted_from = time.perf_counter()
        need, chain = await self._need(readings, scope, key, inbox, deadline)
        counting = time.perf_counter() - counted_from
        if need.set_output is not None:
            scope = await self._set_output(scope, key, body, need, inbox, answer, deadline)
        ticket = Ticket(key, need.tokens, chain, growth=self._growth(path, key, readings[0].model, need))
        if ticket.growth is not None:
            answer.on_body = ticket.growth.tally.see
        if chain or ticket.growth is not None:
            answer.on_first_token = lambda: self.admission.prefilled(ticket)
        try:
            del body, readings  # the application has its own copy, for as long as the request lives
            now = time.perf_counter()
            overhead = now - began - counting
            wait = await self.admission.admit(ticket, inbox.hang_up, waited_s=now - came)
            self.metrics.counting.observe(counting)
            self.metrics.overhead.observe(overhead)
            self.metrics.wait.observe(wait)
            self.inside.add(answer)
            await self.app(scope, inbox.receive, answer.send)
            self.metrics.request_of(answer.outcome()).inc()
        except (Refusal, ClientGone):
            raise
        except Exception:
            if not answer.stalled:
                self.metrics.request_of("error").inc()
                raise
            self.metrics.request_of("stalled").inc()
            logger.warning(
                "m3quant guard: a client kept the server waiting %g s beyond %d bytes a second; its request is aborted.",
                self.settings.send_timeout_s,
                self.settings.send_floor_bytes_s,
            )
        finally:
            known = answer in self.inside
            self.inside.discard(answer)
            self.admission.release(ticket)
            if known and self.outlook is not None and ticket.growth is not None:
                self.outlook.learn(ticket.growth, answer.outcome() == "success")

    async def _read(self, path: str, key: str, body: bytes, inbox: Inbox, deadline: float) -> list[Reading]:
        keep_ids = self.settings.prefix_hits == "count"
        short, span = shorten(body, ID_NAMES[path == TOKEN_ROUTE])
        assert self.pool is not None
        most = min(MOST_PROMPTS, self.pool.usable // self.pool.block_size)
        size = len(body)
        found = await self._aside(key, inbox, deadline, len(short), read_short, path, short, span, size, keep_ids, most)
        if found is None:  # the long array was no prompt
            found = await self._aside(key, inbox, deadline, size, read_whole, path, body, keep_ids, most)
        readings: list[Reading] = found
        return readings

    async def _aside(
        self, key: str, inbox: Inbox, deadline: float, size: int, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What the function makes of `size` bytes: here when they are few, else in its turn and in another process.

        Until `deadline` (time.monotonic), but for LEAST_S at least: what else a request does before may have taken its time.
        """
        if size < ASIDE_BYTES:
            return function(*arguments)
        deadline = max(deadline, time.monotonic() + LEAST_S)
        try:
            return await self.turns.run(key, size, inbox, deadline, lambda: self.aside.run(function, *arguments))
        except TimeoutError:
            wait_s = max(self.settings.queue_timeout_s, LEAST_S)
            raise busy(
                f"The body could not be read within {wait_s:g} seconds. Please retry later.",
                "queue_timeout",
                math.ceil(self.settings.retry_after_s),
            ) from None

    async def _need(
        self, readings: list[Reading], scope: Scope, key: str, inbox: Inbox, deadline: float
    ) -> tuple[Need, tuple[bytes, ...]]:
        """What to reserve, and the blocks of the prompt that may be shared: none unless the settings say so."""
        assert self.pool is not None
        counts, ids = [], None
        for reading in readings:
            found, ids = await self.counter.count(reading, scope, key, inbox, deadline, self.pool)
            counts.append(found)
            for count in found:
                self.metrics.count_of(count.method).inc()
        need = plan_all(readings, counts, self.pool, self.settings)
        only = readings[0]
        single = len(readings) == 1 and only.sequences == 1 and only.truncate is None and counts[0][0].exact
        if self.settings.prefix_hits != "count" or not single or ids is None:
            return need, ()
        size = len(ids.raw) if isinstance(ids, IdSpan) else 0
        return need, await self._aside(key, inbox, deadline, size, block_chain, ids, self.pool.block_size, only.salt)

    def _growth(self, path: str, key: str, model: str, need: Need) -> Growth | None:
        """For a forecast; None where each request is reserved in full, and for more than one sequence."""
        if self.outlook is None or not need.output:
            return None
        assert self.door is not None
        return Growth(need.prompt, need.output, (path, self.door.class_of(key), model))

    async def _set_output(
        self, scope: Scope, key: str, body: bytes, need: Need, inbox: Inbox, answer: Answer, deadline: float
    ) -> Scope:
        assert need.set_output is not None
        size, name = len(body), need.output_field
        try:
            changed = await self._aside(key, inbox, deadline, size, with_number, body, name, need.set_output)
        except ValueError:
            raise bad_request("The body must be a JSON object in UTF-8.", None) from None
        inbox.replace(changed)
        self.metrics.clamped.labels(need.set_reason).inc()
        answer.extra = [(b"x-m3quant-guard-max-tokens", f"{need.set_output}; {need.set_reason}".encode())]
        length = str(len(changed)).encode()
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
        return {**scope, "headers": [*headers, (b"content-length", length)]}
