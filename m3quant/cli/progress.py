"""Progress on stderr from the first second: a bar on a terminal, elsewhere a line every few seconds. Step, bytes, ETA."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
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
class Track:
    """A stream of bytes beside the command's own. task: of its bar, on a terminal."""

    label: str
    total: int
    started: float
    done: int = 0
    task: TaskID | None = None

    def rate(self, now: float) -> float:
        """Bytes a second so far."""
        return self.done / (now - self.started) if now > self.started else 0.0

    def seconds_left(self, now: float) -> float | None:
        """None while that is not known."""
        if self.done >= self.total:
            return 0.0
        return (self.total - self.done) / self.rate(now) if self.done > KNOWN * self.total else None

    def words(self, now: float) -> str:
        return f"{self.label} {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {self.rate(now) / 1e6:.0f} MB/s"


class BytesProgress:
    """Counts bytes and names the step. Use as a context manager. expected: seconds that the whole work is planned to take."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.expected: float | None = None
        self._console = Console(stderr=True)
        self._stack = ExitStack()
        self._bar: Progress | None = None
        self._beside: list[Track] = []
        self._step, self._share = "", 0.0
        self._total = self._done = self._begun_at = 0
        self._started = self._step_began = time.monotonic()
        self._last = self._started - LINE_SECONDS  # the first thing that is told is shown at once
        self._lock = threading.Lock()

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
        track = Track(label, total_bytes, time.monotonic())
        if self._bar:
            track.task = self._bar.add_task("", total=total_bytes, label=label)
        self._beside.append(track)

        def advance(count: int) -> None:
            with self._lock:
                track.done += count
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
            for track in self._beside:
                assert track.task is not None
                rate = f"{track.rate(time.monotonic()) / 1e6:.0f} MB/s"
                self._bar.update(track.task, completed=track.done, description=rate)
            return
        with self._lock:
            if (now := time.monotonic()) - self._last < LINE_SECONDS:
                return
            self._last = now
        print(f"{self.label}: {self._words()}", file=sys.stderr, flush=True)

    def _words(self) -> str:
        shown = [f"{self._step}, {self._share:.0%}" if self._share else self._step] if self._step else []
        now = time.monotonic()
        elapsed = now - self._started
        if not self._bar:
            shown += [track.words(now) for track in self._beside]
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
        """From the rate so far; before it says something, from what was planned."""
        left = self._total - self._done
        others = [track.seconds_left(time.monotonic()) for track in self._beside]
        known = [seconds for seconds in others if seconds is not None]
        # The first bytes of a layer come long before those that take the time.
        if done > KNOWN * (done + left) and len(known) == len(others):
            return duration(max([left * elapsed / done, *known]))  # of the slowest stream
        if self.expected is None:
            return "not known yet"
        return f"about {duration(max(0.0, self.expected * (done + left) / self._total - elapsed))}, as planned"


def opening(line: str) -> None:
    """The first line of a long command, before anything that takes time is imported or read."""
    if verbosity() != QUIET:
        print(f"m3quant {__version__}: {line}", file=sys.stderr, flush=True)
