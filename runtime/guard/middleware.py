"""ASGI middleware that keeps vLLM's KV cache from being promised twice.

    vllm serve CKPT --middleware m3quant.runtime.guard.Guard

A generating request is admitted only when its prompt and all its output tokens have room in the KV cache; what can never fit is refused
with vLLM's words, what does not fit now waits or is told when to come back. Bodies and streams pass through unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

from m3quant.errors import GuardError

from .admission import Admission
from .clamp import with_number
from .counting import Counter
from .demand import ROUTES, Demand, Unreadable, read_demand
from .door import Door, known_keys
from .idspan import IdSpan
from .inbox import ClientGone, Inbox, Message, Receive
from .ledger import Ticket
from .metrics import metrics, read_gauges
from .need import Need, plan_need
from .pool import Pool, PoolReader
from .prefix import block_chain
from .replies import Refusal, bad_request, body_too_large, send_json, send_refusal, unavailable
from .settings import GuardSettings, read_settings
from .watchdog import GAUGES, Watchdog

logger = logging.getLogger("vllm.m3quant.guard")  # under vLLM's logger, so that its handlers print it

Scope = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

QUEUE_OF_POOLS = 4  # default bound of the queue, in pools


class ClientStalled(Exception):
    """The client stopped reading its stream."""


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
        self.watchdog = Watchdog(self.settings.watchdog_s)
        self.reader = PoolReader(self.settings)
        self.inside: set[Answer] = set()  # answers to requests that hold a reservation
        self.metrics = metrics()
        self.metrics.healthy.set(1)
        self.pool: Pool | None = None
        self.door: Door | None = None
        self.admission = Admission(0, 0, self.settings.queue_timeout_s, self.settings.retry_after_s)
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
        self._chain_signals()
        self._watching = asyncio.create_task(self._watch())
        try:
            await self.app(scope, receive, send)
        finally:
            self._watching.cancel()

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
        self.admission.resize(pool.usable, self._queue_limit(pool), pool.block_size)

    def _queue_limit(self, pool: Pool) -> int:
        given = self.settings.queue_tokens
        return QUEUE_OF_POOLS * pool.usable if given is None else given

    def _chain_signals(self) -> None:
        """Learns of SIGTERM and SIGINT and lets the server's own handling go on.

        Event loops wake up through a descriptor that Python's C handler writes to, whichever Python function is installed, so vLLM's
        `loop.add_signal_handler` still runs; with --shutdown-timeout it lets what is in flight finish.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)

            def chained(signum: int, frame: FrameType | None, before: Any = before) -> None:
                self.admission.draining = True  # the queue is emptied in the event loop, by the watch
                if callable(before):
                    before(signum, frame)

            with contextlib.suppress(ValueError):  # not the main thread: the server handles no signals here either
                if callable(before):
                    signal.signal(number, chained)
                    signal.siginterrupt(number, False)

    async def _watch(self) -> None:
        """Empties the queue once the server drains, and looks at the engine's gauges."""
        seen, failed = 0.0, False
        while True:
            await asyncio.sleep(min(0.2, self.settings.watchdog_interval_s))
            if self.admission.draining:
                self.admission.drain()
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
        unanswered = sum(not answer.sending for answer in self.inside)
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

    def state(self, gauges: dict[str, float] | None = None) -> dict[str, Any]:
        """The guard's and the engine's figures; no key, no prompt."""
        ledger, pool = self.admission.ledger, self.pool
        return {
            "engine": read_gauges(GAUGES) if gauges is None else gauges,
            "pool": None if pool is None else pool.__dict__,
            "capacity_tokens": ledger.capacity,
            "reserved_tokens": ledger.reserved,
            "requests_in_flight": ledger.admitted,
            "queued_tokens": ledger.queued,
            "requests_waiting": ledger.waiting,
            "keys_waiting": sum(1 for lane in ledger.lanes.values() if lane.queue),
            "draining": self.admission.draining,
            "stalled_s": round(self.watchdog.stalled_s, 1),
        }

    def _show(self) -> None:
        ledger = self.admission.ledger
        self.metrics.pool.set(ledger.capacity)
        self.metrics.reserved.set(ledger.reserved)
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
        answer = Answer(send, self.settings.send_timeout_s, inbox)
        try:
            self._prepare(scope)
            assert self.door is not None
            key = self.door.check(path, scope["method"], scope["headers"])
            self._check_length(scope)
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
                self.metrics.requests.labels(refusal.reason).inc()
            await send_refusal(send, refusal)
        except GuardError as error:
            await send_refusal(send, unavailable(f"m3quant guard: {error}", "misconfigured", 60))
        except ClientGone:
            self.metrics.requests.labels("disconnected").inc()
        finally:
            inbox.close()

    def _check_length(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self.settings.max_body_bytes:
                raise body_too_large(self.settings.max_body_bytes)

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
        began += time.perf_counter() - waited_for_body
        try:
            demand = read_demand(path, body)
        except Unreadable:
            self.metrics.requests.labels("passed").inc()
            await self.app(scope, inbox.receive, answer.send)
            return
        self.admission.precheck(key, self.pool.block_size, guess_tokens(demand, len(body), self.pool))
        counted_from = time.perf_counter()
        need, chain = await self._need(demand, scope, len(body))
        counting = time.perf_counter() - counted_from
        if need.set_output is not None:
            scope = self._set_output(scope, body, need, inbox, answer)
        ticket = Ticket(key, need.tokens, chain)
        if chain:
            answer.on_first_token = lambda: self.admission.ledger.prefilled(ticket)
        try:
            del body, demand  # the application has its own copy, for as long as the request lives
            overhead = time.perf_counter() - began - counting
            wait = await self.admission.admit(ticket, inbox.hang_up)
            self.metrics.counting.observe(counting)
            self.metrics.overhead.observe(overhead)
            self.metrics.wait.observe(wait)
            self.inside.add(answer)
            await self.app(scope, inbox.receive, answer.send)
            self.metrics.requests.labels(answer.outcome()).inc()
        except (Refusal, ClientGone):
            raise
        except Exception:
            if not answer.stalled:
                self.metrics.requests.labels("error").inc()
                raise
            self.metrics.requests.labels("stalled").inc()
            logger.warning(
                "m3quant guard: a client read nothing for %g s; its request is aborted.", self.settings.send_timeout_s
            )
        finally:
            self.inside.discard(answer)
            self.admission.release(ticket)

    async def _need(self, demand: Demand, scope: Scope, size: int) -> tuple[Need, tuple[bytes, ...]]:
        """What to reserve, and the blocks of the prompt that may be shared: none unless the settings say so."""
        assert self.pool is not None
        counts = []
        for prompt in demand.prompts:
            counts.append(await self.counter.count(demand, prompt, scope, size, self.pool))
            self.metrics.counted.labels(counts[-1].method).inc()
        need = plan_need(demand, counts, self.pool, self.settings)
        ids = counts[0].token_ids
        single = len(counts) == 1 and demand.copies == 1 and demand.truncate is None and not demand.prompts[0].media
        if self.settings.prefix_hits != "count" or not single or ids is None:
            return need, ()
        salt = f"{demand.body.get('model')}\0{demand.body.get('cache_salt')}"
        return need, block_chain(ids.ids() if isinstance(ids, IdSpan) else ids, self.pool.block_size, salt)

    def _set_output(self, scope: Scope, body: bytes, need: Need, inbox: Inbox, answer: Answer) -> Scope:
        assert need.set_output is not None
        try:
            changed = with_number(body, need.output_field, need.set_output)
        except (ValueError, RecursionError):
            raise bad_request("The body must be a JSON object in UTF-8.", None) from None
        inbox.replace(changed)
        self.metrics.clamped.labels(need.set_reason).inc()
        answer.extra = [(b"x-m3quant-guard-max-tokens", f"{need.set_output}; {need.set_reason}".encode())]
        length = str(len(changed)).encode()
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
        return {**scope, "headers": [*headers, (b"content-length", length)]}


class Answer:
    """The outgoing side: passes every message on untouched, remembers how it ended, and gives up on a client that stops reading."""

    def __init__(self, send: Send, timeout_s: float, inbox: Inbox) -> None:
        self._send = send
        self._inbox = inbox
        self._timeout_s = timeout_s or None
        self.on_first_token: Callable[[], None] | None = None
        self.extra: list[tuple[bytes, bytes]] = []
        self.started = False
        self.finished = False
        self.sending = False
        self.stalled = False
        self.status = 0

    async def send(self, message: Message) -> None:
        if self._inbox.refusal is not None and not self.started:
            raise self._inbox.refusal  # the application made another answer of it
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            if self.extra:
                message = {**message, "headers": [*message.get("headers", []), *self.extra]}
        elif self.on_first_token is not None and (body := message.get("body")) and not body.startswith(b":"):
            self.on_first_token()  # a comment is only vLLM keeping the stream alive during a long prefill
            self.on_first_token = None
        self.sending = True
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            self.stalled = True
            raise ClientStalled(f"the client read nothing for {self._timeout_s:g} seconds") from None
        finally:
            self.sending = False
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.finished = True

    def outcome(self) -> str:
        if not self.finished:
            return "disconnected" if self._inbox.gone or self.started else "error"
        return "success" if self.status < 400 else "refused_by_server" if self.status < 500 else "error"


def guess_tokens(demand: Demand, size: int, pool: Pool) -> int:
    """What a request may need, before its prompt is counted: four bytes a token, as English text has."""
    prompts = sum(size // 4 // len(demand.prompts) if prompt.ids is None else prompt.ids for prompt in demand.prompts)
    tokens = (prompts + len(demand.prompts) * (demand.output or 0)) * demand.copies
    return min(pool.blocks(tokens), pool.usable)


def local_path(scope: Scope) -> str:
    """The path as the application routes it: without the mount prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).rstrip("/") or "/"
