"""The outgoing side of a request: passes every message on unchanged, records how it ended, and drops a client that does not read."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from .begun import within
from .inbox import Inbox, Message

Send = Callable[[Message], Coroutine[Any, Any, None]]


LONG_MESSAGE = 65536  # bytes; whether part of a message was taken cannot be seen, so more of them give no more time


class ClientStalled(Exception):
    """The client stopped reading its stream, or reads slower than the floor."""


class Answer:
    """`timeout_s`: how long the client may keep the server waiting beyond what its bytes take at `floor` bytes per second; 0: for ever.

    The account is in seconds: waiting for the client adds to it, bytes that the client took reduce it, and it never goes below zero. So a
    client that reads nothing is given up after `timeout_s`, one at half the floor after twice that, one above the floor never.
    """

    def __init__(self, send: Send, timeout_s: float, floor: int, inbox: Inbox) -> None:
        self._send = send
        self._inbox = inbox
        self._timeout_s = timeout_s
        self._floor = floor
        self._most_s = LONG_MESSAGE / floor if floor else 0.0
        self.behind_s = 0.0
        self.on_first_token: Callable[[], None] | None = None
        self.on_body: Callable[[bytes], None] | None = None
        self.extra: list[tuple[bytes, bytes]] = []
        self.began = time.monotonic()
        self.started = False
        self.finished = False
        self.in_vain = False  # finished, and the client had left before: vLLM ends a plain answer so when it aborts it
        self.sending = False
        self.stalled = False
        self.status = 0

    async def send(self, message: Message) -> None:
        if self._inbox.refusal is not None and not self.started:
            raise self._inbox.refusal  # the application made another answer of it
        if self.on_body is not None and message["type"] == "http.response.body":
            self.on_body(message.get("body", b""))
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            if self.extra:
                message = {**message, "headers": [*message.get("headers", []), *self.extra]}
        elif self.on_first_token is not None and (body := message.get("body")) and not body.startswith(b":"):
            self.on_first_token()  # a comment is only vLLM keeping the stream alive during a long prefill
            self.on_first_token = None
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        self.in_vain = last and self._inbox.gone  # seen before it is sent: afterwards servers say so of any client
        self.sending = True
        try:
            if self._timeout_s:
                await self._paced(message)
            else:
                await self._send(message)
        finally:
            self.sending = False
        self.finished |= last

    async def _paced(self, message: Message) -> None:
        began = time.monotonic()
        earned = len(message.get("body", b"")) / self._floor if self._floor else 0.0
        try:
            await within(self._send(message), self._timeout_s - self.behind_s + min(earned, self._most_s))
        except TimeoutError:
            self.stalled = True
            raise ClientStalled("the client does not read") from None
        if self._floor:
            waited = time.monotonic() - began
            self.behind_s = max(0.0, self.behind_s + waited - earned)
            if self.behind_s >= self._timeout_s:
                self.stalled = True
                raise ClientStalled("the client reads slower than the floor")

    def outcome(self) -> str:
        if not self.finished or self.in_vain:
            return "disconnected" if self._inbox.gone or self.started else "error"
        return "success" if self.status < 400 else "refused_by_server" if self.status < 500 else "error"
