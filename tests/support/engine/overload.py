"""A bounded overload for an OpenAI-compatible server: far more tokens asked for than its KV cache holds, by clients some of which hang up.

Every request is recorded with how it ended. Sockets and HTTP are spelled out (asyncio streams, chunked bodies) because the point is to hang
up at chosen moments, which client libraries hide.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

WORDS = [
    "the",
    "and",
    "of",
    "to",
    "her",
    "was",
    "in",
    "she",
    "had",
    "not",
    "that",
    "it",
    "be",
    "as",
    "for",
    "with",
    "his",
    "you",
    "he",
    "is",
    "but",
    "him",
    "at",
    "all",
]


@dataclass
class Outcome:
    """`kind`: success, 400, 429, another status, hung_up (we did), no_answer (the server did not, in time), broken."""

    kind: str
    asked_tokens: int
    seconds: float
    first_byte_s: float | None = None
    streamed: bool = False
    short: bool = False  # succeeded with fewer tokens than asked for, although asked to ignore the end token


@dataclass
class Load:
    """What to send. `too_long` is the share of requests whose prompt and output together pass the context."""

    clients: int = 80
    seconds: float = 30.0
    patience_s: float = 60.0
    prompt_tokens: tuple[tuple[float, int, int], ...] = ((0.5, 4, 60), (0.35, 60, 400), (0.15, 400, 650))
    output_tokens: tuple[int, int] = (16, 320)
    too_long: float = 0.05
    too_long_tokens: tuple[int, int] = (850, 1300)
    hang_up: float = 0.15
    longest_sleep_s: float = 2.0  # a client comes back after Retry-After, at most this, so that the pressure stays
    seed: int = 0


@dataclass
class Result:
    outcomes: list[Outcome] = field(default_factory=list)
    peak_asked_tokens: int = 0  # the most tokens asked for at one moment
    seconds: float = 0.0  # until the last request had ended

    def counts(self) -> dict[str, int]:
        return dict(sorted(Counter(outcome.kind for outcome in self.outcomes).items()))


async def overload(port: int, load: Load) -> Result:
    """Runs the load for its seconds, then waits for every request to end (each within its patience)."""
    result, open_tokens = Result(), [0]
    began = time.monotonic()
    deadline = began + load.seconds

    async def client(number: int) -> None:
        rng = random.Random(load.seed * 10_000 + number)
        while time.monotonic() < deadline:
            path, body, tokens = make_request(rng, load)
            hang_up = rng.uniform(0, 2.0) if rng.random() < load.hang_up else None
            open_tokens[0] += tokens
            result.peak_asked_tokens = max(result.peak_asked_tokens, open_tokens[0])
            outcome, retry_after = await send(port, path, body, tokens, hang_up, load.patience_s)
            open_tokens[0] -= tokens
            result.outcomes.append(outcome)
            if outcome.kind not in ("success", "hung_up"):
                await asyncio.sleep(min(retry_after, load.longest_sleep_s) * rng.uniform(0.5, 1.0))

    await asyncio.gather(*(client(number) for number in range(load.clients)))
    result.seconds = time.monotonic() - began
    return result


def make_request(rng: random.Random, load: Load) -> tuple[str, dict[str, Any], int]:
    low, high = load.output_tokens
    output = rng.randint(low, high)
    if rng.random() < load.too_long:
        prompt = rng.randint(*load.too_long_tokens)
    else:
        _, low, high = rng.choices(load.prompt_tokens, [share for share, _, _ in load.prompt_tokens])[0]
        prompt = rng.randint(low, high)
    shared = {"model": "tiny", "max_tokens": output, "ignore_eos": True, "stream": rng.random() < 0.7, "temperature": 0}
    if shared["stream"]:
        shared["stream_options"] = {"include_usage": True}
    kind = rng.random()
    if kind < 0.4:
        return (
            "/v1/completions",
            {**shared, "prompt": [rng.randrange(300, 2000) for _ in range(prompt)]},
            prompt + output,
        )
    text = " ".join(rng.choice(WORDS) for _ in range(prompt))
    if kind < 0.7:
        return "/v1/completions", {**shared, "prompt": text}, prompt + output
    return "/v1/chat/completions", {**shared, "messages": [{"role": "user", "content": text}]}, prompt + output


async def send(
    port: int, path: str, body: dict[str, Any], tokens: int, hang_up: float | None, patience_s: float
) -> tuple[Outcome, float]:
    """One request; hangs up after `hang_up` seconds if that is given and the answer is not complete by then."""
    began = time.monotonic()
    first: list[float] = []
    limit = patience_s if hang_up is None else hang_up
    try:
        async with asyncio.timeout(limit):
            status, headers, answer = await exchange(port, path, body, first)
    except TimeoutError:
        kind, retry_after, short = "no_answer" if hang_up is None else "hung_up", 0.0, False
    except (OSError, ValueError, asyncio.IncompleteReadError):
        kind, retry_after, short = "broken", 1.0, False
    else:
        retry_after = float(headers.get("retry-after", 1))
        short = status == 200 and generated(answer) < body["max_tokens"]
        kind = "success" if status == 200 else str(status)
    first_byte = first[0] - began if first else None
    return Outcome(kind, tokens, time.monotonic() - began, first_byte, bool(body["stream"]), short), retry_after


async def exchange(port: int, path: str, body: dict[str, Any], first: list[float]) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        headers = {}
        while line := (await reader.readuntil(b"\r\n")).decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if "content-length" in headers:
            answer = await reader.readexactly(int(headers["content-length"]))
            first.append(time.monotonic())
        else:
            answer = await read_chunks(reader, first)
        return status, headers, answer
    finally:
        writer.close()


async def read_chunks(reader: asyncio.StreamReader, first: list[float]) -> bytes:
    found = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        found.append(await reader.readexactly(size))
        if len(found) == 1:
            first.append(
                time.monotonic()
            )  # vLLM sends the headers of a stream at once, its first event with the first token
        await reader.readexactly(2)
    return b"".join(found)


def generated(answer: bytes) -> int:
    """completion_tokens of a plain answer, or of a stream's usage event. Raises ValueError when a stream lacks its end."""
    if not answer.startswith(b"data:"):
        return int(json.loads(answer)["usage"]["completion_tokens"])
    events = [event[6:] for event in answer.split(b"\n\n") if event.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise ValueError("the stream ended early")
    return int(json.loads(events[-2])["usage"]["completion_tokens"])
