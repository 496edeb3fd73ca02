"""What a long computation is doing now: told from deep inside it to whoever shows progress. Costs a comparison where nobody listens.

    with listening(show):                # show.step("layer 3 (4 of 60): experts"); show.part(0.25)
        ...
    step("layer 3 (4 of 60): experts")   # anywhere below, on the thread that computes
    part(16, 64)

`parts` puts another listener in front, for work that is a share of something larger.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


class Listener(Protocol):
    def expect(self, seconds: float) -> None: ...

    def step(self, words: str) -> None: ...

    def waiting(self, words: str) -> None: ...

    def part(self, share: float) -> None: ...


@dataclass(eq=False)  # two threads may wait for the same
class _Wait:
    listener: Listener
    words: str


_listeners: list[Listener] = []
_waits: list[_Wait] = []
_waits_lock = threading.Lock()
_parts: list[Callable[[float], None]] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Until the block ends, `listener` hears of steps and parts, and nobody before it does."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def parts(reached: Callable[[float], None]) -> Iterator[None]:
    """Until the block ends, `reached` hears what share of its work is done, too."""
    _parts.append(reached)
    try:
        yield
    finally:
        _parts.remove(reached)


def expect(seconds: float) -> None:
    """How long the whole is planned to take."""
    if _listeners:
        _listeners[-1].expect(seconds)


def step(words: str) -> None:
    """What begins now."""
    if _listeners:
        _listeners[-1].step(words)


@contextmanager
def waiting(words: str) -> Iterator[None]:
    """What finished work waits for until the block ends; any thread may wait, and the step stays what it is.

    Of several waits the one that began last is told, until it ends.
    """
    if not _listeners:
        yield
        return
    wait = _Wait(_listeners[-1], words)
    with _waits_lock:
        _waits.append(wait)
        wait.listener.waiting(words)
    try:
        yield
    finally:
        with _waits_lock:
            _waits.remove(wait)
            others = [other.words for other in _waits if other.listener is wait.listener]
            wait.listener.waiting(others[-1] if others else "")


def part(done: int, total: int) -> None:
    """How much of the step is done."""
    if _listeners and total:
        _listeners[-1].part(done / total)
    if _parts and total:
        _parts[-1](done / total)
