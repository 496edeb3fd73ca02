"""A checkpoint's chat template, rendered in a process of its own with limits on time, memory and output.

A template is a program written by the checkpoint's author. Jinja's sandbox keeps it from the machine's files and from Python, but
not from loops inside loops or from texts of gigabytes, some of which are single operations in C that no check in this
process could interrupt. So it runs in `template_worker`, which the kernel ends when its time is used up.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3quant.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A template with tools takes a few milliseconds a record; a record of 10 MB, a second.
CPU_SECONDS = 10.0
CPU_SECONDS_PER_MB = 1.0
MEMORY_BYTES = 2**30
# Jinja and the values that it makes of a record, beyond what the worker has when it begins.
MEMORY_PER_INPUT_BYTE = 64
# The template's own text, the markers around messages, and tools as JSON with every character escaped.
OUTPUT_CHARACTERS = 4 * 2**20
OUTPUT_PER_INPUT_BYTE = 16
ESCAPED_BYTES = 12  # a character outside the BMP as two \\uXXXX
WORKER = Path(__file__).with_name("template_worker.py")
STATUS = Path("/proc/self/statm")  # by which the worker learns of its memory, which the kernel then limits


class TemplateError(Exception):
    """The template raised, or went beyond a bound: the message says which."""


class Renderer:
    """The worker process, and in it a session for the template that was last asked for."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        if not STATUS.exists():
            raise CalibrationError(
                "a checkpoint's chat template runs in a process whose memory Linux limits, and this system cannot: run this on Linux "
                "(in a container, or under WSL), or give text without chats (--calibration FILE), or a recipe without text (--to int4, fp8)."
            )
        self.cpu_seconds = cpu_seconds
        self._session: tuple[Any, dict[str, Any]] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        # -P: the folder of the worker's file, whose modules have names of other packages, stays off its path.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )

    def render(
        self, template: Any, special_tokens: dict[str, Any], messages: list[Any], tools: list[Any] | None
    ) -> str:
        """The template's text for one chat. Raises TemplateError; the next call may be for the same template or another."""
        wanted = (template, special_tokens)
        if self._session != wanted:
            if self._session is not None:
                self._send({})
            self._send({"template": template, "special_tokens": special_tokens})
            self._session = wanted
        body = json.dumps({"messages": messages, "tools": tools})
        seconds = self.cpu_seconds + len(body) / 1e6 * CPU_SECONDS_PER_MB
        limit = OUTPUT_CHARACTERS + len(body) * OUTPUT_PER_INPUT_BYTE
        memory = MEMORY_BYTES + len(body) * MEMORY_PER_INPUT_BYTE
        self._send({"cpu_seconds": seconds, "memory_bytes": memory, "output_characters": limit})
        self._send(body)
        answer = self._receive(limit * ESCAPED_BYTES + 1024)
        if "text" in answer:
            return str(answer["text"])
        if "error" in answer:
            raise TemplateError(answer["error"])
        self._session = None
        if answer.get("signal") == signal.SIGPROF:
            raise TemplateError(f"it used more than {seconds:.1f} s of processor time for one record")
        raise TemplateError(f"the process that renders it was ended ({answer})")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still to be written has no reader any more
                    pipe.close()

    def _send(self, value: Any) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(len(data).to_bytes(8, "little") + data)
            self._process.stdin.flush()
        except OSError:
            raise self._gone() from None

    def _receive(self, limit: int) -> dict[str, Any]:
        assert self._process.stdout is not None
        size = int.from_bytes(self._process.stdout.read(8), "little")
        if size == 0:
            raise self._gone()
        if size > limit:
            self.close()
            raise TemplateError(f"its text has {size:,} bytes")
        answer: dict[str, Any] = json.loads(self._process.stdout.read(size))
        return answer

    def _gone(self) -> TemplateError:
        code = self._process.wait()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 500))
        tail = " ".join(self._errors.read().decode("utf-8", errors="replace").split())
        return TemplateError(f"the process that renders it ended with code {code}: {tail[-300:]}")


_lock = threading.Lock()
_worker: tuple[int, Renderer] | None = None  # with the process that started it: a forked one starts its own


def rendered_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Any], tools: list[Any] | None) -> str:
    """What `tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)` gives. Raises TemplateError.

    The worker is started once, which takes the seconds of importing transformers, and kept.
    """
    global _worker
    special = {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}
    with _lock:
        if _worker is None or _worker[0] != os.getpid() or not _worker[1].alive:
            _worker = (os.getpid(), Renderer())
            atexit.register(_worker[1].close)
        return _worker[1].render(tokenizer.chat_template, special, messages, tools)


def _plain(value: Any) -> Any:
    return [str(v) for v in value] if isinstance(value, list | tuple) else str(value)
