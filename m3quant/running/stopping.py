"""SIGINT and SIGTERM as a clean stop: the unit in progress is dropped, finished ones stay, the same command continues."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import M3QuantError


class InterruptedRun(M3QuantError):
    """Stopped by a signal. exit_code follows the shell's 128 + signal number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[type[InterruptedRun], tuple[int, str], dict[str, object]]:
        # An exception is pickled as its class called with `args`, here the message alone; one that is raised in a worker
        # must arrive as what it is.
        return type(self), (self.number, str(self)), vars(self)


class StopFlag:
    """Set by the first signal, or by work beside the main thread that failed; `check` raises at the next safe point.

    A second signal acts at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.failure: Exception | None = None

    def fail(self, failure: Exception) -> None:
        """Called on any thread: nothing can go on because of this. The first failure counts."""
        self.failure = self.failure or failure

    def check(self) -> None:
        """Raise InterruptedRun if a signal came, and what `fail` was given."""
        if self.failure is not None:
            raise self.failure
        if self.number is not None:
            name = signal.Signals(self.number).name
            raise InterruptedRun(
                self.number, f"stopped by {name}; finished layers are kept: run the same command to continue."
            )


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Install handlers for SIGINT and SIGTERM around a conversion (main thread only)."""
    flag = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        flag.number = number
        for sig, previous in before.items():
            signal.signal(sig, previous)

    before = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    for sig in before:
        signal.signal(sig, handle)
    try:
        yield flag
    finally:
        for sig, previous in before.items():
            signal.signal(sig, previous)
