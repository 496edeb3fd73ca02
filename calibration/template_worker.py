"""Renders chats through chat templates; started by `template`, and imports nothing of m3quant.

Both ways: 8 bytes little-endian length, then JSON. {"template", "special_tokens"} begins a session, in a child, so that
transformers is imported once for all of them; in it come pairs of {"cpu_seconds", "memory_bytes", "output_characters"} and
{"messages", "tools"}, each answered by {"text"} or {"error"}, and {} to end it. Where the kernel ends the child, this process
answers {"signal"} or {"exit"} in its place and waits for the next session.
"""

import json
import os
import resource
import signal
from typing import Any

REQUESTS = 0
ERROR_CHARACTERS = 300


def read() -> Any:
    """The next message, or None at the end of the input. Unbuffered: the child and its parent read from one pipe."""
    size = int.from_bytes(read_bytes(8), "little")
    return json.loads(read_bytes(size).decode("utf-8", "surrogatepass")) if size else None


def read_bytes(size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := os.read(REQUESTS, size - len(data))):
        data += piece
    return bytes(data)


def write(answers: int, message: bytes) -> None:
    view = memoryview(len(message).to_bytes(8, "little") + message)
    while view:
        view = view[os.write(answers, view) :]


def address_space() -> int:
    """Bytes of virtual memory that this process has now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def answer(tokenizer: Any, special: dict[str, Any], bounds: dict[str, Any], chat: dict[str, Any]) -> bytes:
    try:
        text = tokenizer.apply_chat_template(chat["messages"], tools=chat["tools"], tokenize=False, **special)
        size, limit = len(text), bounds["output_characters"]
        reply = {"text": text} if size <= limit else {"error": f"it wrote {size:,} characters, more than {limit:,}"}
    except MemoryError:
        reply = {"error": f"it needs more than {bounds['memory_bytes']:,} bytes of memory"}
    except Exception as error:  # what a template raises is its author's to choose
        reply = {"error": str(error)[:ERROR_CHARACTERS] or type(error).__name__}
    return json.dumps(reply).encode()


def session(tokenizer: Any, special: dict[str, Any], answers: int) -> None:
    """Answer requests until one is empty."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    start = address_space()
    while bounds := read():
        chat = read()
        limit = start + bounds["memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        # The default action of SIGPROF ends the process, also inside one long operation of the interpreter.
        signal.setitimer(signal.ITIMER_PROF, bounds["cpu_seconds"])
        data = answer(tokenizer, special, bounds, chat)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(answers, data)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the parent, whose end closes our input
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    while (first := read()) is not None:
        child = os.fork()
        if child == 0:
            try:
                session(PreTrainedTokenizerBase(chat_template=first["template"]), first["special_tokens"], answers)
            except BaseException:
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            write(answers, json.dumps({"signal": os.WTERMSIG(status)}).encode())
        elif status:
            write(answers, json.dumps({"exit": os.WEXITSTATUS(status)}).encode())


if __name__ == "__main__":
    main()
