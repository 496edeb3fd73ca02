"""Time against size for every parser that the guard runs on a body, on bodies made to be slow for it.

    python -m tests.benchmarks.guard_parsers [--largest 32000000] [--json FILE]

Each case is run at sizes that double. `growth` is the factor by which the time grew from the size before: 2 is linear, 4 quadratic. Where the
guard moves a body of that size to its other process, what the event loop sees is the last table: the longest pause of a loop that answers
other requests meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3quant.runtime.guard.clamp import with_number
from m3quant.runtime.guard.demand import Unreadable
from m3quant.runtime.guard.idspan import IdSpan, shorten
from m3quant.runtime.guard.prefix import block_chain
from m3quant.runtime.guard.reading import query_bound, read_body
from m3quant.runtime.guard.replies import Refusal
from tests.support.runtime.guard_app import FakeEngine, completion, make_guard, start

SMALLEST = 125_000
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def repeated(piece: str, size: int, head: str = "{", tail: str = "}") -> bytes:
    """About `size` bytes of the piece again and again, between head and tail; commas that are left over are taken off."""
    count = max(1, (size - len(head) - len(tail)) // len(piece))
    return (head + (piece * count).rstrip(",") + tail).encode()


def bodies() -> dict[str, Callable[[int], bytes]]:
    return {
        "unclosed prompts": lambda size: repeated('"prompt":[', size, '{"a":', "]}"),
        "prompts and digits": lambda size: repeated('"prompt":[1,1,1,', size, '{"a":', "]}"),
        "spaces after names": lambda size: repeated('"prompt"' + " " * 500, size),
        "ids and no end": lambda size: repeated("1,", size, '{"prompt":[', ""),
        "ids": lambda size: repeated("1,", size, '{"prompt":[', "]}"),
        "small arrays": lambda size: repeated("[],", size, '{"prompt":[', "]}"),
        "texts": lambda size: repeated('"a",', size, '{"prompt":[', "]}"),
        "messages": lambda size: repeated('{"role":"user","content":"a"},', size, '{"messages":[', "]}"),
        "content parts": lambda size: repeated(
            '{"type":"x"},', size, '{"messages":[{"role":"user","content":[', "]}]}"
        ),
        "duplicate limits": lambda size: repeated('"max_tokens":null,', size),
        "one long text": lambda size: repeated("é", size // 2, '{"prompt":"', '"}'),
        "escapes": lambda size: repeated("\\u00e9", size, '{"prompt":"', '"}'),
        "long numbers": lambda size: repeated("9" * 4299 + ",", size, '{"n":[', "]}"),
        "deep": lambda size: repeated("[", size, '{"prompt":', ""),
        "tools": lambda size: repeated('{"a":{"type":"image"}},', size, '{"messages":[{}],"tools":[', "]}"),
        # What all prompts share, and as many prompts as one request may have; of a size that grows, the shared part grows.
        "empty conversations": lambda size: repeated(
            "[{}],", min(size, 5 * 8192), '{"messages":[', '],"x":"' + "x" * size + '"}'
        ),
        "conversations, tools": lambda size: repeated(
            '[{"role":"user","content":"a"}],', 32 * 1000, '{"messages":[', '],"tools":["' + "x" * size + '"]}'
        ),
        "texts, model": lambda size: repeated('"a",', 4 * 1000, '{"prompt":[', '],"model":"' + "x" * size + '"}'),
        "texts, suffix": lambda size: repeated('"a",', 4 * 8000, '{"prompt":[', '],"suffix":"' + "x" * size + '"}'),
        "embeddings": lambda size: repeated("1,", size, '{"prompt_embeds":[', "]}"),
        "ids of another": lambda size: repeated(
            "1,", size, '{"messages":[{"role":"user","content":"a"}],"tools":[{"prompt":[', "]}]}"
        ),
    }


def parsers() -> dict[str, Callable[[bytes], Any]]:
    return {
        "shorten": lambda body: shorten(body, (b'"prompt"',)),
        "read_body (completion)": lambda body: read_body(COMPLETIONS, body, False),
        "read_body (chat)": lambda body: read_body(CHAT, body, False),
        "read_body (messages)": lambda body: read_body("/v1/messages", body, False),
        "with_number": lambda body: with_number(body, "max_tokens", 7),
        "query_bound": query_bound,
        "block_chain": lambda body: block_chain(IdSpan(body[11:-2], 0), 16, ""),
    }


def timed(parser: Callable[[bytes], Any], body: bytes) -> float:
    began = time.process_time()
    with contextlib.suppress(Unreadable, Refusal, ValueError):
        parser(body)
    return time.process_time() - began


def curve(parser: Callable[[bytes], Any], make: Callable[[int], bytes], largest: int) -> dict[int, float]:
    """Seconds by size, the best of three: the least disturbed by other work."""
    found, size = {}, SMALLEST
    while size <= largest:
        body = make(size)
        found[len(body)] = min(timed(parser, body) for _ in range(3))
        size *= 2
    return found


def growth(seconds: dict[int, float]) -> float:
    """The factor a doubling costs, over the last three doublings; 2 is linear."""
    took = list(seconds.values())
    steps = min(3, len(took) - 1)
    return (took[-1] / max(took[-1 - steps], 1e-6)) ** (1 / steps)


async def longest_pause(make: Callable[[int], bytes], size: int) -> tuple[float, float]:
    """Seconds that the event loop stood still while the guard dealt with one such body, and until that was done."""
    guard = make_guard(FakeEngine(), oversize="clamp", max_model_len=512)
    first = start(guard, COMPLETIONS, repeated('"a",', 300_000, '{"x":[', '],"prompt":"a"}'))
    assert first.task is not None
    await first.task  # the other process is there
    body, pauses = make(size), [0.0]
    call = start(guard, COMPLETIONS, body)
    assert call.task is not None
    began = last = time.perf_counter()
    while not call.task.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        pauses.append(now - last - 0.001)
        last = now
    other = start(guard, COMPLETIONS, completion(5))
    assert other.task is not None
    await other.task
    guard.aside.close()
    return max(pauses), last - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=32_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record: dict[str, Any] = {"versions": {"python": platform.python_version(), "machine": platform.machine()}}
    gc.disable()  # as in the guard's other process
    curves, pauses = record.setdefault("seconds", {}), record.setdefault("loop", {})
    for name, parse in parsers().items():
        for case, make in bodies().items():
            seconds = curve(parse, make, options.largest)
            curves[f"{name}: {case}"] = {str(size): round(took, 6) for size, took in seconds.items()}
            size, took = list(seconds.items())[-1]
            print(f"{name:24} {case:20} {size / 1e6:6.2f} MB {took:8.4f} s  growth {growth(seconds):.2f}", flush=True)
    for case, make in bodies().items():
        pause, until = asyncio.run(longest_pause(make, min(options.largest, 8_000_000)))
        pauses[case] = {"longest_pause_s": round(pause, 4), "until_s": round(until, 3)}
        print(f"loop {case:20} longest pause {pause:.4f} s, done after {until:.3f} s", flush=True)
    record["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
