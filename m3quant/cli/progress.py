"""Progress on stderr: a bar with bytes per second and ETA on a terminal, a line a layer elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

KNOWN = 0.005  # share of the work after which its rate says something: a third of a layer of M2's 62
LINE_SECONDS = 10.0  # without a terminal: at most one progress line in this time


class BytesProgress:
    """Counts bytes. Use as a context manager."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._total = self._done = self._begun_at = 0
        self._started = self._last = time.monotonic()

    def __enter__(self) -> BytesProgress:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn(self.label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn(),
                TextColumn("ETA"), TimeRemainingColumn(), console=self._console,
            )  # fmt: skip
            self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.__exit__(kind, error, trace)

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self._total, self._done, self._begun_at = total_bytes, done_bytes, done_bytes
        self._started = time.monotonic()
        if self._bar:
            self._task = self._bar.add_task(self.label, total=total_bytes, completed=done_bytes)

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar:
            self._bar.advance(self._task, count)
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            done, left = self._done - self._begun_at, self._total - self._done
            rate = done / (now - self._started)
            # The first bytes of a layer come long before those that take the time.
            eta = f"{left / rate:.0f} s" if done > KNOWN * (done + left) else "not known yet"
            print(
                f"{self.label}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, ETA {eta}",
                file=sys.stderr,
            )

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def local_folder(path_or_repo: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint given as a folder or a Hub id; a repo is pulled and verified, with progress. Raises as `pull`."""
    from ..publish.pull import local_copy

    with BytesProgress("pull") as progress:
        return local_copy(path_or_repo, progress, revision)
