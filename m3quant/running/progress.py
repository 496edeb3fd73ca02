"""What a long command reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Receives the state of a long command: bytes to do, bytes done, and lines for a person."""

    def start(self, total_bytes: int, done_bytes: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def say(self, line: str) -> None: ...


class Silent:
    """A Progress that shows nothing and keeps what it received."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.total = self.done = 0

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self.total, self.done = total_bytes, done_bytes

    def advance(self, count: int) -> None:
        self.done += count

    def say(self, line: str) -> None:
        self.lines.append(line)


# Called with a label ("convert"), gives a context manager of a Progress: a bar, lines, or nothing.
ShowProgress = Callable[[str], AbstractContextManager[Progress]]


def quietly(label: str) -> AbstractContextManager[Progress]:
    """A ShowProgress that shows nothing."""
    return nullcontext(Silent())
