"""Bytes in and out of the test Hub at a bounded rate, in pieces, and a sink that hashes what it throws away."""

import hashlib
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

PIECE_BYTES = 4 * 2**20


class Throttle:
    """At most `bytes_per_second` through `take`, whoever calls it; None: as fast as it goes."""

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self.bytes_per_second = bytes_per_second
        self.total = 0
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def piece(self) -> int:
        """Bytes to take at once: at a low rate small ones, so that progress is even."""
        rate = self.bytes_per_second
        return PIECE_BYTES if rate is None else max(1, min(PIECE_BYTES, int(rate / 50)))

    def take(self, count: int) -> None:
        with self._lock:
            self.total += count
            if self.bytes_per_second is None:
                return
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.bytes_per_second
            wait = self._free_at - now
        time.sleep(wait)

    def cut(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """`pieces` in smaller ones, each when it may go."""
        for whole in pieces:
            for start in range(0, whole.nbytes, self.piece):
                part = whole[start : start + self.piece]
                self.take(part.nbytes)
                yield part


class Sink:
    """Large files as they come, in parts one after the other, of which only hash and size are kept.

    A part that comes again, because its answer was lost, takes its former place.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[str, str], list[tuple[Any, int]]] = {}

    def take(self, repo: str, oid: str, part: int, body: BinaryIO, count: int, throttle: Throttle) -> None:
        """Read `count` bytes of `body`: part `part` (from 1) of the content that is to have the sha256 `oid`."""
        states = self._states.setdefault((repo, oid), [(hashlib.sha256(), 0)])
        if part > len(states):
            raise AssertionError(f"part {part} of {oid} comes before part {len(states)}")
        digest, before = states[part - 1][0].copy(), states[part - 1][1]
        buffer, left = memoryview(bytearray(PIECE_BYTES)), count
        while left:
            view = buffer[: min(left, throttle.piece)]
            got = body.readinto(view)  # type: ignore[attr-defined]
            if not got:
                raise ConnectionError("the client is gone")
            throttle.take(got)
            digest.update(view[:got])
            left -= got
        states[part:] = [(digest, before + count)]

    def end(self, repo: str, oid: str) -> tuple[str, int]:
        """sha256 and size of all parts together."""
        digest, size = self._states.pop((repo, oid))[-1]
        return digest.hexdigest(), size
