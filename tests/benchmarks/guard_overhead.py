"""The guard's own time per request, without counting tokens: a short chat, and a 100,000-token prompt as text and as token ids.

    python -m tests.benchmarks.guard_overhead [--requests 300] [--json FILE]

Four cases around an application that answers at once: a chat of a hundred words, text (its tokenizer answers at once, so what is left is the guard), token ids, and
text with prefix_hits=count. Times are CPU time of the server's thread, so that other work on the machine does not count: that of the whole call, less
that of the application called alone with the same messages, less the time inside /tokenize.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.runtime.guard_app import make_guard

TOKENS = 100_000
WORDS = [
    "the",
    "house",
    "of",
    "a",
    "truth",
    "universally",
    "acknowledged",
    "that",
    "single",
    "man",
    "in",
    "want",
    "café",
    "“yes”",
]
LINE = 12  # words
CHAT = "chat of 100 words"


class Instant:
    """An application that reads the body and answers; its tokenizer returns a prepared answer and its time is kept apart."""

    def __init__(self) -> None:
        self.count = json.dumps({"count": TOKENS, "max_model_len": 200_000, "tokens": list(range(TOKENS))}).encode()
        self.tokenizing = 0.0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        answer = self.count if scope["path"] == "/tokenize" else b"{}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})


def text_prompt() -> str:
    rng = random.Random(0)
    return "\n".join(" ".join(rng.choice(WORDS) for _ in range(LINE)) for _ in range(TOKENS // LINE))


def body_of(case: str) -> bytes:
    if case == CHAT:
        content = " ".join(random.Random(0).choices(WORDS, k=100))
        return json.dumps(
            {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 100}
        ).encode()
    prompt: Any = list(range(TOKENS)) if case == "token ids" else text_prompt()
    body = {"model": "m", "prompt": prompt, "max_tokens": 100, "stream": True}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()  # as OpenAI's client writes it


async def call(app: Any, body: bytes, path: str = "/v1/completions") -> float:
    chunks = [body[at : at + 65536] for at in range(0, len(body), 65536)]  # as uvicorn delivers it
    messages = [
        {"type": "http.request", "body": chunk, "more_body": n + 1 < len(chunks)} for n, chunk in enumerate(chunks)
    ]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    cache = SimpleNamespace(enable_prefix_caching=True)
    server = SimpleNamespace(state=SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache)))
    scope = {
        "app": server,
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [],
        "query_string": b"",
    }
    began = time.thread_time()
    await app(scope, receive, send)
    return time.thread_time() - began


async def measure(case: str, requests: int) -> dict[str, float]:
    app = Instant()
    guard = make_guard(
        app,
        pool_tokens=1_000_000,
        block_size=128,
        max_model_len=200_000,
        prefix_hits="count" if "prefix" in case else "ignore",
    )
    ask = guard.counter._tokenize

    async def timed(query: Any, scope: Any) -> Any:
        began = time.thread_time()
        try:
            return await ask(query, scope)
        finally:
            app.tokenizing += time.thread_time() - began

    guard.counter._tokenize = timed  # type: ignore[method-assign]
    body, took = body_of(case), []
    path = "/v1/chat/completions" if case == CHAT else "/v1/completions"
    if case == CHAT:
        app.count = json.dumps({"count": 120, "max_model_len": 200_000, "tokens": list(range(120))}).encode()
    for _ in range(requests):
        alone = await call(app, body, path)
        app.tokenizing = 0.0
        took.append(await call(guard, body, path) - app.tokenizing - alone)
    took.sort()
    at = {
        name: took[min(len(took) - 1, int(len(took) * share))]
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    return {
        "body_mb": round(len(body) / 1e6, 2),
        **{f"{name}_ms": round(seconds * 1000, 3) for name, seconds in at.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gc.freeze()
    found = {
        case: asyncio.run(measure(case, options.requests))
        for case in (CHAT, "text", "token ids", "text, prefix_hits=count")
    }
    for case, figures in found.items():
        print(case, json.dumps(figures))
    if options.json:
        versions = {"python": platform.python_version(), "machine": platform.machine()}
        options.json.write_text(json.dumps({"tokens": TOKENS, "versions": versions, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
