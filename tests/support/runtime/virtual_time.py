"""An event loop whose clock jumps to the next timer when nothing is left to do: minutes of waiting pass at once, and in the same order each time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` is in seconds. Raises AssertionError where no timer is set and nothing is ready: what is awaited would never come."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        really = selector.select

        def select(timeout: float | None = None) -> Any:
            assert timeout is not None, "nothing is left to do, and something is still waited for"
            self.now += max(0.0, timeout)
            return really(0)

        selector.select = select

    def time(self) -> float:
        return self.now


def run_virtually(scenario: Coroutine[Any, Any, T], monkeypatch: pytest.MonkeyPatch) -> T:
    """The scenario's result. Inside it time.monotonic and time.perf_counter are the loop's clock; no thread or process may be waited for."""
    loop = VirtualLoop()
    with monkeypatch.context() as patch, asyncio.Runner(loop_factory=lambda: loop) as runner:
        patch.setattr(time, "monotonic", loop.time)
        patch.setattr(time, "perf_counter", loop.time)
        return runner.run(scenario)
