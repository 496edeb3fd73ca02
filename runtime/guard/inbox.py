"""A request's incoming side: reads the body up to a limit, replays it unchanged, and notices a client that hangs up."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from .replies import Refusal, body_too_large

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


PIECES = 64  # a body in more pieces is handed on as one: a message a byte would take hundreds of times the memory of the body


LENGTH_DIGITS = 18  # of a Content-Length; Python itself refuses numbers of thousands of digits


def check_length(headers: Iterable[tuple[bytes, bytes]], limit: int) -> None:
    """Raises the 413 refusal of a body that says itself that it is over the limit."""
    for name, value in headers:
        if name != b"content-length" or not value.isdigit():
            continue
        if len(value) > LENGTH_DIGITS or int(value) > limit:
            raise body_too_large(limit)


class ClientGone(Exception):
    """The client hung up: there is no one to answer."""


class Inbox:
    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._size = 0
        self.refusal: Refusal | None = None  # what became of a body over the limit
        self._replay: list[Message] = []
        self._next: asyncio.Task[Message] | None = None
        self._left = False

    async def read(self) -> bytes:
        """The whole body. Raises ClientGone, or the 413 refusal when it is over the limit, whatever Content-Length said."""
        body = bytearray()
        for number in itertools.count(1):
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            piece = self._counted(message)
            if number <= PIECES:
                self._replay.append(message)
            last = not message.get("more_body", False)
            if last and number == 1:
                return piece
            body += piece
            if last:
                break
        whole = bytes(body)
        if number > PIECES:
            self.replace(whole)
        return whole

    def replace(self, body: bytes) -> None:
        self._replay = [{"type": "http.request", "body": body, "more_body": False}]

    def hang_up(self) -> asyncio.Task[Message]:
        """A task that ends when the client hangs up. Only after `read`: no other message can come then."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._receive())
        return self._next

    async def receive(self) -> Message:
        """What the application reads: the body, in the pieces in which it came where they are few, then the live connection."""
        if self._replay:
            return self._replay.pop(0)
        if (
            self._next is None
        ):  # there is no other listener, so nothing can get lost when the application gives up waiting
            message = await self._receive()
            self._left |= message["type"] == "http.disconnect"
            return message
        return await asyncio.shield(self._next)

    async def counted(self) -> Message:
        """For a route whose body the guard does not read: the live messages, refused once they are over the limit."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._counted(message)
        return message

    def _counted(self, message: Message) -> bytes:
        body: bytes = message.get("body", b"")
        self._size += len(body)
        if self._size > self._limit:
            self.refusal = body_too_large(self._limit)
            raise self.refusal
        return body

    @property
    def gone(self) -> bool:
        """Whether the client was seen to hang up."""
        return self._left or (self._next is not None and self._next.done() and not self._next.cancelled())

    def close(self) -> None:
        if self._next is not None:
            self._next.cancel()
