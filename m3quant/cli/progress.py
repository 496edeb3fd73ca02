"""Progress on stderr from the first second: a bar on a terminal, elsewhere a line every few seconds. Step, bytes, ETA."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from .. import __version__
from ..running import steps
from ..running.pace import KNOWN_SHARE, KNOWN_SHARE_OF_NETWORK, Pace
from ..running.words import duration
from .verbosity import QUIET, VERBOSE, verbosity

LINE_SECONDS = 10.0  # without a terminal: one progress line in this time
# On a terminal bytes are counted in for so long before they are shown: a bar is drawn ten times a second, and laying one out costs forty
# times as much as a count, with the lock held that every thread counts under.
BAR_SECONDS = 0.1


class Track:
    """A stream of bytes. before: those of its total that came in an earlier run. known: as of `Pace`. task: of its bar, on a terminal."""

    def __init__(self, label: str, total: int, before: int = 0, known: float = KNOWN_SHARE) -> None:
        self.label, self.total, self.before = label, total, before
        self.pace = Pace(total - before, known)
        self.task: TaskID | None = None

    @property
    def done(self) -> int:
        return self.before + self.pace.done

    def rate(self, now: float) -> str:
        """Empty where it is not known, or of no interest any more."""
        rate = self.pace.rate(now) if self.done < self.total else None
        return "" if rate is None else f"{rate / 1e6:.0f} MB/s"

    def words(self, now: float) -> str:
        amount = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB"
        told = [f"{self.label} {amount}" if self.label else amount, self.rate(now)]
        return ", ".join(filter(None, told))


class BytesProgress:
    """Counts bytes and names the step. Use as a context manager. expected: seconds that the whole work is planned to take."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.expected: float | None = None
        self._console = Console(stderr=True)
        self._stack = ExitStack()
        self._bar: Progress | None = None
        self._own: Track | None = None
        self._beside: list[Track] = []
        self._step, self._waiting, self._share = "", "", 0.0
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
            self._stack.callback(self._show)  # what came last
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

    def start(self, total_bytes: int, done_bytes: int, label: str = "") -> None:
        with self._lock:
            self._own = Track(label, total_bytes, done_bytes)
            self._started = time.monotonic()
        self._show()

    def advance(self, count: int) -> None:
        with self._lock:
            if self._own:
                self._own.pace.advance(count, time.monotonic())
        self._show(BAR_SECONDS)

    def beside(self, label: str, total_bytes: int) -> Callable[[int], None]:
        track = Track(label, total_bytes, known=KNOWN_SHARE_OF_NETWORK)
        if self._bar:
            track.task = self._bar.add_task("", total=total_bytes, label=label)
        with self._lock:
            self._beside.append(track)

        def advance(count: int) -> None:
            with self._lock:
                track.pace.advance(count, time.monotonic())
            self._show(BAR_SECONDS)

        return advance

    def expect(self, seconds: float) -> None:
        self.expected = seconds

    def step(self, words: str) -> None:
        self._step, self._share, self._step_began = words, 0.0, time.monotonic()
        if verbosity() == VERBOSE:
            self.say(f"{self.label}: {words}")
        self._show()

    def waiting(self, words: str) -> None:
        self._waiting = words
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

    def _show(self, bar_seconds: float = 0.0) -> None:
        """Lay out the bar if that was last done before so long, or print a line if the last one is old enough."""
        if verbosity() == QUIET:
            return
        with self._lock:
            now = time.monotonic()
            if now - self._last < (bar_seconds if self._bar else LINE_SECONDS):
                return
            self._last = now
            if self._bar:
                self._redraw(self._bar, now)
                return
            line = f"{self.label}: {self._words(now)}"
        print(line, file=sys.stderr, flush=True)

    def _redraw(self, bar: Progress, now: float) -> None:
        # A bar that knows no total moves by itself.
        total, done = (self._own.total or None, self._own.done) if self._own else (None, 0)
        bar.update(self._task, total=total, completed=done, description=self._words(now))
        for track in self._beside:
            assert track.task is not None
            bar.update(track.task, completed=track.done, description=track.rate(now))

    def _words(self, now: float) -> str:
        shown = [f"{self._step}, {self._share:.0%}" if self._share else self._step] if self._step else []
        if self._waiting:
            shown.append(self._waiting)
        elapsed = now - self._started
        if not self._bar:
            shown += [track.words(now) for track in self._beside]
        if self._own and self._own.total:
            if not self._bar:  # which shows the share, and has 80 columns
                shown.append(self._own.words(now))
            elif not self._step:
                shown.append(self._own.rate(now))
            if any(track.done < track.total for track in (self._own, *self._beside)):
                shown.append(f"ETA {self._eta(self._own, now)}")
        elif self._share:
            spent = now - self._step_began
            shown.append(f"ETA of this step {duration(spent * (1 - self._share) / self._share)}")
        elif not self._bar:
            shown.append(f"{duration(elapsed)} so far")
        return "; ".join(filter(None, shown))

    def _eta(self, own: Track, now: float) -> str:
        """Of the slowest stream. While one has told too little: what was planned of the command's own, or the most that is known."""
        told = [track.pace.seconds_left(now) for track in (own, *self._beside)]
        known = [seconds for seconds in told if seconds is not None]
        longest = max(known, default=0.0)
        if len(known) == len(told):
            return duration(longest)
        if self.expected is not None and told[0] is None:
            planned = self.expected * own.pace.total / own.total - (now - self._started)
            if planned > longest:
                return f"about {duration(planned)}, as planned"
        return f"at least {duration(longest)}" if longest else "not known yet"


def opening(line: str) -> None:
    """The first line of a long command, before anything that takes time is imported or read."""
    if verbosity() != QUIET:
        print(f"m3quant {__version__}: {line}", file=sys.stderr, flush=True)
