"""What a long command reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Receives the state of a long command: bytes to do, bytes done, and lines for the user. Any thread may tell."""

    def start(self, total_bytes: int, done_bytes: int, label: str = "") -> None:
        """label: what is done with these bytes, where other streams may go on beside them."""
        ...

    def advance(self, count: int) -> None: ...

    def beside(self, label: str, total_bytes: int) -> Callable[[int], None]:
        """A further stream of bytes that goes on at the same time; what is returned is told its bytes, less than none if they are lost."""
        ...

    def say(self, line: str) -> None: ...


class Silent:
    """A Progress that shows nothing and keeps what it received. streams: label -> bytes that came."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.total = self.done = 0
        self.streams: dict[str, int] = {}

    def start(self, total_bytes: int, done_bytes: int, label: str = "") -> None:
        self.total, self.done = total_bytes, done_bytes

    def advance(self, count: int) -> None:
        self.done += count

    def beside(self, label: str, total_bytes: int) -> Callable[[int], None]:
        self.streams.setdefault(label, 0)

        def advance(count: int) -> None:
            self.streams[label] += count

        return advance

    def say(self, line: str) -> None:
        self.lines.append(line)


# Called with a label ("convert"), gives a context manager of a Progress: a bar, lines, or nothing.
ShowProgress = Callable[[str], AbstractContextManager[Progress]]


def quietly(label: str) -> AbstractContextManager[Progress]:
    """A ShowProgress that shows nothing."""
    return nullcontext(Silent())
