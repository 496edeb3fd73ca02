"""Shards of a checkpoint that is elsewhere, on the disk just as long as somebody reads them.

The source of a conversion (or of verify, or of an evaluation) is opened by headers alone. Its work is known beforehand as a
sequence of steps, and `shard_plan` says which shard is fetched for which step and stays until which. This module carries
that out: a few threads fetch ahead in the plan's order while the bytes on the disk, those in flight included, stay within
the budget; every shard is compared with what its store says of it before anybody sees it. A reader asks for shards and waits until
they are there (`reading`); the worker says which step is done (`finish`), and what no later step of its stay reads is removed.
Readers on any threads may run ahead: they wait, and since shards are fetched in the order of the steps, the earliest
unfinished step never waits for a later one. A reader that waits looks at the stop flag and ends with the first error of a
fetch. Who leaves with an error calls `abandon` first, so that no reader is waited for that waits for room that never comes.
Killed at any instant, a whole shard that the next run begins with is compared and used again; anything else is removed.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ..errors import M3QuantError, OutputError
from ..running.stopping import StopFlag
from .reader import Stamp
from .shard_plan import ShardPlan, Stay
from .writer import make_folder

FETCHES_AT_ONCE = 8  # some on the network, others comparing what came
POLL_SECONDS = 0.2
STALL_SECONDS = 30.0  # without a byte, after which a waiting reader says so
LEAVE_SECONDS = 5.0  # that a fetch in flight may take to notice that it is not wanted any more


class Abandoned(M3QuantError):
    """Somebody else's error ended the work: nobody waits for shards any more."""

    exit_code = 4


