"""A listener that keeps the steps it is told, each once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from m3quant.running import steps


class Heard:
    """words: of every step, in order. waits: what was waited for beside them."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.waits: list[str] = []

    def expect(self, seconds: float) -> None: ...

    def step(self, words: str) -> None:
        if self.words[-1:] != [words]:
            self.words.append(words)

    def waiting(self, words: str) -> None:
        self.waits.append(words)

    def part(self, share: float) -> None: ...


@contextmanager
def hearing() -> Iterator[Heard]:
    heard = Heard()
    with steps.listening(heard):
        yield heard
