"""How many tokens a prompt has, by the server's own tokenizer and chat template.

The count comes from the application's `/tokenize` route, called in the same process: no network, vLLM's own renderer and templates, and an
interface that is public. Where there is none (another server, a body that route cannot express), the bound is the number of UTF-8 bytes:
a byte-level BPE token covers at least one byte of text, so the prompt has at most that many tokens, plus an allowance for what the
template adds. Which of the two was used is a label in the metrics.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pydantic_core

from .begun import within
from .idspan import LONG, IdSpan, shorten
from .inbox import ClientGone, Inbox, Message
from .need import Count
from .pool import Pool
from .reading import Counted, Reading, query_bound
from .replies import Refusal
from .settings import GuardSettings
from .turns import Turns

logger = logging.getLogger("vllm.m3quant.guard")

App = Callable[..., Awaitable[None]]
FOUND = re.compile(
    rb'\A\{"count": ?([0-9]{1,15}),'
)  # how vLLM's answer begins; what follows is the ids, which are not needed here
LEAST_S = 1.0  # a request gets this long to be counted, also when QUEUE_TIMEOUT_S is shorter


class Counter:
    """Asks the tokenizer, a bounded number of prompts at once, fairly between keys; large prompts one at a time."""

    def __init__(self, app: App, settings: GuardSettings) -> None:
        self.app = app
        self.settings = settings
        self.has_tokenize = settings.count == "tokenize"
        self.small = Turns(settings.tokenize_concurrency)
        self.large = Turns(1)

    async def count(
        self, reading: Reading, scope: dict[str, Any], key: str, inbox: Inbox, deadline: float, pool: Pool
    ) -> tuple[list[Count], list[int] | IdSpan | None]:
        """The tokens of every prompt, and the ids of the first where they are known.

        Raises the server's own 404 (unknown model) as a Refusal, and ClientGone. Nothing is counted after `deadline` (time.monotonic):
        then bytes bound the rest.
        """
        counts, ids = [], None
        deadline = max(deadline, time.monotonic() + LEAST_S)
        if len(reading.prompts) > 1:
            inbox.hang_up()  # so that `gone` says so between two prompts
        for number, prompt in enumerate(reading.prompts):
            if number:
                await asyncio.sleep(
                    0
                )  # an application that answers without waiting would hold the event loop for all of them
            if inbox.gone:
                raise ClientGone
            count, tokens = await self._count(prompt, scope, key, inbox, deadline)
            if number == 0:
                ids = tokens
            self._adjust(count, prompt, reading, pool)
            counts.append(count)
        return counts, ids

    def _adjust(self, count: Count, prompt: Counted, reading: Reading, pool: Pool) -> None:
        """What is around the counted text: media, a suffix, ids in its place, the cut that the request asks for."""
        if count.tokens < 0:  # the context, whatever is around it
            count.tokens = pool.longest
            return
        if prompt.media or prompt.extra:
            count.least = count.tokens if count.exact else 1
            count.tokens += prompt.media * self.settings.media_tokens + prompt.extra
            count.exact = False
        if reading.truncate is not None and not prompt.media:
            limit = reading.truncate if reading.truncate >= 0 else pool.max_model_len - 1
            count.tokens, count.least = max(1, min(count.tokens, limit)), 1
        if prompt.at_least > count.tokens:  # ids in place of the messages, which are not cut
            count.least = min(count.tokens if count.exact else count.least, prompt.at_least)
            count.tokens, count.exact = prompt.at_least, False

    async def _count(
        self, prompt: Counted, scope: dict[str, Any], key: str, inbox: Inbox, deadline: float
    ) -> tuple[Count, list[int] | IdSpan | None]:
        if prompt.ids is not None:
            return Count(prompt.ids, "ids", True), prompt.token_ids
        if prompt.query is not None and self.has_tokenize:
            found = await self._in_turn(prompt.query, scope, key, inbox, deadline)
            if found is not None:
                return found
        if prompt.any_template or (prompt.bound is None and prompt.query is None):
            return Count(-1, "context", False), None
        bound = prompt.bound if prompt.bound is not None else query_bound(prompt.query or b"")
        return Count(bound + self.settings.template_tokens, "bytes", False), None

    async def _in_turn(
        self, query: bytes, scope: dict[str, Any], key: str, inbox: Inbox, deadline: float
    ) -> tuple[Count, list[int] | IdSpan | None] | None:
        longest = self.settings.tokenize_timeout_s
        limit = min(longest, deadline - time.monotonic())
        if limit <= 0:
            return None
        if len(query) < LONG and self.small.enter(key, len(query)):  # soon over: not worth a task of its own
            try:
                return await within(self._tokenize(query, scope), limit)
            except TimeoutError:
                return None
            finally:
                self.small.leave(key)
        turns = self.large if len(query) >= LONG else self.small
        try:
            # The work has a limit of its own: an application that never answers would keep the place for good.
            return await turns.run(
                key, len(query), inbox, deadline, lambda: within(self._tokenize(query, scope), longest)
            )
        except TimeoutError:
            return None

    async def _tokenize(self, query: bytes, scope: dict[str, Any]) -> tuple[Count, list[int] | IdSpan | None] | None:
        try:
            status, answer = await self._ask(query, scope)
        except Exception:  # whatever went wrong inside the application, the byte bound is still right
            return None
        if status == 200 and self.settings.prefix_hits == "ignore" and (found := FOUND.match(answer)):
            return Count(int(found[1]), "tokenize", True), None
        try:
            short, span = shorten(answer, (b'"tokens"',))
            parsed = pydantic_core.from_json(short)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            return None
        if status == 200 and isinstance(parsed.get("count"), int):
            tokens = span if span is not None else parsed.get("tokens")
            ids = tokens if isinstance(tokens, list | IdSpan) else None
            return Count(parsed["count"], "tokenize", True), ids
        error = parsed.get("error")
        if status == 404 and isinstance(error, dict) and error.get("param") == "model":
            kind = str(error.get("type", "NotFoundError"))
            raise Refusal(404, str(error.get("message", "")), kind, "unknown_model", param="model")
        if status == 404:
            self.has_tokenize = False  # it will not appear later
            logger.warning(
                "m3quant guard: the server has no /tokenize; prompts are counted by their UTF-8 bytes, an upper bound."
            )
        return None

    async def _ask(self, body: bytes, scope: dict[str, Any]) -> tuple[int, bytes]:
        path = scope.get("root_path", "") + "/tokenize"
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [
            (name, value) for name, value in scope["headers"] if name in (b"authorization", b"host", b"x-api-key")
        ]
        inner = {**scope, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        status, chunks, sent = 500, [], False

        async def receive() -> Message:
            nonlocal sent
            if sent:
                await asyncio.get_running_loop().create_future()  # the asker never hangs up
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                chunks.append(message.get("body", b""))

        await self.app(inner, receive, send)
        return status, b"".join(chunks)
