"""A coroutine run up to its first wait. Most sends and small requests never wait, and then need no timer, which would cost more than they do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Begun(Generic[T]):
    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        self._first: Any = None
        self.done = False
        self.result: T
        try:
            self._first = coroutine.send(None)
        except StopIteration as end:
            self.done, self.result = True, end.value

    def __await__(self) -> Generator[Any, Any, T]:
        """What `await coroutine` would do from here on: passes on what the loop sends, cancellation included."""
        waiting = self._first
        try:
            while True:
                try:
                    sent = yield waiting
                except BaseException as error:
                    waiting = self._coroutine.throw(error)
                else:
                    waiting = self._coroutine.send(sent)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            self._coroutine.close()


async def within(coroutine: Coroutine[Any, Any, T], limit_s: float) -> T:
    """The coroutine's result; raises TimeoutError when it waits for more than `limit_s` seconds, and it is cancelled."""
    if not isinstance(coroutine, Coroutine):  # any awaitable is allowed to be an application's `send`
        async with asyncio.timeout(limit_s):
            return await coroutine
    begun = Begun(coroutine)
    if begun.done:
        return begun.result
    async with asyncio.timeout(limit_s):
        return await begun
