"""Work in processes of its own, which do not share an interpreter with what goes on beside it: downloads and uploads.

An HTTP client in Python holds the interpreter for about a second a gigabyte. However many threads carry data, one process then moves less
than a gigabyte a second, and a conversion beside them both slows them and is slowed. Here each job has a process, started when it is first
wanted and used again:

    python -P -m m3quant.running.workers FD    the work comes on stdin, then jobs; counts, values and errors go to FD

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
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import Any, BinaryIO, Concatenate, Generic, ParamSpec, Self, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")

# How a job tells its counts (bytes that have come).
Tell = Callable[[int], None]
# Starting a process takes about a second of a core, which fewer bytes than these do not win back.
WORTH_BYTES = 4 * 10**9
# What the C library (glibc) keeps of freed memory, in bytes. huggingface_hub collects every 10 MB that come in a block of its own: handed
# back to the system and had anew each time, with its pages cleared, that took a third of a download's time.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
STDERR = 2  # the descriptor, to which whatever a library prints goes
TOLD, RETURNED, RAISED = "told", "returned", "raised"


class WorkerLost(ConnectionError):
    """The process of a job ended before the job did. code: its exit code, minus the signal that killed it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a process ended with {code}")
        self.code = code


class WorkFailed(Exception):
    """An error that cannot be pickled, in words. Of no kind that means something: who reads kinds would take it for another failure."""


class WorkersEnded(Exception):
    """A job that came, or was not done, when the `with` of its processes ended."""


class Workers(Generic[P, R]):
    """`work` on any threads, each call in a process. Use it in a `with`: at its end every process is gone.

    work: picklable; each process has a copy of it, made when its first job comes. It is called with `tell`, which may be called from any thread,
    and the picklable arguments of `run`.
    """

    def __init__(self, work: Callable[Concatenate[Tell, P], R]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Kill all processes. A job under way raises WorkersEnded, and so does each that comes."""
        with self._lock:
            self._over = True
            for process in self._all:
                process.kill()
            for process in self._idle:  # the others are in `run`, which ends them
                process.end()
            self._idle.clear()

    def run(self, told: Tell, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """`work(tell, *args, **kwargs)`, what it tells given to `told`. Raises what the work raises, WorkerLost if its process
        died, and WorkersEnded. An exception of `told` ends the process that tells."""
        process = self._take()
        try:
            kind, value = process.run((args, kwargs), told)
        except WorkerLost:
            if self._over:
                raise WorkersEnded("the processes have ended") from None
            raise
        except BaseException:
            process.kill()
            raise
        finally:
            with self._lock:
                if process.lives and not self._over:
                    self._idle.append(process)
                else:
                    process.end()
                    self._all.discard(process)
        if kind == RAISED:
            raise value
        return cast(R, value)

    def _take(self) -> _Process:
        with self._lock:
            if self._over:
                raise WorkersEnded("the processes have ended")
            while self._idle:
                process = self._idle.pop()
                if process.lives:
                    return process
                process.end()  # the system took it for want of memory, say: no job is lost by that
                self._all.discard(process)
            process = _Process(self._work)
            self._all.add(process)
            return process


@contextmanager
def deaf() -> Iterator[None]:
    """A process that this thread starts in the block never gets the signals that stop a run.

    A terminal, `timeout` and a scheduler send them to every process, and what they stop is for the first to decide: the others end with it.
    A process has the mask of the thread that starts it from its first instant on, also while Python loads.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    """One process that does one job at a time."""

    def __init__(self, work: Any) -> None:
        # What is importable here is importable there, and nothing else: without -P, whatever lies in the folder at hand would come first.
        environment = {**KEPT_MEMORY, **os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        mine, theirs = os.pipe()  # of its own, because what Python loads at its start may print
        try:
            with deaf():
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
        self._work = work  # until it is told

    def run(self, job: Any, told: Tell) -> tuple[str, Any]:
        """How the job ended (RETURNED or RAISED), and with what. Raises WorkerLost, and what `told` raises."""
        if self._work is not None:
            self._say(self._work)
            self._work = None
        self._say(job)
        while (answer := self._hear())[0] == TOLD:
            told(answer[1])
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

    def _say(self, what: Any) -> None:
        message = pickle.dumps(what)  # a job that cannot be sent raises here, with nothing sent
        try:
            self._to.write(message)
            self._to.flush()
        except BrokenPipeError:
            raise WorkerLost(self.kill()) from None

    def _hear(self) -> tuple[str, Any]:
        try:
            kind, value = pickle.load(self._from)
        except (EOFError, pickle.UnpicklingError):
            raise WorkerLost(self.kill()) from None
        return kind, value


def portable(error: Exception) -> Exception:
    """The error as another process can have it: itself, or a WorkFailed."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return WorkFailed(f"{type(error).__name__}: {error}")
    return error


def serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    """Do what is asked for, until `jobs` ends."""
    work = pickle.load(jobs)
    alone = threading.Lock()  # counts may be told from any thread of a library
    at = 0  # the number of the job

    def send(message: bytes) -> None:
        try:
            answers.write(message)
            answers.flush()
        except BrokenPipeError:  # nobody wants it: what `end_with_reader` is about to see
            os._exit(0)

    def tell(job: int, count: int) -> None:
        message = pickle.dumps((TOLD, count))
        with alone:
            if job == at:  # what a thread tells when its job is over would count for the next
                send(message)

    while True:
        try:
            args, kwargs = pickle.load(jobs)
        except EOFError:
            return
        try:
            last = pickle.dumps((RETURNED, work(partial(tell, at), *args, **kwargs)))
        except Exception as error:
            last = pickle.dumps((RAISED, portable(error)))
        with alone:
            at += 1
            send(last)


def end_with_reader(answers: int) -> None:
    """Ends the process once the one that wanted its answers is gone, also while a job stands still."""
    poll = select.poll()
    poll.register(answers, 0)  # an error is told without being asked for: the other end of the pipe is closed
    poll.poll()
    os._exit(0)


def main(answers: int) -> None:
    threading.Thread(target=end_with_reader, args=(answers,), daemon=True).start()
    with os.fdopen(answers, "wb") as file:
        serve(sys.stdin.buffer, file)


if __name__ == "__main__":
    # By its name, as the other process knows it: of `__main__` nothing could be pickled.
    import_module(__spec__.name).main(int(sys.argv[1]))
