"""Learns of SIGTERM and SIGINT without taking them from the server."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


def chain_signals(before_all: Callable[[], None]) -> None:
    """Calls `before_all` at a signal and lets the server's own handling go on.

    Event loops wake up through a descriptor that Python's C handler writes to, whichever Python function is installed, so vLLM's
    `loop.add_signal_handler` still runs; with --shutdown-timeout it lets what is in flight finish.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def chained(signum: int, frame: FrameType | None, before: Any = before) -> None:
            before_all()
            if callable(before):
                before(signum, frame)

        with contextlib.suppress(ValueError):  # not the main thread: the server handles no signals here either
            if callable(before):
                signal.signal(number, chained)
                signal.siginterrupt(number, False)