class ShardCache:
    """The shards of one checkpoint in `folder`, which belongs to the cache alone. Use it in a `with`.

    fetch: brings one shard into the folder, whole and compared, and gives the stamp of its file. stop: looked at while
    waiting. say: told when nothing has come for STALL_SECONDS. keep: whether whole shards stay there after an error, for the next run.
    """

    def __init__(
        self,
        folder: Path,
        plan: ShardPlan,
        fetch: Callable[[str], Stamp],
        stop: StopFlag,
        say: Callable[[str], None],
        keep: bool,
    ) -> None:
        self.folder, self.plan = folder, plan
        self._fetch, self._stop, self._say, self._keep = fetch, stop, say, keep
        self._number = {step.key: number for number, step in enumerate(plan.steps)}
        self._finished: set[int] = set()
        self._done = 0  # steps before this one are all finished
        self._begun = 0  # stays before this one were begun
        self._waiting: deque[Stay] = deque()  # begun, for a thread to fetch
        self._here: dict[str, Stay] = {}  # on the disk, in flight, or about to be
        self._stamps: dict[str, Stamp] = {}  # of those that are whole
        self._read: Counter[str] = Counter()  # how many are at it
        self._on_disk = 0
        self._error: BaseException | None = None
        self._left = False
        self._moved = time.monotonic()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._lock = -1

    def __enter__(self) -> ShardCache:
        make_folder(self.folder)
        self._take_lock()
        while (stay := self._next()) is not None:
            self._waiting.append(stay)
        self._remove_but({stay.shard for stay in self._waiting})
        # Daemons: a fetch that hangs in the network must not keep the process from ending.
        for number in range(min(FETCHES_AT_ONCE, len(self.plan.stays))):
            thread = threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()
        until = time.monotonic() + LEAVE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if kind is None or not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    @property
    def left(self) -> bool:
        """Whether the work has ended or is to: a fetch in flight may stop."""
        return self._left or self._stop.number is not None

    def order(self, name: str) -> float:
        """The step that a shard in flight is fetched for; of another file, after all of them."""
        stay = self._here.get(name)
        return math.inf if stay is None else stay.first

    def came(self) -> None:
        """A fetch tells that bytes have come."""
        self._moved = time.monotonic()

    @contextmanager
    def reading(self, shards: Iterable[str]) -> Iterator[Mapping[str, Stamp]]:
        """Stamps of these shards once all are whole in the folder; none leaves it while the block runs.

        Raises what stopped a fetch, InterruptedRun after a signal, Abandoned after `abandon`.
        """
        wanted = frozenset(shards)
        stamps = self._wait(wanted)
        try:
            yield stamps
        finally:
            with self._changed:
                self._read.subtract(wanted)
                self._drop_idle()

    def _wait(self, wanted: frozenset[str]) -> Mapping[str, Stamp]:
        told = time.monotonic()
        with self._changed:
            while not wanted <= self._stamps.keys():
                self._stop.check()
                if self._left:
                    raise Abandoned("the work on this checkpoint has ended.")
                if self._error is not None:
                    raise self._error
                self._check_planned(wanted)
                self._changed.wait(POLL_SECONDS)
                told = self._tell_stall(wanted, told)
            self._read.update(wanted)
            return {shard: self._stamps[shard] for shard in wanted}

    def fetch_other(self, name: str) -> Path:
        """A file that is no shard, fetched now: it is the caller's, who moves it out of the folder. Raises as `reading`."""
        try:
            self._fetch(name)
        except Abandoned:
            self._stop.check()
            raise
        return self.folder / name

    def finish(self, key: Hashable) -> None:
        """A step is done: nobody reads for it any more."""
        with self._changed:
            self._finished.add(self._number[key])
            while self._done in self._finished:
                self._done += 1
            self._drop_idle()

    def abandon(self) -> None:
        """Nobody reads any more: every waiting reader raises, and fetches end."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def _take_lock(self) -> None:
        """On the folder itself, which another process may be about to remove. Raises OutputError where it is in use."""
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock).st_ino == os.stat(self.folder).st_ino:
                return
        except OSError:
            pass
        os.close(self._lock)
        raise OutputError(f"{self.folder} is in use by another m3quant process: wait for it, or stop it first.")

    def _check_planned(self, wanted: frozenset[str]) -> None:
        coming = {stay.shard for stay in self.plan.stays[self._begun :]} | self._here.keys()
        if lost := wanted - coming:
            raise RuntimeError(f"{min(lost)} is read in a step that was not said to read it")

    def _tell_stall(self, wanted: frozenset[str], told: float) -> float:
        """Say at most every STALL_SECONDS that nothing comes; when it was last said."""
        now = time.monotonic()
        in_flight = sorted((wanted & self._here.keys()) - self._stamps.keys())
        if not in_flight or now - max(told, self._moved) < STALL_SECONDS:
            return told
        self._say(f"waiting for {in_flight[0]}: no data for {now - self._moved:.0f} s")
        return now

    def _next(self) -> Stay | None:
        """Begin the next stay, if there is room and its shard's last stay is over."""
        while self._begun < len(self.plan.stays):
            stay = self.plan.stays[self._begun]
            if stay.last >= self._done:
                size = self.plan.sizes[stay.shard]
                full = self.plan.budget is not None and self._on_disk + size > self.plan.budget
                if full or stay.shard in self._here:
                    return None
                self._here[stay.shard] = stay
                self._on_disk += size
            self._begun += 1
            if stay.last >= self._done:
                return stay
        return None

    def _work(self) -> None:
        """A fetching thread. Its error is raised by every `reading`."""
        try:
            while (stay := self._take()) is not None:
                self._bring(stay)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take(self) -> Stay | None:
        """What is to be fetched next, once there is room; None when there is nothing more to do."""
        with self._changed:
            while not self._left and self._error is None:
                if self._waiting:
                    return self._waiting.popleft()
                if (stay := self._next()) is not None:
                    return stay
                if self._begun == len(self.plan.stays):
                    return None
                self._changed.wait(POLL_SECONDS)
        return None

    def _bring(self, stay: Stay) -> None:
        stamp = self._fetch(stay.shard)
        with self._changed:
            self._stamps[stay.shard] = stamp
            self._drop_idle()

    def _drop_idle(self) -> None:
        """Remove whole shards whose stay is over; somebody who ran ahead may still be reading one for a later step."""
        for shard in [s for s, stay in self._here.items() if stay.last < self._done and s in self._stamps]:
            if not self._read[shard]:
                (self.folder / shard).unlink(missing_ok=True)
                del self._stamps[shard], self._here[shard]
                self._on_disk -= self.plan.sizes[shard]
        self._changed.notify_all()

    def _remove_but(self, shards: set[str]) -> None:
        """What an earlier run left and this one does not begin with, unfinished files among it."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in shards:
                path.unlink()
