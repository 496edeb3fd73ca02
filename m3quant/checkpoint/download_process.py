"""Downloads of one store in processes of their own, which do not share an interpreter with the work beside them.

A client in Python holds the interpreter for about a second a gigabyte. However many threads fetch, one process then gets less than a
gigabyte a second, and a conversion beside them both slows them and is slowed. Here each download has a process, started when it is first
wanted and used again:

    python -P -m m3quant.checkpoint.download_process FD    the store comes on stdin, then jobs; counts, errors and ends go to FD

Nothing is lost if one dies: what it was at counts as a lost connection. None outlives the process that started it.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .remote import Download, RemoteStore, TransientError

# Starting them takes about a second of a core each, which a small checkpoint does not win back.
WORTH_BYTES = 4 * 10**9
STDERR = 2  # the descriptor, to which whatever a library prints goes


@contextmanager
def downloads(store: RemoteStore, count: int) -> Iterator[Download]:
    """How `count` bytes of a store are best downloaded while the block runs."""
    if not store.in_processes or count < WORTH_BYTES:
        yield store.download
        return
    with DownloadProcesses(store) as processes:
        yield processes.download


class DownloadProcesses:
    """`download` as that of the store, on any threads. Use it in a `with`: at its end every process is gone."""

    def __init__(self, store: RemoteStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._over = False

    def __enter__(self) -> DownloadProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._over = True
            for process in self._all:
                process.kill()
            for process in self._idle:  # the others are in `download`, which ends them
                process.end()

    def download(self, name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        """As `RemoteStore.download`. An exception of `came` ends the process that tells of bytes."""
        process = self._take()
        try:
            failure = process.run((name, folder, fresh), came)
        except BaseException:
            process.kill()
            raise
        finally:
            with self._lock:
                if process.lives:
                    self._idle.append(process)
                else:
                    process.end()
                    self._all.discard(process)
        if failure is not None:
            raise failure

    def _take(self) -> _Process:
        with self._lock:
            if self._over:
                raise TransientError("Downloads have ended.", "downloads have ended")
            if self._idle:
                return self._idle.pop()
            process = _Process(self._store)
            self._all.add(process)
            return process


class _Process:
    """One process that downloads one file at a time."""

    def __init__(self, store: RemoteStore) -> None:
        # What is importable here is importable there, and nothing else: without -P, whatever lies in the folder at hand would come first.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        mine, theirs = os.pipe()  # of its own, because what Python loads at its start may print
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name, str(theirs)], env=environment, stdin=subprocess.PIPE, stdout=STDERR, pass_fds=(theirs,)
            )  # fmt: skip
        except BaseException:
            os.close(mine)
            raise
        finally:
            os.close(theirs)
        assert self._process.stdin is not None
        self._to, self._from = self._process.stdin, os.fdopen(mine, "rb")
        self._store: RemoteStore | None = store  # until it is told

    def run(self, job: tuple[str, Path, bool], came: Callable[[int], None]) -> Exception | None:
        """Download one file; the failure that `RemoteStore.download` would have raised. Raises what `came` raises."""
        try:
            if self._store is not None:
                self._tell(self._store)
                self._store = None
            self._tell(job)
            while isinstance(answer := pickle.load(self._from), int):
                came(answer)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            return lost(self.kill())
        assert answer is None or isinstance(answer, Exception)
        return answer

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> int:
        """Its exit code; that of its own end, if it has come to one."""
        self._process.kill()
        return self._process.wait()

    def end(self) -> None:
        """Kill it, and close the pipes. Only where `run` does not read from them."""
        self.kill()
        self._from.close()
        with suppress(BrokenPipeError):  # of what it was not told any more
            self._to.close()

    def _tell(self, what: Any) -> None:
        pickle.dump(what, self._to)
        self._to.flush()


def lost(code: int) -> Exception:
    """The failure of a download whose process ended with this exit code, minus the signal that killed it."""
    return TransientError(f"The process that downloaded ended with {code}. Try again.", f"a download ended with {code}")


def portable(error: Exception) -> Exception:
    """The error as another process can have it: itself, or its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    """Download what is asked for, until `jobs` ends."""
    store: RemoteStore = pickle.load(jobs)
    alone = threading.Lock()  # bytes may be told from any thread of a library

    def tell(answer: int | Exception | None) -> None:
        with alone:
            pickle.dump(answer, answers)
            answers.flush()

    while True:
        try:
            name, folder, fresh = pickle.load(jobs)
        except EOFError:
            return
        failure: Exception | None = None
        try:
            store.download(name, folder, tell, fresh)
        except Exception as error:
            failure = portable(error)
        tell(failure)


def end_with_reader(answers: int) -> None:
    """Ends the process once the one that wanted its answers is gone, also while a download stands still."""
    poll = select.poll()
    poll.register(answers, 0)  # an error is told without being asked for: the other end of the pipe is closed
    poll.poll()
    os._exit(0)


def main(answers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # signals are for the process that has the terminal
    threading.Thread(target=end_with_reader, args=(answers,), daemon=True).start()
    with os.fdopen(answers, "wb") as file:
        serve(sys.stdin.buffer, file)


if __name__ == "__main__":
    main(int(sys.argv[1]))
