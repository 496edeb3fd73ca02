"""One generating request: read, counted, admitted, passed on; whatever happens, its reservation is given back once."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from .admission import Admission
from .answer import Answer, Send
from .bodies import Bodies
from .clamp import with_number
from .counting import Counter
from .demand import Unreadable
from .door import Door
from .growth import Growth
from .idspan import IdSpan
from .inbox import ClientGone, Inbox, Receive
from .metrics import Metrics
from .need import Need, guess_tokens, plan_all, refuse_certain
from .outlook import Outlook
from .pool import Pool
from .prefix import block_chain
from .reading import Reading
from .replies import Refusal, bad_request
from .settings import GuardSettings
from .tickets import Ticket

logger = logging.getLogger("vllm.m3quant.guard")  # under vLLM's logger, so that its handlers print it

Scope = dict[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Call:
    """A request on a guarded route that the door let in. began: time.perf_counter."""

    scope: Scope
    path: str
    key: str
    inbox: Inbox
    answer: Answer
    pool: Pool
    door: Door
    began: float


class Generation:
    """inside: answers to requests that hold a reservation."""

    def __init__(
        self,
        app: App,
        settings: GuardSettings,
        admission: Admission,
        outlook: Outlook | None,
        bodies: Bodies,
        inside: set[Answer],
        metrics: Metrics,
    ) -> None:
        self.app = app
        self.settings = settings
        self.admission = admission
        self.outlook = outlook
        self.bodies = bodies
        self.inside = inside
        self.metrics = metrics
        self.counter = Counter(app, settings)

    async def run(self, call: Call) -> None:
        scope, path, key, inbox, answer, pool = call.scope, call.path, call.key, call.inbox, call.answer, call.pool
        waited_for_body = time.perf_counter()
        body = await inbox.read()
        came = time.perf_counter()
        deadline = time.monotonic() + self.settings.queue_timeout_s
        began = call.began + came - waited_for_body
        try:
            readings = await self.bodies.read(path, key, body, inbox, deadline, pool)
        except Unreadable:
            self.metrics.request_of("passed").inc()
            await self.app(scope, inbox.receive, answer.send)
            return
        for reading in readings if len(readings) == 1 else []:
            refuse_certain(reading, pool, self.settings)
        guess = max(guess_tokens(reading, len(body), pool) for reading in readings)
        self.admission.precheck(key, pool.block_size, guess)
        counted_from = time.perf_counter()
        need, chain = await self._need(call, readings, deadline)
        counting = time.perf_counter() - counted_from
        if need.set_output is not None:
            scope = await self._set_output(call, body, need, deadline)
        ticket = Ticket(key, need.tokens, chain, growth=self._growth(call, readings[0].model, need))
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

    async def _need(self, call: Call, readings: list[Reading], deadline: float) -> tuple[Need, tuple[bytes, ...]]:
        """What to reserve, and the blocks of the prompt that may be shared: none unless the settings say so."""
        key, inbox, pool = call.key, call.inbox, call.pool
        counts, ids = [], None
        for reading in readings:
            found, ids = await self.counter.count(reading, call.scope, key, inbox, deadline, pool)
            counts.append(found)
            for count in found:
                self.metrics.count_of(count.method).inc()
        need = plan_all(readings, counts, pool, self.settings)
        only = readings[0]
        single = len(readings) == 1 and only.sequences == 1 and only.truncate is None and counts[0][0].exact
        if self.settings.prefix_hits != "count" or not single or ids is None:
            return need, ()
        size = len(ids.raw) if isinstance(ids, IdSpan) else 0
        return need, await self.bodies.work(key, inbox, deadline, size, block_chain, ids, pool.block_size, only.salt)

    def _growth(self, call: Call, model: str, need: Need) -> Growth | None:
        """For a forecast; None where each request is reserved in full, and for more than one sequence."""
        if self.outlook is None or not need.output:
            return None
        return Growth(need.prompt, need.output, (call.path, call.door.class_of(call.key), model))

    async def _set_output(self, call: Call, body: bytes, need: Need, deadline: float) -> Scope:
        """The scope of a request whose body now has the tokens that the guard set."""
        assert need.set_output is not None
        size, name = len(body), need.output_field
        try:
            changed = await self.bodies.work(
                call.key, call.inbox, deadline, size, with_number, body, name, need.set_output
            )
        except ValueError:
            raise bad_request("The body must be a JSON object in UTF-8.", None) from None
        call.inbox.replace(changed)
        self.metrics.clamped.labels(need.set_reason).inc()
        call.answer.extra = [(b"x-m3quant-guard-max-tokens", f"{need.set_output}; {need.set_reason}".encode())]
        length = str(len(changed)).encode()
        headers = [(k, v) for k, v in call.scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
        return {**call.scope, "headers": [*headers, (b"content-length", length)]}
