"""An engine as a child process: in a session of its own, its output kept and shown, ended with all its workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import httpx2

from ..errors import OptionError, ServeError

POLL_S = 0.5
KEPT_LINES = 20_000  # of the engine's output in memory: its start-up, and later what came before its end
KILL_GRACE_S = 15.0  # beyond the engine's own shutdown timeout, before its processes are killed


def check_port(host: str, port: int) -> None:
    """Raise OptionError if something listens there already or the address is not of this machine, before minutes of loading."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OptionError(
                f"{host}:{port} cannot be used ({error.strerror}): choose another --port or --host."
            ) from None


def open_log(log: Path, mode: str) -> IO[Any]:
    """The file, its folder made; text is UTF-8. Raises OptionError where it cannot be written."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open(mode, encoding=None if "b" in mode else "utf-8")
    except OSError as error:
        raise OptionError(f"the log {log} cannot be written: {error.strerror}; name another with --log.") from None


class EngineProcess:
    """A started engine. `text` is its log so far, of which the last KEPT_LINES at least."""

    def __init__(
        self,
        command: list[str],
        env: Mapping[str, str],
        log: Path,
        echo: Callable[[str], None] | None,
        reason: Callable[[str], str],
    ) -> None:
        """Start. reason: what a log says of an end, as one clause. Raises ServeError where the command does not exist, OptionError where the log cannot be written."""
        self.log, self.echo, self.reason = log, echo, reason
        self._parts: list[str] = []
        self._file = open_log(log, "w")
        try:
            self.process = subprocess.Popen(
                command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True, text=True, encoding="utf-8", errors="replace",
            )  # fmt: skip
        except OSError as error:
            self._file.close()
            raise ServeError(f"{command[0]} cannot be started: {error.strerror}.") from None
        self._reader = threading.Thread(target=self._tee, daemon=True)
        self._reader.start()

    def _tee(self) -> None:
        assert self.process.stdout is not None
        outlets: list[Callable[[str], None]] = [self._keep] if self.echo is None else [self._keep, self.echo]
        for line in self.process.stdout:
            self._parts.append(line)
            if len(self._parts) > 2 * KEPT_LINES:  # an engine that serves for months says something for every request
                del self._parts[:-KEPT_LINES]
            for outlet in list(outlets):
                try:
                    outlet(line.rstrip("\n"))
                except OSError as error:  # read on: an engine whose pipe is full waits, and so does every request
                    outlets.remove(outlet)
                    lost = (
                        f"the log {self.log} ends here"
                        if outlet == self._keep
                        else "the engine's output is shown no more"
                    )
                    with suppress(OSError):
                        print(f"m3quant: {lost}: {error.strerror}", file=sys.stderr)
        with suppress(OSError):  # reported above
            self._file.close()

    def _keep(self, line: str) -> None:
        self._file.write(f"{line}\n")
        self._file.flush()

    @property
    def text(self) -> str:
        return "".join(list(self._parts))

    def wait_ready(self, url: str, timeout_s: float, stopped: threading.Event) -> bool:
        """True once `url` answers 200; False if `stopped` was set meanwhile. Raises ServeError when the engine ends or time is up."""
        deadline = time.monotonic() + timeout_s
        while not stopped.is_set():
            code = self.process.poll()
            if code is not None:
                self._reader.join(timeout=5)
                raise ServeError(
                    f"the engine ended with exit code {code} before it was ready: {self.reason(self.text)}. Log: {self.log}"
                )
            if time.monotonic() > deadline:
                raise ServeError(
                    f"the engine was not ready after {timeout_s:.0f} s: {self.reason(self.text)}. Log: {self.log}"
                )
            # Without the environment: http_proxy is for other machines than this one.
            with suppress(httpx2.HTTPError), httpx2.stream("GET", url, timeout=5, trust_env=False) as answer:
                if answer.status_code == 200:
                    return True
            stopped.wait(POLL_S)
        return False

    def wait(self, stopped: threading.Event) -> int | None:
        """The engine's exit code, or None once `stopped` is set."""
        while not stopped.is_set():
            code = self.process.poll()
            if code is not None:
                self._reader.join(timeout=5)
                return code
            stopped.wait(POLL_S)
        return None

    def stop(self, grace_s: float) -> int:
        """SIGTERM to the engine, which drains; after `grace_s` all its processes are killed. Returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=grace_s + KILL_GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):  # workers that outlived the server, or the server itself
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._reader.join(timeout=5)
        return self.process.returncode
