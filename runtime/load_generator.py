"""The engine's own load generator as one process that makes a run after another."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..engines.installed import SAFE_PATH
from .launch import open_log

TAIL_BYTES = 16_384  # of the log, for its last line


class LoadGenerator:
    """A process in a session of its own, its output added to `log`; ended with all its processes.

    command: of a program that takes arguments as lines of JSON, makes a run with each, and writes its exit code as a line to the descriptor
    that it is given as its last argument. Raises OptionError for a log that cannot be written.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        file = open_log(log, "ab")
        self._answers, theirs = os.pipe()
        with file, os.fdopen(theirs, "wb"):
            self._process = subprocess.Popen(
                [*command, str(theirs)], env={**os.environ, **SAFE_PATH}, pass_fds=[theirs], stdin=subprocess.PIPE, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._answers)
        assert self._process.stdin is not None
        with suppress(OSError):  # a line that nobody reads any more
            self._process.stdin.close()

    def begin(self, arguments: list[str]) -> None:
        """Start a run; the one before has ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `code` says so
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self._process.stdin.flush()

    def code(self, wait_s: float) -> int | None:
        """The run's exit code, or that of a process that ended before; None if it still runs after `wait_s` seconds."""
        if not select.select([self._answers], [], [], wait_s)[0]:
            return None
        answer = os.read(self._answers, 64)  # a number and its line's end, written at once
        return int(answer) if answer else self._process.wait() or 1

    def tail(self) -> str:
        """The end of what it wrote."""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read(TAIL_BYTES).decode("utf-8", "replace")
