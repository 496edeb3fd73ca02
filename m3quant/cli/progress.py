"""Progress on stderr from the first second: a bar on a terminal, elsewhere a line every few seconds. Step, bytes, ETA."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from .. import __version__
from ..running import steps
from ..running.words import duration
from .verbosity import QUIET, VERBOSE, verbosity

KNOWN = 0.005  # share of the work after which its rate says something: a third of a layer of M2's 62
LINE_SECONDS = 10.0  # without a terminal: one progress line in this time


@dataclass
class _Beside:
    """A stream of bytes that goes on at the same time, with a bar or a part of the line of its own."""

    label: str
    total: int
    started: float
    done: int = 0
    task: TaskID | None = None

    def rate(self) -> float:
        elapsed = time.monotonic() - self.started
        return self.done / elapsed if elapsed > 0 else 0.0

    def seconds_left(self) -> float | None:
        """None before its rate says something."""
        if self.done >= self.total:
            return 0.0
        return (self.total - self.done) / self.rate() if self.done > KNOWN * self.total and self.rate() else None

    def words(self) -> str:
        return f"{self.label}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {self.rate() / 1e6:.0f} MB/s"


class BytesProgress:
    """Counts bytes and names the step. Use as a context manager. expected: seconds that the whole work is planned to take."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.expected: float | None = None
        self._console = Console(stderr=True)
        self._stack = ExitStack()
        self._bar: Progress | None = None
        self._step, self._share = "", 0.0
        self._total = self._done = self._begun_at = 0
        self._started = self._step_began = time.monotonic()
        self._last = self._started - LINE_SECONDS  # the first thing that is told is shown at once
        self._lock = threading.Lock()
        self._beside: list[_Beside] = []

    def __enter__(self) -> BytesProgress:
        self._stack.enter_context(steps.listening(self))
        if verbosity() == QUIET:
            return self
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.fields[label]}"), BarColumn(bar_width=10), TimeElapsedColumn(), TextColumn("{task.description}"),
                console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=None, label=self.label)
            self._stack.enter_context(self._bar)
        ended = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(ended,), daemon=True, name="progress")
        ticker.start()
        self._stack.callback(ticker.join)
        self._stack.callback(ended.set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self._total, self._done, self._begun_at = total_bytes, done_bytes, done_bytes
        self._started = time.monotonic()
        self._show()

    def advance(self, count: int) -> None:
        self._done += count
        self._show()

    def beside(self, label: str, total_bytes: int) -> Callable[[int], None]:
        stream = _Beside(label, total_bytes, time.monotonic())
        self._beside.append(stream)

        def advance(count: int) -> None:
            stream.done += count
            self._show()

        return advance

    def expect(self, seconds: float) -> None:
        self.expected = seconds

    def step(self, words: str) -> None:
        self._step, self._share, self._step_began = words, 0.0, time.monotonic()
        if verbosity() == VERBOSE:
            self.say(f"{self.label}: {words}")
        self._show()

    def part(self, share: float) -> None:
        self._share = share
        self._show()

    def say(self, line: str) -> None:
        if verbosity() != QUIET:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _tick(self, ended: threading.Event) -> None:
        while not ended.wait(1.0 if self._bar else LINE_SECONDS):
            self._show()

    def _show(self) -> None:
        """Redraw the bar, or print a line if the last one is old enough."""
        if verbosity() == QUIET:
            return
        if self._bar:
            # A bar that knows no total moves by itself.
            self._bar.update(self._task, total=self._total or None, completed=self._done, description=self._words())
            with self._lock:
                for stream in self._beside:
                    if stream.task is None:
                        stream.task = self._bar.add_task("", total=stream.total, label=stream.label)
                    rate = f"{stream.rate() / 1e6:.0f} MB/s"
                    self._bar.update(stream.task, total=stream.total, completed=stream.done, description=rate)
            return
        with self._lock:
            if (now := time.monotonic()) - self._last < LINE_SECONDS:
                return
            self._last = now
        told = [f"{self.label}: {self._words()}", *(stream.words() for stream in self._beside)]
        print("; ".join(told), file=sys.stderr, flush=True)

    def _words(self) -> str:
        shown = [f"{self._step}, {self._share:.0%}" if self._share else self._step] if self._step else []
        elapsed = time.monotonic() - self._started
        if self._total:
            done = self._done - self._begun_at
            rate = done / elapsed if elapsed > 0 else 0.0
            if not self._bar:  # which shows the share, and has 80 columns
                shown.append(f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s")
            elif not self._step:
                shown.append(f"{rate / 1e6:.0f} MB/s")
            shown.append(f"ETA {self._eta(done, elapsed)}")
        elif self._share:
            spent = time.monotonic() - self._step_began
            shown.append(f"ETA of this step {duration(spent * (1 - self._share) / self._share)}")
        elif not self._bar:
            shown.append(f"{duration(elapsed)} so far")
        return "; ".join(shown)

    def _eta(self, done: int, elapsed: float) -> str:
        """From the rate so far, of the slowest stream; before it says something, from what was planned."""
        left = self._total - self._done
        others = [seconds for stream in self._beside if (seconds := stream.seconds_left()) is not None]
        # The first bytes of a layer come long before those that take the time.
        if done > KNOWN * (done + left):
            return duration(max(left * elapsed / done, *others, 0.0))
        if self.expected is None:
            return "not known yet"
        return f"about {duration(max(0.0, self.expected * (done + left) / self._total - elapsed))}, as planned"


def opening(line: str) -> None:
    """The first line of a long command, before anything that takes time is imported or read."""
    if verbosity() != QUIET:
        print(f"m3quant {__version__}: {line}", file=sys.stderr, flush=True)


def local_folder(path_or_repo: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint given as a folder or a Hub id; a repo is pulled and verified, with progress. Raises as `pull`."""
    from ..publish.pull import local_copy

    with BytesProgress("pull") as progress:
        return local_copy(path_or_repo, progress, revision)
