"""Work on large bodies in a separate process, so that the event loop and its requests do not wait for it.

A thread would not do: the parsers are C code that keeps the interpreter's lock for as long as the body is long. The process is started with the first
large body, works on one at a time, knows a few pure functions and nothing else, and is replaced when it dies or takes too long.
"""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from .clamp import with_number
from .prefix import block_chain
from .reading import read_body, read_short, read_whole
from .replies import bad_request

ASIDE_BYTES = 256 * 1024  # from here on: about 5 ms of json.loads for the densest bodies
LONGEST_S = 60.0
FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (read_body, read_short, read_whole, with_number, block_chain)
}
PROGRAM = "from m3quant.runtime.guard.aside import work; work({descriptor})"


class Aside:
    def __init__(self, limit_s: float = LONGEST_S) -> None:
        self.limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, in the process. Raises what the function raises. One call at a time: the caller sees to that."""
        call = pickle.dumps((function.__name__, arguments), protocol=5)
        answer = await asyncio.to_thread(self._ask, call)
        good, value = pickle.loads(answer)
        if not good:
            raise value
        return value

    def _ask(self, call: bytes) -> bytes:
        for _ in range(2):  # a process that someone ended meanwhile is replaced once
            process, pipe = self._started()
            began = time.monotonic()
            late = threading.Timer(self.limit_s, process.kill)  # sending waits too, and for ever where nobody reads
            late.start()
            try:
                pipe.send_bytes(call)
                return pipe.recv_bytes()
            except (OSError, EOFError):
                self.close()
                if time.monotonic() - began >= self.limit_s:
                    raise bad_request(f"The body takes more than {self.limit_s:g} seconds to read.", None) from None
            finally:
                late.cancel()
        raise bad_request("The body needs more memory to read than there is.", None)

    def _started(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._process is None or self._pipe is None:
            self._pipe, theirs = Pipe()
            command = [sys.executable, "-c", PROGRAM.format(descriptor=theirs.fileno())]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
            theirs.close()
        return self._process, self._pipe

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._pipe = self._process = None


def work(descriptor: int) -> None:
    """The process: answers until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes the pipe when it is done
    gc.disable()  # parsed JSON has no cycles, and looking for some would cost more than parsing it
    pipe = Connection(descriptor)
    while True:
        try:
            name, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, FUNCTIONS[name](*arguments))
        except Exception as error:
            answer = (False, error)
        pipe.send_bytes(pickle.dumps(answer, protocol=5))
        del answer, arguments
